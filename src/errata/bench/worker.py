"""What a worker of a run does with a model: fit edits, put them in, ask. One worker for each process, whichever engine runs it.

A run is cut into jobs beforehand (`errata.bench.runner`), so what is fitted and asked together does not depend on the workers.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from errata.bench import streams
from errata.bench.cases import Case, Probe
from errata.bench.preset import STAGED, Method
from errata.bench.rows import UNEDITED
from errata.bench.store import PatchCache
from errata.context import Context
from errata.counterfactual import Counterfactual
from errata.editor import Editor
from errata.editors import get_editor
from errata.errors import EditError
from errata.low_rank import LowRank
from errata.merge import merge
from errata.model.generate import greedy
from errata.model.tokens import token_ids
from errata.patch import Patch
from errata.steering.parts import Steering

SAMPLED = "generation"
MAKING = ("fit", "chain", "stream")  # kinds of jobs that make patches for others
FITTING = ("single", *MAKING)
NO_ANSWER = (SAMPLED, "unrelated")
WINDOW = 30  # tokens of an answer that are kept for RippleEdits, F1 and other protocols that read more than the object
SPEED_PROMPTS, SPEED_TOKENS, SPEED_ROUNDS = 32, 16, 3


@dataclass(frozen=True)
class Job:
    """One piece of a run. name: of the unit's files; span: the cases, by position.

    kind: "single" fits the cases and asks each under its own edit; "fit" fits them, "chain" one after another on top of the
    edits before, "stream" goes on with the cases until it holds `edits` edits of what the model gets wrong; "ask" asks
    them, and "world" the run's own probes, with the first `edits` edits in the model (0: unedited); "speed" measures tokens
    per second with them; "part" makes one of the preset's further parts, named by `method`. needs: names of the jobs whose
    results this one is made from. after: of a stream, the edits at the look before.
    """

    name: str
    kind: Literal["single", "fit", "chain", "stream", "ask", "world", "speed", "part"]
    method: str
    span: tuple[int, int] = (0, 0)
    edits: int = 0
    needs: tuple[str, ...] = ()
    after: int = 0

    @property
    def size(self) -> int:
        """Cases that it fits or asks, edits that a stream is to gain; 1 for what goes by neither."""
        if self.kind == "stream":
            return self.edits - self.after
        cases = self.span[1] - self.span[0]
        if self.kind == "ask":
            return min(cases, self.edits or cases)
        return cases if self.kind in FITTING else 1


@dataclass(frozen=True)
class Given:
    """What a job is given. unedited: {(case, probe): the unedited model's answer}; patches: the edits to put in, in order; fits:
    names of the jobs that made them.
    """

    unedited: Mapping[tuple[str, int], str] = field(default_factory=dict)
    patches: Sequence[Patch] = ()
    fits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a job makes; each as far as its kind has it."""

    rows: list[dict[str, Any]] | None = None
    fits: list[dict[str, Any]] | None = None
    patches: tuple[Patch, ...] = ()
    speed: dict[str, float] | None = None
    part: Any = None  # JSON values
    seconds: float = 0.0


def editor_of(method: Method) -> Editor[Any]:
    """The editor of a method with its options. Raises UnknownEditorError, ConfigError."""
    from pydantic import TypeAdapter

    kind = get_editor(method.editor)
    hints = get_type_hints(kind.Config)
    # Changes that were read from JSON have lists where the configuration has tuples.
    changes = {k: TypeAdapter(hints[k]).validate_python(v) if k in hints else v for k, v in method.changes.items()}
    return kind.preset(method.preset, **changes) if method.preset else kind(**changes)


class Worker:
    """A model with the cases, probes and methods of a run. `close` (or leaving the block) takes every edit off again.

    answers: what the unedited model said so far, filled as it is asked; runs of one model may share it. parts: what makes the
    preset's further parts, by name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cases: Sequence[Case],
        world: Sequence[Probe],
        methods: Sequence[Method],
        *,
        seed: int = 0,
        cache: PatchCache | None = None,
        answers: dict[Any, dict[str, Any]] | None = None,
        parts: Mapping[str, Callable[[], Any]] | None = None,
    ):
        self.model, self.tokenizer, self.cases, self.world, self.seed = model, tokenizer, cases, world, seed
        self.methods = {method.label: method for method in methods}
        self.editors = {method.label: editor_of(method) for method in methods}
        self.cache = cache or PatchCache(model, tokenizer, folder=False)
        self.answers = answers if answers is not None else {}
        self.parts = parts or {}
        self._state: tuple[tuple[str, int], ExitStack] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take every edit off the model."""
        if self._state is not None:
            _, stack = self._state
            self._state = None
            stack.close()

    def do(self, job: Job, given: Given) -> Outcome:
        """The job's results. A fit that fails is an entry with its error; any other exception ends the run."""
        started = time.perf_counter()
        if job.kind in ("single", *MAKING) or not job.edits:
            self.close()
        given = replace(given, patches=_distinct(given.patches))
        outcome = {
            "single": self._single,
            "fit": self._fit,
            "chain": self._chain,
            "stream": self._stream,
            "ask": self._ask,
            "world": self._ask,
            "speed": self._speed,
            "part": lambda job, _: Outcome(part=self.parts[job.method]()),
        }[job.kind](job, given)
        return replace(outcome, seconds=time.perf_counter() - started)

    # -- asking ------------------------------------------------------------------------------------------------------

    def _questions(self, job: Job, among: Iterable[str] | None = None) -> list[Any]:
        """The job's questions; conditions are asked of the unedited model only. among: ids of edits, None for all."""
        from errata.bench.ask import Question

        if job.kind == "world":
            return [Question("", "", i, probe, dict(probe.tags)) for i, probe in enumerate(self.world)]
        start, stop = job.span
        sequential = job.edits and self.methods[job.method].setting in STAGED
        found = []
        for position in range(start, stop):
            case = self.cases[position]
            if among is not None and case.request.id not in among:
                continue
            place = {"position": str(position + 1)} if sequential else {}
            for i, probe in enumerate(case.probes):
                if not probe.condition or job.method == UNEDITED:
                    found.append(Question(case.id, case.request.id, i, probe, {**case.tags, **probe.tags, **place}))
        return found

    def _put(self, job: Job, given: Given, questions: list[Any], **options: Any) -> list[dict[str, Any]]:
        from errata.bench.ask import ask

        if job.method == UNEDITED:
            about = {"method": UNEDITED, "setting": "single", "edits": 0}
            return [about | row for row in self._unedited(questions)]
        about = {"method": job.method, "setting": self.methods[job.method].setting, "edits": job.edits}
        options |= {"seed": self.seed, "window": WINDOW}
        rows = ask(self.model, self.tokenizer, questions, unedited=given.unedited, **options)
        return [about | row for row in rows]

    def _unedited(self, questions: list[Any]) -> list[dict[str, Any]]:
        """What the model says without edits; each prompt is asked once, but for sampled texts: one for each probe, as of edits."""
        from errata.bench.ask import ask

        probes = [(q.probe, (q.case, q.index) if q.probe.kind == SAMPLED else ()) for q in questions]
        keys = [(p.kind, p.prompt, p.expected, p.alternatives, own) for p, own in probes]
        new = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.answers or key[0] == SAMPLED}
        rows = ask(self.model, self.tokenizer, list(new.values()), seed=self.seed, window=WINDOW)
        for key, row in zip(new, rows, strict=True):
            # the others' rows say what it said; a sampled text or a running one is no answer
            self.answers[key] = row | {"unedited": None if row["kind"] in NO_ANSWER else row["generated"]}
        own = [
            {"case": q.case, "edit": q.edit, "probe": q.index, "tags": dict(q.tags), "test": q.probe.test}
            | {"joined": q.probe.joined, "condition": q.probe.condition, "answers": q.probe.answers}
            for q in questions
        ]
        return [self.answers[key] | about for key, about in zip(keys, own, strict=True)]

    def _ask(self, job: Job, given: Given) -> Outcome:
        if job.edits and self.methods[job.method].setting == "stream":
            patch = _followed(job, given)
            made = len(streams.edited(patch))
            if made <= job.after:  # the stream had ended before
                return Outcome(rows=[])
            self._install(job, given.patches)
            return Outcome(
                rows=self._put(replace(job, edits=made), given, self._questions(job, streams.standing(patch)))
            )
        if job.edits:
            self._install(job, given.patches)
        held = {edit for patch in given.patches for edit in patch.ids} if job.edits else None
        return Outcome(rows=self._put(job, given, self._questions(job, held)))

    def _single(self, job: Job, given: Given) -> Outcome:
        patches, fits = self._fitted(job)
        questions = self._questions(job, patches)
        return Outcome(fits=fits, rows=self._put(job, given, questions, patches=patches) if questions else [])

    # -- fitting -----------------------------------------------------------------------------------------------------

    def _fit(self, job: Job, _: Given) -> Outcome:
        """Fit a span of cases for later: a joint method's as one patch, any other's as one for each edit."""
        if self.editors[job.method].joint:
            return self._fit_jointly(job)
        patches, fits = self._fitted(job)
        return Outcome(fits=fits, patches=tuple(patches.values()))

    def _fitted(self, job: Job) -> tuple[dict[str, Patch], list[dict[str, Any]]]:
        """{edit: its own patch} of a span of cases, each fitted on the model as it is, and the entries of their fits."""
        editor = self.editors[job.method]
        cases = self.cases[slice(*job.span)]
        requests = {case.request.id: case.request for case in cases}  # two cases may share an edit
        keys = {edit: self.cache.key(editor, [request], self.seed) for edit, request in requests.items()}
        patches = {edit: patch for edit in requests if (patch := self.cache.find(keys[edit])) is not None}
        errors: dict[str, str] = {}
        lacking = [edit for edit in requests if edit not in patches]
        size = 1 if editor.joint else editor.batch
        for start in range(0, len(lacking), size):
            chunk = lacking[start : start + size]
            for edit, found in self._try(editor, [requests[edit] for edit in chunk]).items():
                if isinstance(found, str):
                    errors[edit] = found
                else:
                    self.cache.keep(keys[edit], found)
                    patches[edit] = found
        shared = _shared_gates(patches[edit] for edit in requests if edit in patches)
        patches = {edit: next(shared) for edit in requests if edit in patches}
        return patches, [_entry(job, case, patches.get(case.request.id), errors) for case in cases]

    def _try(self, editor: Editor[Any], requests: list[Any]) -> dict[str, Patch | str]:
        """{edit: its patch, or why there is none}. Where a batch fails each of its edits is tried alone."""
        started = time.perf_counter()
        try:
            patch = editor.fit(self.model, self.tokenizer, requests, seed=self.seed)
        except Exception as error:  # whatever a method raises is this edit's failure, not the run's
            if len(requests) > 1:
                return {k: v for one in requests for k, v in self._try(editor, [one]).items()}
            return {requests[0].id: _words(error)}
        seconds = (time.perf_counter() - started) / len(requests)
        parted = map(patch.only, patch.ids)
        return {r.id: _timed(one, seconds) for r, one in zip(requests, parted, strict=True)}

    def _fit_jointly(self, job: Job) -> Outcome:
        """All edits in one write; those that the method refuses by themselves are left out."""
        editor = self.editors[job.method]
        cases = self.cases[slice(*job.span)]
        requests, errors = {}, {}
        for case in cases:
            try:
                editor.check([case.request], self.model, self.tokenizer)
                requests[case.request.id] = case.request
            except EditError as error:
                errors[case.request.id] = _words(error)
        key = self.cache.key(editor, list(requests.values()), self.seed)
        patch = self.cache.find(key) if requests else None
        if patch is None and requests:
            started = time.perf_counter()
            try:
                patch = editor.fit(self.model, self.tokenizer, list(requests.values()), seed=self.seed)
                patch = _timed(patch, (time.perf_counter() - started) / len(requests))
                self.cache.keep(key, patch)
            except Exception as error:
                errors |= dict.fromkeys(requests, _words(error))
        parted = dict(zip(requests, map(patch.only, patch.ids), strict=True)) if patch else {}
        fits = [_entry(job, case, parted.get(case.request.id), errors) for case in cases]
        return Outcome(fits=fits, patches=(patch,) if patch else ())

    def _chain(self, job: Job, given: Given) -> Outcome:
        """Fit a span of cases one after another, each on the model with the weight edits before it merged.

        A steering patch does not change what the next is fitted on, so it is only handed on.
        """
        editor = self.editors[job.method]
        fits, patches = [], list(given.patches)
        errors: dict[str, str] = {}
        lineage = self._lineage(editor, given.patches)
        with ExitStack() as stack:
            for patch in _joined([p for p in patches if _mergeable(p)]):
                stack.enter_context(merge(patch, self.model, self.tokenizer))
            for case in self.cases[slice(*job.span)]:
                request = case.request
                if (twin := next((p for p in patches if request.id in p.ids), None)) is not None:
                    fits.append(_entry(job, case, twin, errors))  # two cases share an edit, which is in already
                    continue
                key = self.cache.key(editor, [request], self.seed, lineage)
                found: Patch | str | None = self.cache.find(key)
                if found is None:
                    found = self._try(editor, [request])[request.id]
                    if isinstance(found, Patch):
                        # Its base is the model without what is merged into it: that of every edit of the chain.
                        weights = {name: self.cache.base["weights"][name] for name in found.base.get("weights") or {}}
                        found = replace(found, base={**found.base, "weights": weights})
                        self.cache.keep(key, found)
                if isinstance(found, str):
                    errors[request.id] = found
                else:
                    patches.append(found)
                    if _mergeable(found):
                        stack.enter_context(merge(found, self.model, self.tokenizer))
                        lineage = key
                fits.append(_entry(job, case, found if isinstance(found, Patch) else None, errors))
        return Outcome(fits=fits, patches=tuple(_shared_gates(patches[len(given.patches) :])))

    def _stream(self, job: Job, given: Given) -> Outcome:
        """Go on with the stream of cases; one that has ended hands on the patch that it has."""
        editor, cases = self.editors[job.method], self.cases[slice(*job.span)]
        before = _followed(job, given) if job.needs else None
        requests = list({case.request.id: case.request for case in cases}.values())
        if before is not None and {request.id for request in requests} <= set(before.ids):
            return Outcome(fits=[], patches=(before,))
        key = self.cache.key(editor, requests, self.seed, f"stream to {job.edits}, {job.needs}")
        patch = self.cache.find(key)
        if patch is None:
            patch, _ = streams.follow(editor, self.model, self.tokenizer, requests, job.edits, before, self.seed)
            assert patch is not None  # there are items, and every one that was seen is in it
            self.cache.keep(key, patch)
        new = streams.edited(patch)[len(streams.edited(before)) :]
        fits = streams.entries(job.method, cases, patch, new, streams.failures(patch, before))
        return Outcome(fits=fits, patches=(patch,))

    def _lineage(self, editor: Editor[Any], patches: Sequence[Patch]) -> str:
        """The key of the last of these edits that is in the weights."""
        lineage = ""
        for patch in patches:
            if _mergeable(patch):
                lineage = self.cache.key(editor, patch.requests, self.seed, lineage)
        return lineage

    # -- edits in the model ------------------------------------------------------------------------------------------

    def _install(self, job: Job, patches: Sequence[Patch]) -> None:
        """Put these edits in and keep them there for the next job with the same: merged weights in a sequence, else attached."""
        key = (job.method, job.edits)
        if self._state is not None and self._state[0] == key:
            return
        self.close()
        with ExitStack() as stack:
            stack.enter_context(self._inside(job, patches))
            self._state = (key, stack.pop_all())

    @contextmanager
    def _inside(self, job: Job, patches: Sequence[Patch]) -> Iterator[None]:
        sequential = self.methods[job.method].setting in STAGED
        with ExitStack() as stack:
            for patch in _joined(patches):
                if sequential and _mergeable(patch):
                    stack.enter_context(merge(patch, self.model, self.tokenizer))
                else:
                    stack.enter_context(patch.attach(self.model, self.tokenizer))
            yield

    def _speed(self, job: Job, given: Given) -> Outcome:
        """Tokens per second of greedy generation with the edits in and without, in turns; the best of each."""
        patches = given.patches
        if self.methods[job.method].setting == "single":
            patches = next((list(found.values()) for found in self._first_fits(job)), [])
        self.close()
        if not any(patch.parts for patch in patches):
            return Outcome(speed={})
        prompts = [case.request.text for case in self.cases[:SPEED_PROMPTS]]
        self._pace(prompts)  # the first pass of a process is slower
        plain, edited = 0.0, 0.0
        for _ in range(SPEED_ROUNDS):
            plain = max(plain, self._pace(prompts))
            with self._inside(job, patches):
                edited = max(edited, self._pace(prompts))
        stream = self.methods[job.method].setting == "stream"
        edits = len(streams.edited(_followed(job, given))) if stream else job.edits
        return Outcome(speed={"tokens_per_second": edited, "unedited": plain, "edits": edits})

    def _first_fits(self, job: Job) -> Iterator[dict[str, Patch]]:
        for i in range(len(self.cases)):
            patches, _ = self._fitted(replace(job, span=(i, i + 1)))
            if patches:
                yield patches

    def _pace(self, prompts: list[str]) -> float:
        """Tokens generated in a second, all prompts as one batch."""
        started = time.perf_counter()
        texts = greedy(self.model, self.tokenizer, prompts, SPEED_TOKENS, len(prompts))
        seconds = time.perf_counter() - started
        said = [text for text in texts if text.strip()]
        return sum(map(len, token_ids(self.tokenizer, said, special=False))) / seconds


# -- patches -------------------------------------------------------------------------------------------------------------


def _followed(job: Job, given: Given) -> Patch:
    """The patch of the stream so far. Raises RuntimeError where it is not handed on, which no row may hide."""
    if not given.patches:
        raise RuntimeError(f"the unit {job.name} goes on with a stream and was given no patch of it")
    return given.patches[0]


def _mergeable(patch: Patch) -> bool:
    return bool(patch.parts) and all(isinstance(part, LowRank) for part in patch.parts)


def _joined(patches: Sequence[Patch]) -> list[Patch]:
    """The patches of one method as one, so that a thousand are put in by one step; apart where they were fitted on others."""
    if len(patches) < 2 or any(p.base != patches[0].base or p.config != patches[0].config for p in patches):
        return list(patches)
    return [
        replace(
            patches[0],
            requests=tuple(request for patch in patches for request in patch.requests),
            parts=tuple(part for patch in patches for part in patch.parts),
            report={k: v for patch in patches for k, v in patch.report.items()},
        )
    ]


def _distinct(patches: Sequence[Patch]) -> list[Patch]:
    """Without those whose edits are in an earlier one: two cases may share an edit."""
    found: list[Patch] = []
    held: set[str] = set()
    for patch in patches:
        if not held & set(patch.ids):
            found.append(patch)
            held |= set(patch.ids)
    return found


def _shared_gates(patches: Iterable[Patch]) -> Iterator[Patch]:
    """The patches with equal gates, and equal experts, as one object: a thousand copies of them would fill the memory."""
    gates: dict[str, Any] = {}
    for patch in patches:
        parts = [
            replace(part, gate=gates.setdefault(part.gate.digest, part.gate))
            if isinstance(part, (Steering, Context, Counterfactual)) and part.gate is not None
            else part
            for part in patch.parts
        ]
        for i, part in enumerate(parts):
            if isinstance(part, Counterfactual):
                parts[i] = replace(part, expert=gates.setdefault(part.expert.digest, part.expert))
        yield replace(patch, parts=tuple(parts))


def _timed(patch: Patch, seconds: float) -> Patch:
    """The patch with the seconds of its fit in its report, so that they are known where it comes from the cache."""
    report = {edit: {**patch.report.get(edit, {}), "seconds_fit": round(seconds, 6)} for edit in patch.ids}
    return replace(patch, report=report)


def _entry(job: Job, case: Case, patch: Patch | None, errors: Mapping[str, str]) -> dict[str, Any]:
    """A row of `errata.bench.rows.FITS`, without run and model."""
    scope = (
        next((p for p in patch.parts if isinstance(p, (Steering, Context, Counterfactual))), None) if patch else None
    )
    report = dict(next(iter(patch.report.values()), {})) if patch else {}
    return {
        "method": job.method,
        "case": case.id,
        "edit": case.request.id,
        "seconds": report.pop("seconds_fit", None),
        "nbytes": sum(t.numel() * t.element_size() for p in patch.parts for t in p.tensors().values())
        if patch
        else None,
        "radius": scope.radius if scope else None,  # the edit's own scope is the first of its parts
        "error": "" if patch else errors.get(case.request.id, "no patch was made"),
        "report": json.dumps(report, ensure_ascii=False, default=str),
    }


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EditError) else f"{type(error).__name__}: {text}"
