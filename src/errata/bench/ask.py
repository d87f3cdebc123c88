"""Put probes to a model and say what came back, one row each: the words, the probabilities, the gate's decision.

A batch runs its prompts once. That pass gives the first token's figures, the gate's decision and the first word of the answer;
its keys and values then serve the teacher-forced passes over the expected answer and its alternative, and the greedy steps
behind them. With patches by edit every row of a batch is edited by its own question's patch alone. An answer is followed until
its end is certain, and through the window that is asked for, so no row depends on what else is in its batch, but for rounding.

An encoder-decoder answers a prompt as a whole, and a classifier names a label: these are asked once for their words and once for
each answer's probability. A patch that cannot act row by row (fine-tuned weights), or of which a batch or more is asked, is
attached to the model for its own questions.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import exp, isfinite
from typing import Any

import torch
from torch import Tensor

from errata.bench.cases import STAY, Probe
from errata.bench.fluency import sample
from errata.errors import ConfigError, RequestError
from errata.model.anatomy import anatomy
from errata.model.attached import CONTEXT, STEERED, asked, bare, by_row, scoped, without_patches
from errata.model.cache import cache_in, with_cache
from errata.model.generate import cut, ended, greedy, says
from errata.model.room import check_room, room
from errata.model.states import evaluating, input_device
from errata.model.targets import IGNORED, supervised
from errata.model.tokens import Batch, continuation_ids, pad, pad_id, token_ids
from errata.patch import Patch, attach_rows, check_fits
from errata.steering.parts import Decision, together

OPEN_TOKENS = 12  # of an answer of which nothing is known but that it should stay
SILENT = ("generation", "unrelated")  # kinds without an answer
LOGITS = 2**26  # numbers of logits at every position that are held at once

Row = dict[str, Any]
Task = Callable[[Any, Any, Sequence["Question"], Sequence[str]], list[Row]]


@dataclass(frozen=True)
class Question:
    """A probe of a case under its edit. index: the probe's in its case; tags: the case's and the probe's."""

    case: str
    edit: str
    index: int
    probe: Probe
    tags: Mapping[str, str] = field(default_factory=dict)


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    patches: Mapping[str, Patch] | None = None,
    unedited: Mapping[tuple[str, int], str] | None = None,
    seed: int = 0,
    batch: int = 64,
    wrap: Callable[[str], str] = str,
    figures: bool = True,
    window: int = 0,
) -> list[Row]:
    """A row for each question, in order: the columns of `rows.SCHEMA` from `case` on.

    patches: a patch for each edit, under which alone its questions are asked; None: the model as it stands. unedited: what
    the unedited model generates, by (case, index); where it lacks an answer that should stay, the model is asked without
    its patches. wrap: what a prompt goes through first (`errata.model.tokens.wrapper`). figures: False asks for the answers
    only, and leaves out probabilities and gates. window: how many tokens of an answer are kept at least, whatever they say, unless
    the text ends: for protocols that read more of it than the object.

    A probe passes if the model says the whole expected object under any of its names by greedy generation, or, where its kind
    should stay (`cases.STAY`) or nothing is expected, gives its unedited answer. Kind "generation" is sampled, with the seed, and
    passes nothing; of kind "unrelated" p_expected is the text's own, and it passes if no bit of its logits is changed. Raises
    RequestError for an edit without a patch, and for prompts that with their answers are longer than the model's positions.
    """
    if by_row(model):
        raise ConfigError(
            "rows have patches of their own here; leave the block of `attach_rows`, and pass the patches instead"
        )
    if patches is not None:
        if missing := {q.edit for q in questions} - set(patches):
            raise RequestError(f"expected a patch for each edit that is asked about, found none for {min(missing)}")
        check_fits([patches[edit] for edit in {q.edit for q in questions}], model, tokenizer)
    run = partial(_apart, model, tokenizer, batch=batch, wrap=wrap)
    answered = _answered if anatomy(model).role == "decoder" else _judged
    tasks: dict[str, Task] = {
        "": partial(answered, figures=figures, window=window),
        "generation": partial(_sampled, seed=seed),
        "unrelated": _unrelated,
    }
    known, found = dict(unedited or {}), dict[int, Row]()
    if answered is _answered and known:
        # Whether an answer stays takes one pass over it, word by word it takes as many as it has; those that change are asked again.
        # Those that begin with the expected object are asked together: one pass tells both (`_answered`).
        parts: dict[bool, list[int]] = {True: [], False: []}
        for i, q in enumerate(questions):
            if _stays(q) and (text := known.get((q.case, q.index))) is not None:
                parts[text.lstrip().startswith(_expected(q))].append(i)
        for at in parts.values():
            rows = run([questions[i] for i in at], partial(_answered, figures=figures, known=known), patches)
            found |= {i: row for i, row in zip(at, rows, strict=True) if row["generated"] is not None}
    for kind, task in tasks.items():
        of_kind = (i for i, q in enumerate(questions) if (q.probe.kind if q.probe.kind in tasks else "") == kind)
        at = [i for i in of_kind if i not in found]
        found |= dict(zip(at, run([questions[i] for i in at], task, patches), strict=True))
    if patches is None and bare(model):
        known = {(q.case, q.index): found[i]["generated"] for i, q in enumerate(questions) if _stays(q)} | known
    plain = [q for q in questions if _stays(q) and (q.case, q.index) not in known]
    with without_patches(model):
        for q, row in zip(plain, run(plain, partial(answered, figures=False, window=window), None), strict=True):
            known[q.case, q.index] = row["generated"]
    return [_row(q, known.get((q.case, q.index)), found[i]) for i, q in enumerate(questions)]


def _stays(question: Question) -> bool:
    """Whether the unedited model's answer is what should be given."""
    probe = question.probe
    return probe.kind in STAY or (not probe.expected and probe.kind not in SILENT)


def _expected(question: Question) -> str:
    """The expected object's first name; empty where there is none."""
    return next(iter(question.probe.expected), "")


def _row(question: Question, unedited: str | None, found: Row) -> Row:
    probe = question.probe
    if probe.kind not in SILENT:
        text = found["generated"]
        kept = unedited is not None and cut(text) == cut(unedited)
        found = found | {"passed": kept if _stays(question) else any(says(text, e) for e in probe.expected)}
    return {
        "case": question.case,
        "edit": question.edit,
        "probe": question.index,
        "kind": probe.kind,
        "test": probe.test,
        "joined": probe.joined,
        "condition": probe.condition,
        "tags": dict(question.tags),
        "prompt": probe.prompt,
        "expected": list(probe.expected),
        "alternatives": list(probe.alternatives),
        "answers": [list(names) for names in probe.answers],
        "unedited": unedited,
        **_NOTHING,
        **found,
    }


_NOTHING: Row = dict.fromkeys(
    (
        *("generated", "first_token", "p_expected", "p_alternative", "p_expected_first", "p_alternative_first"),
        *("token_accuracy", "gate", "distance", "own_distance", "passed"),
    )
)


def _apart(
    model: Any, tokenizer: Any, questions: Sequence[Question], task: Task, patches: Mapping[str, Patch] | None, *,
    batch: int, wrap: Callable[[str], str],
) -> list[Row]:  # fmt: skip
    """What the task makes of the questions: those of an edit that is attached alone, edit by edit, then all others together."""
    found: dict[int, Row] = {}
    by_edit: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        by_edit.setdefault(question.edit, []).append(i)
    rest = list(range(len(questions)))
    if patches is not None:
        alone = {edit: at for edit, at in by_edit.items() if patches[edit].dense or len(at) >= batch}
        for edit, at in alone.items():
            with patches[edit].attach(model, tokenizer):
                rows = _batches(model, tokenizer, [questions[i] for i in at], task, None, batch=batch, wrap=wrap)
            found |= dict(zip(at, rows, strict=True))
        rest = [i for i in rest if questions[i].edit not in alone]
    rows = _batches(model, tokenizer, [questions[i] for i in rest], task, patches, batch=batch, wrap=wrap)
    found |= dict(zip(rest, rows, strict=True))
    return [found[i] for i in range(len(questions))]


def _batches(
    model: Any, tokenizer: Any, questions: Sequence[Question], task: Task, patches: Mapping[str, Patch] | None, *,
    batch: int, wrap: Callable[[str], str],
) -> list[Row]:  # fmt: skip
    """What the task makes of the questions, prompts of like length together."""
    prompts = [wrap(q.probe.prompt) for q in questions]
    lengths = [len(row) for row in token_ids(tokenizer, prompts)]
    order = sorted(range(len(prompts)), key=lambda i: (_stays(questions[i]), lengths[i]))  # windows together as well
    if task is _unrelated and order:
        batch = max(1, min(batch, LOGITS // (lengths[order[-1]] * int(model.config.get_text_config().vocab_size))))
    found: dict[int, Row] = {}
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            own = [questions[i] for i in chosen]
            with _edited(model, tokenizer, own, patches):
                rows = task(model, tokenizer, own, [prompts[i] for i in chosen])
            found |= dict(zip(chosen, rows, strict=True))
    return [found[i] for i in range(len(questions))]


def _edited(model: Any, tokenizer: Any, own: Sequence[Question], patches: Mapping[str, Patch] | None) -> Any:
    if patches is None:
        return nullcontext()
    return attach_rows(model, tokenizer, [patches[q.edit] for q in own], check=False)


# -- what is done with a batch -------------------------------------------------------------------------------------------


def _answered(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    prompts: Sequence[str],
    figures: bool = True,
    window: int = 0,
    known: Mapping[tuple[str, int], str] | None = None,
) -> list[Row]:
    """Greedy answers; with figures also the probabilities and what the gates decided.

    known: an answer for each question; then it is the answer where greedy generation would say it, and else None.
    """
    said = asked(model, prompts)
    ids = token_ids(tokenizer, said)
    names, least = _names(questions), _limits(tokenizer, questions)
    for own, text, limit in zip(ids, said, least, strict=True):
        check_room(model, [own], [text], new=limit)
    windows = _windows(questions, window, [_left(model, own) for own in ids])
    batch = pad(ids, pad_id(tokenizer), input_device(model), "left")
    with _prompts(model, [len(row) for row in ids]):
        inputs: dict[str, Any] = dict(batch.inputs(model))
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs |= {"logits_to_keep": 1}
        out = model(**inputs, use_cache=True)
        first, cache = out.logits[:, -1], cache_in(out)
        rows: list[Row] = [{} for _ in questions]
        if figures:
            rows = [
                {"first_token": tokenizer.decode([token]), **found}
                for token, found in zip(first.argmax(-1).tolist(), _decided(model, questions, prompts), strict=True)
            ]
        wanted, kept, forced = list[str](), list[list[int]](), list[tuple[list[float], list[bool]]]()
        if known is not None:
            wanted = [known[q.case, q.index] for q in questions]
            kept = [_tail(model, tokenizer, *each) for each in zip(said, wanted, names, least, strict=True)]
            forced = _forced(model, batch, cache, first, kept)
        if figures:
            for which in ("expected", "alternative"):
                answers = [q.probe.expected if which == "expected" else q.probe.alternatives for q in questions]
                tails = [
                    continuation_ids(tokenizer, text, a[0]) if a else [] for text, a in zip(said, answers, strict=True)
                ]
                # Of known answers that begin with these objects, as most do, the figures are there already.
                begun = bool(kept) and all(own[: len(tail)] == tail for own, tail in zip(kept, tails, strict=True))
                each = forced if begun else _forced(model, batch, cache, first, tails)
                for row, tail, (logp, hits) in zip(rows, tails, each, strict=True):
                    if n := len(tail):
                        row |= {f"p_{which}": exp(sum(logp[:n]) / n), f"p_{which}_first": exp(logp[0])}
                        row |= {"token_accuracy": sum(hits[:n]) / n} if which == "expected" else {}
        if known is None:
            texts: Sequence[str | None] = _greedy(model, tokenizer, batch, cache, first, names, least, windows)
        else:
            texts = [text if hits and all(hits) else None for text, (_, hits) in zip(wanted, forced, strict=True)]
    return [row | {"generated": text} for row, text in zip(rows, texts, strict=True)]


def _judged(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    prompts: Sequence[str],
    figures: bool = True,
    window: int = 0,
) -> list[Row]:
    """The answers of an encoder-decoder or the labels of a classifier; with figures also the probabilities."""
    windows = _windows(questions, window, [None] * len(questions))
    limits = [max(pair) for pair in zip(_limits(tokenizer, questions), windows, strict=True)]
    texts = greedy(model, tokenizer, prompts, limits, len(prompts))
    rows: list[Row] = [{"generated": text} for text in texts]
    if not figures:
        return rows
    said = asked(model, prompts)
    for which in ("expected", "alternative"):
        answers = [q.probe.expected if which == "expected" else q.probe.alternatives for q in questions]
        some = next((a[0] for a in answers if a), None)
        if some is None:
            continue
        wanted = supervised(model, tokenizer, said, [a[0] if a else some for a in answers])
        logits = model(**wanted.inputs).logits
        scores, labels = (logits, wanted.labels) if logits.ndim == 3 else (logits[:, None], wanted.labels[:, None])
        logp = _wide(scores).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        for row, own, label, best, answer in zip(rows, logp, labels, scores.argmax(-1), answers, strict=True):
            if answer:
                real = label != IGNORED
                row |= {f"p_{which}": exp(float(own[real].mean())), f"p_{which}_first": exp(float(own[0]))}
                if which == "expected":
                    row["token_accuracy"] = float((best == label)[real].double().mean())
    return rows


def _sampled(model: Any, tokenizer: Any, questions: Sequence[Question], prompts: Sequence[str], seed: int) -> list[Row]:
    """Sampled text, prompt included."""
    return [{"generated": text} for text in sample(model, tokenizer, prompts, seed=seed)]


def _unrelated(model: Any, tokenizer: Any, questions: Sequence[Question], prompts: Sequence[str]) -> list[Row]:
    """The probability of running text, and whether every bit of the logits is the unedited model's."""
    said = asked(model, prompts)
    ids, own = token_ids(tokenizer, said), token_ids(tokenizer, prompts, special=False)
    check_room(model, ids, said)
    batch = pad(ids, pad_id(tokenizer), input_device(model))
    logits = model(**batch.inputs(model), use_cache=False).logits
    rows = _decided(model, questions, prompts)
    with without_patches(model):
        plain = model(**batch.inputs(model), use_cache=False).logits
    for i, row in enumerate(rows):
        n = len(ids[i])
        start = max(1, n - len(own[i]))  # the first token of all has nothing before it
        scores = _wide(logits[i, start - 1 : n - 1]).log_softmax(-1)
        logp = scores.gather(1, batch.ids[i, start:n, None].to(scores.device))
        same = said[i] == prompts[i] and torch.equal(logits[i, :n], plain[i, :n])
        row |= {"p_expected": exp(float(logp.mean())) if len(logp) else None, "passed": same, "generated": ""}
    return rows


# -- passes --------------------------------------------------------------------------------------------------------------


@contextmanager
def _prompts(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Tell gates that embed text where each row's prompt ends."""
    table = scoped(model, STEERED)
    with table.prompts(lengths) if table is not None else nullcontext():
        yield


def _forced(
    model: Any, prompts: Batch, cache: Any, first: Tensor, tails: Sequence[Sequence[int]]
) -> list[tuple[list[float], list[bool]]]:
    """(log probabilities, whether it is the likeliest) of each token of each tail behind its prompt; the cache stays as it is."""
    columns = [_wide(first)]
    if (width := max(map(len, tails)) - 1) > 0:
        more = pad([[*tail[:-1], *[0] * (width - len(tail) + 1)][:width] for tail in tails], 0, prompts.ids.device)
        real = torch.tensor([[j < len(tail) - 1 for j in range(width)] for tail in tails]).to(prompts.mask)
        after = deepcopy(cache)
        if (table := vars(model).get(STEERED)) is not None:
            table.follow(after, cache)
        columns += _wide(_step(model, prompts, after, more.ids, real).logits).unbind(1)
    logits = torch.stack(columns, 1)
    wanted = torch.tensor([[*tail, *[0] * (logits.shape[1] - len(tail))] for tail in tails], device=logits.device)
    logp = logits.gather(2, wanted[..., None])[..., 0] - logits.logsumexp(-1)
    hits = logits.argmax(-1).eq(wanted)
    return [(own[: len(t)], hit[: len(t)]) for t, own, hit in zip(tails, logp.tolist(), hits.tolist(), strict=True)]


def _tail(model: Any, tokenizer: Any, prompt: str, text: str, names: Sequence[str], limit: int) -> list[int]:
    """The tokens that greedy generation gives if the text is its answer: with the end's, where nothing else ended it."""
    ids = continuation_ids(tokenizer, prompt, text) if text.strip() else []
    ends = _stops(model)
    return ids if len(ids) >= limit or _certain(text, names) or not ends else [*ids, min(ends)]


def _greedy(
    model: Any, tokenizer: Any, prompts: Batch, cache: Any, first: Tensor, names: Sequence[Sequence[str]],
    limits: Sequence[int], windows: Sequence[int],
) -> list[str]:  # fmt: skip
    """The raw greedy continuation of each prompt, to its end token, or through its window and to the token that makes its answer
    certain, at most as many as its limit or its window.
    """
    stops = _stops(model)
    most = [max(pair) for pair in zip(limits, windows, strict=True)]
    said: list[list[int]] = [[] for _ in limits]
    texts = [""] * len(said)
    left, token = set(range(len(said))), first.argmax(-1)
    mask = prompts.mask[:, :0]
    while True:
        for i, new in enumerate(token.tolist()):
            if i in left:
                said[i].append(new)
                texts[i] = tokenizer.decode(said[i], skip_special_tokens=True)
                certain = len(said[i]) >= windows[i] and _certain(texts[i], names[i])
                if new in stops or len(said[i]) == most[i] or certain:
                    left.remove(i)
        if not left:
            return texts
        mask = torch.cat([mask, torch.ones_like(prompts.mask[:, :1])], 1)
        token = _step(model, prompts, cache, token[:, None].to(prompts.ids), mask).logits[:, -1].argmax(-1)


def _step(model: Any, prompts: Batch, cache: Any, ids: Tensor, after: Tensor) -> Any:
    """The pass over ids (n, w) behind prompts and cache; after (n, >= w): the mask of all that follows the prompts."""
    inputs = {"input_ids": ids, "attention_mask": torch.cat([prompts.mask, after], 1)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        places = torch.arange(after.shape[1] - ids.shape[1], after.shape[1], device=ids.device)
        # A row that is done is fed for as long as others are not; there may be no room left behind it.
        inputs["position_ids"] = (prompts.lengths[:, None] + places).clamp(
            max=(room(model) or torch.iinfo(torch.long).max) - 1
        )
    return model(**inputs, **with_cache(model, cache))


def _stops(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {int(token) for token in (ends if isinstance(ends, list) else [ends]) if token is not None}


def _certain(text: str, names: Sequence[str]) -> bool:
    """Whether the answer has ended, and none of the names can still come out of it."""
    return ended(text) and not any(name.startswith(text.lstrip(" ")) for name in names)


def _names(questions: Sequence[Question]) -> list[tuple[str, ...]]:
    return [(*q.probe.expected, *q.probe.alternatives) for q in questions]


def _limits(tokenizer: Any, questions: Sequence[Question]) -> list[int]:
    """How many tokens an answer may have: enough for the longest name and the token behind it that closes it."""
    names = _names(questions)
    texts = list(dict.fromkeys(f" {name}" for own in names for name in own))
    size = dict(zip(texts, map(len, token_ids(tokenizer, texts, special=False)), strict=True))
    least = [0 if q.probe.expected else OPEN_TOKENS for q in questions]
    return [max([low, *(size[f" {name}"] + 2 for name in own)]) for low, own in zip(least, names, strict=True)]


def _windows(questions: Sequence[Question], window: int, left: Sequence[int | None]) -> list[int]:
    """The window of each answer, no longer than there is room behind its prompt; none where the unedited answer should stay."""
    wide = [window if most is None else min(window, most) for most in left]
    return [0 if _stays(q) else own for q, own in zip(questions, wide, strict=True)]


def _left(model: Any, ids: Sequence[int]) -> int | None:
    """How many tokens the model has room for behind these; the last is never fed."""
    limit = room(model)
    return None if limit is None else limit - len(ids) + 1


def _decided(model: Any, questions: Sequence[Question], prompts: Sequence[str]) -> list[Row]:
    """What the gates decided at the end of each prompt in the latest pass; nothing where there is none."""
    own = [q.edit for q in questions]
    steering, context = scoped(model, STEERED), scoped(model, CONTEXT)
    made = [steering.decided(own) if steering else None, context.decide(prompts, own) if context else None]
    decisions: Sequence[Decision | None] = together(*made) or [None] * len(own)
    rows = []
    for i, decision in enumerate(decisions):
        if decision is None or decision.nearest is None:
            rows.append(dict.fromkeys(("gate", "distance", "own_distance")))
            continue
        far = [each[i].own for each in made if each is not None and each[i].own is not None]
        at = decision.distance if isfinite(decision.distance) else None
        rows.append({"gate": decision.edit or "", "distance": at, "own_distance": far[0] if far else None})
    return rows


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()
