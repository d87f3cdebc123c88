"""The runner: a preset's cases and methods cut into jobs, and the jobs' rows and fits written as they come.

    plan ──► jobs (a method × a shard of cases) ──► an engine's workers fit and ask ──► units/*.parquet, fits/*.parquet

Shards are fixed by the run and not by the workers. Every unit is written whole or not at all; a run that was stopped at any
moment, by Ctrl-C or `kill -9`, goes on with the units that are absent, and fits that had been made come from the patch cache.

- single: each edit alone on the model, one patch per row of a batch;
- all: all edits attached at once (a joint method fits them in one write);
- stream: item after item, edited only where the model errs by then; after every so many edits all of them are asked again, and
  the preset's world (what the model was made for);
- sequential: edit after edit, weight edits merged and the next one fitted on the merged model; at each checkpoint all edits so
  far are asked, with their `position` as a tag. "all" and "sequential" are also asked the preset's probes of the world.

What a preset makes besides (`extra`) is made in parts, which are units like any other, and put together at the end.
"""

import dataclasses
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import errata
from errata.bench.cases import Case
from errata.bench.data.registry import first_of_each_fact
from errata.bench.engines import Engine, LocalEngine, WorkerPlan
from errata.bench.methods import inapplicable, is_atlas, resolved
from errata.bench.preset import Context, Method, Preset, unfit
from errata.bench.rows import UNEDITED, tfidf_of, write_cases
from errata.bench.store import (
    NOT_IN_ROWS,
    PatchCache,
    RunDirectory,
    code_digest,
    file_names,
    json_config,
    other_sources,
)
from errata.bench.worker import FITTING, MAKING, Given, Job, Outcome, Worker, editor_of
from errata.errors import ConfigError, EditError
from errata.patch import Patch
from errata.prompts.sources import with_old_object

SHARD = 16  # cases
LOOKED_AT = 200  # cases of a stream, of which those that were edited are asked


@dataclass(frozen=True)
class Plan:
    """What a run is to do: everything that decides its rows, and where the model is loaded from."""

    preset: Preset
    model_name: str
    methods: tuple[Method, ...]
    n: int | None = None
    seed: int = 0
    data: str | None = None
    split: Literal["dev", "test"] = "test"
    dtype: str | None = None
    device_map: str | None = None
    data_options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a run is. left: seconds that the rest should take, by the pace of the same methods' jobs so far; None at first."""

    done: int
    total: int
    job: Job
    outcome: Outcome
    left: float | None


@dataclass
class _Pace:
    """Seconds for a case (of jobs without cases: for the job) by method and kind, for the estimate."""

    spent: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def note(self, job: Job, outcome: Outcome) -> None:
        seconds, size = self.spent.get((job.method, job.kind), (0.0, 0))
        self.spent[job.method, job.kind] = (seconds + outcome.seconds, size + job.size)

    def left(self, jobs: Sequence[Job], workers: int) -> float | None:
        """None before a fit, of which asking says nothing. What a method has not done yet takes what it takes the others."""
        if any(job.kind in FITTING for job in jobs) and not any(kind in FITTING for _, kind in self.spent):
            return None
        own = {key: seconds / size for key, (seconds, size) in self.spent.items()}
        alike: dict[str, list[float]] = {}
        for (_, kind), rate in own.items():
            alike.setdefault("fit" if kind in FITTING else kind, []).append(rate)
        mean = {kind: sum(rates) / len(rates) for kind, rates in alike.items()}
        rates = (
            own.get((j.method, j.kind), mean.get("fit" if j.kind in FITTING else j.kind, 0.0)) * j.size for j in jobs
        )
        return sum(rates) / max(1, workers) if own else None


def run(
    plan: Plan,
    out: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    engine: Engine | None = None,
    command: str = "",
    cache: str | Path | bool | None = None,
    answers: dict[Any, dict[str, Any]] | None = None,
    shard: int = SHARD,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RunDirectory:
    """Run a plan into the directory `out`, or go on with what it lacks. The model is left as found.

    model, tokenizer: those of the plan's name, already loaded; the workers of other engines load their own. cache: the folder
    of patches (None: the user's, False: none). answers: what the unedited model said in earlier runs of this process with the
    same model, which this one adds to. Where edits are to be in the model together, all at once or one after another, the later of
    two that contradict each other is left out, of every method. Raises ConfigError naming the difference if `out` holds another run, or for
    methods with one label or cases with one id; EditError of what the preset's cases need. A fit that fails is an entry in
    the run's fits, and stops nothing.
    """
    used: Engine = engine or LocalEngine()
    directory = RunDirectory(out)
    if (why := unfit(plan.preset, model, plan.data)) is not None:
        raise ConfigError(f"{why}; choose another model or data set, or another preset")
    plan = replace(plan, methods=tuple(_as_here(method, plan, model) for method in plan.methods))
    left_out = {m.label: why for m in plan.methods if (why := inapplicable(m, model, tokenizer)) is not None}
    if left_out and len(left_out) == len(plan.methods):
        raise ConfigError(
            f"none of the methods can be run on this model; {'; '.join(dict.fromkeys(left_out.values()))}"
        )
    plan = replace(plan, methods=tuple(m for m in plan.methods if m.label not in left_out))
    _different("methods", "label", [UNEDITED, *(method.label for method in plan.methods)])
    editors = {method.label: editor_of(method) for method in plan.methods}
    context = Context(plan.model_name, model, tokenizer, plan.n, plan.seed, plan.split, plan.data, plan.data_options)
    cases = list(plan.preset.cases(context))
    if any(method.setting in ("all", "sequential") for method in plan.methods):
        cases, clashes = first_of_each_fact(cases)
        context.left_out.update(clashes)
    cases = [_with_old_object(model, tokenizer, case) for case in cases]
    _different("cases", "id", [case.id for case in cases])
    world = list(plan.preset.world(context)) if plan.preset.world is not None else []
    extra = plan.preset.extra(context, cases, plan.methods) if plan.preset.extra is not None else None
    patches = PatchCache(model, tokenizer, cache)
    weights = [dict(tfidf.idf)] if (tfidf := tfidf_of(cases)) is not None else []
    spec = {
        "preset": plan.preset.name,
        "model": plan.model_name,
        "weights": patches.digest[:16],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device_map": plan.device_map,
        "methods": {m.label: {"config": json_config(editors[m.label]), **_method_json(m)} for m in plan.methods},
        "data": plan.data,
        "data_options": dict(plan.data_options) or None,
        "split": plan.split,
        "asked_n": plan.n,
        "n": len(cases),
        "seed": plan.seed,
        "cases": _digest([_case_json(case) for case in cases] + [_json(probe) for probe in world] + weights),
        "checkpoints": list(plan.preset.checkpoints),
        "every": plan.preset.every,
        "most": plan.preset.most,
        "shard": shard,
    }
    about = {"command": command, "engine": used.name, **environment(model), "started": _now()}
    about |= {"left_out": left_out}
    with directory.locked():
        begun = directory.begin(spec, about)
        if not (directory.path / "cases.jsonl").exists():
            write_cases(directory.path, cases)
        methods = plan.methods if cases else ()  # of a preset that asks nothing they are what it makes its parts with
        jobs = plan_jobs(
            methods, len(cases), len(world), plan.preset.checkpoints, shard, plan.preset.every, plan.preset.most
        )
        parts = extra.parts if extra is not None else {}
        jobs += [Job(f"part-{name}", "part", name) for name in parts]
        work = _Work(directory, plan, jobs, progress, used)
        if not work.lacking() and directory.finished():
            return directory
        if begun:
            directory.go_on(about)
            for words in other_sources(directory.read()):
                warnings.warn(f"the rows of {directory.path} may be of different kinds: {words}", stacklevel=1)
        workers = WorkerPlan(
            plan.model_name, plan.dtype, plan.device_map, tuple(cases), tuple(world), plan.methods, plan.seed, cache,
            replace(context, model=None, tokenizer=None), plan.preset.extra,
        )  # fmt: skip
        with Worker(
            model, tokenizer, cases, world, plan.methods, seed=plan.seed, cache=patches, answers=answers, parts=parts
        ) as local:
            used.run(work.lacking(), work.given, work.take, workers, local)
        if extra is not None:
            extra.combine({name: directory.part(name) for name in parts}, directory.path)
        directory.finish(summary(directory, methods) | {"left_out": context.left_out}, _now())
    patches.trim()
    return directory


def plan_jobs(
    methods: Sequence[Method],
    count: int,
    world: int,
    checkpoints: Sequence[int] = (),
    shard: int = SHARD,
    look: int = 50,
    limit: int = 1000,
) -> list[Job]:
    """A run's jobs, each behind those that it needs: fixed by the methods, the number of cases and the size of a shard."""
    shards = every = [(start, min(count, start + shard)) for start in range(0, count, shard)]
    jobs = [Job(f"{UNEDITED}-{k:04}", "ask", UNEDITED, span) for k, span in enumerate(every)]
    asked = [job.name for job in jobs]
    if world:
        jobs.append(Job(f"{UNEDITED}-world", "world", UNEDITED))
    names = file_names([method.label for method in methods])

    def ask(method: Method, prefix: str, edits: int, fits: Sequence[str]) -> None:
        for k, (start, stop) in enumerate(shards):
            if start < edits:
                span = (start, min(stop, edits))
                jobs.append(Job(f"{prefix}-{k:04}", "ask", method.label, span, edits, (asked[k], *fits)))
        if world:
            jobs.append(Job(f"{prefix}-world", "world", method.label, (0, 0), edits, (f"{UNEDITED}-world", *fits)))

    for method in methods:
        label, name, fits = method.label, names[method.label], []
        n = min(count, method.most or count)
        shards = [(start, min(n, stop)) for start, stop in every if start < n]
        if method.setting == "single":
            for k, span in enumerate(shards):
                jobs.append(Job(f"{name}-{k:04}", "single", label, span, 1, (asked[k],)))
        elif method.setting == "all":
            joint = editor_of(method).joint
            for k, span in enumerate([(0, n)] if joint else shards):
                jobs.append(Job(f"{name}-fit-{k:04}", "fit", label, span))
                fits.append(jobs[-1].name)
            ask(method, name, n, fits)
        elif method.setting == "stream":
            after, end = 0, min(n, limit)
            for stop in sorted({min(stop, end) for stop in range(look, end + look, look)}):
                job = Job(f"{name}-stream-{stop:05}", "stream", label, (0, count), stop, tuple(fits), after)
                fits, look_at = [job.name], f"{name}-{stop:05}"
                jobs.append(job)
                # Not in one piece, so that no worker waits long for another.
                for k, start in enumerate(range(0, count, LOOKED_AT)):
                    span = (start, min(count, start + LOOKED_AT))
                    jobs.append(Job(f"{look_at}-{k:04}", "ask", label, span, stop, (job.name,), after))
                if world:
                    jobs.append(Job(f"{look_at}-world", "world", label, (0, 0), stop, (job.name,), after))
                after = stop
        else:
            stops = sorted({min(n, checkpoint) for checkpoint in (*checkpoints, n)} - {0})
            for start, stop in zip([0, *stops], stops, strict=False):
                if method.apart:
                    cuts = sorted({start, stop, *(cut for cut, _ in shards if start < cut < stop)})
                    for low, high in zip(cuts, cuts[1:], strict=False):
                        jobs.append(Job(f"{name}-fit-{high:05}", "fit", label, (low, high)))
                        fits = [*fits, jobs[-1].name]
                else:
                    jobs.append(Job(f"{name}-fit-{stop:05}", "chain", label, (start, stop), stop, tuple(fits)))
                    fits = [*fits, jobs[-1].name]
                ask(method, f"{name}-{stop:05}", stop, fits)
        edits = 1 if method.setting == "single" else n
        jobs.append(Job(name, "speed", label, (0, n), edits, tuple(fits)))
    return jobs


def _as_here(method: Method, plan: Plan, model: Any) -> Method:
    """The method with what stands for this model, and without a limit on its cases unless it is one of Atlas's own sizes."""
    own = plan.n is None and plan.data is None and is_atlas(plan.model_name)
    return replace(resolved(method, model, plan.model_name), most=method.most if own else None)


class _Work:
    """The jobs of a run that are still to do, what each is given, and where its results go."""

    def __init__(
        self,
        directory: RunDirectory,
        plan: Plan,
        jobs: Sequence[Job],
        progress: Callable[[Progress], None],
        engine: Engine,
    ):
        self.directory, self.plan, self.progress, self.engine = directory, plan, progress, engine
        self.jobs = {job.name: job for job in jobs}
        self.total, self.pace = len(jobs), _Pace()
        self._patches: dict[str, tuple[Patch, ...]] = {}
        self._begun = False
        self._left = self.lacking()
        self._done = self.total - len(self._left)

    def lacking(self) -> list[Job]:
        """The jobs whose results are not there, and those before them whose patches they need, which come from the cache."""
        wanted = {job.name for job in self.jobs.values() if not self._is_there(job)}
        for job in reversed(self.jobs.values()):  # each stands behind those that it needs
            if job.name in wanted:
                wanted |= set(self._fits(job))
        return [job for job in self.jobs.values() if job.name in wanted]

    def _fits(self, job: Job) -> tuple[str, ...]:
        return tuple(name for name in job.needs if self.jobs[name].kind in MAKING)

    def _is_there(self, job: Job) -> bool:
        if job.kind == "speed":
            return (self.directory.path / "speeds" / f"{job.name}.json").exists()
        if job.kind == "part":
            return self.directory.has_part(job.method)
        fits = job.kind not in FITTING or self.directory.has_fits(job.name)
        rows = job.kind not in ("single", "ask", "world") or self.directory.has(job.name)
        return fits and rows

    def given(self, job: Job) -> Given:
        """What the job is given. Raises RuntimeError if a job whose patches it needs has not been done."""
        fits = self._fits(job)
        if lacking := [name for name in fits if name not in self._patches]:
            raise RuntimeError(f"the unit {job.name} needs the patches of {lacking[0]}, which has not been done")
        patches = [patch for name in fits for patch in self._patches[name]]
        answers = next((name for name in job.needs if self.jobs[name].method == UNEDITED), None)
        return Given(self.directory.answers(answers) if answers else {}, patches, fits)

    def take(self, job: Job, outcome: Outcome) -> None:
        """Write what a job has made, fits before rows: a unit with rows has all."""
        about = {"run": self.directory.name, "model": self.plan.model_name}
        if not self._begun:  # by now an engine knows how many there are
            self.directory.note(workers=self.engine.workers)
            self._begun = True
        if outcome.fits is not None and not self.directory.has_fits(job.name):
            self.directory.write_fits(job.name, [about | fit for fit in outcome.fits])
        if outcome.rows is not None:
            self.directory.write(job.name, [about | row for row in outcome.rows])
        if outcome.speed is not None:
            self.directory.write_json(f"speeds/{job.name}.json", {"method": job.method, **outcome.speed})
        if job.kind == "part":
            self.directory.write_part(job.method, outcome.part)
        if job.kind in MAKING:
            self._patches[job.name] = outcome.patches
        self._left.remove(job)
        self._done += 1
        self.pace.note(job, outcome)
        left = self.pace.left(self._left, self.engine.workers)
        self.progress(Progress(self._done, self.total, job, outcome, left))


# -- what is kept with a run ---------------------------------------------------------------------------------------------


def summary(directory: RunDirectory, methods: Sequence[Method]) -> dict[str, Any]:
    """By method: seconds and bytes for each fit, failed cases by name, tokens per second with the edits and without."""
    fits = directory.fits()
    found: dict[str, Any] = {}
    for label, name in file_names([method.label for method in methods]).items():
        own = [fit for fit in fits if fit["method"] == label]
        made = [fit for fit in own if not fit["error"]]
        speed = json.loads((directory.path / "speeds" / f"{name}.json").read_text(encoding="utf-8"))
        pace, plain = speed.get("tokens_per_second"), speed.get("unedited")
        found[label] = {
            "fits": len(made),
            "failed": {fit["case"]: fit["error"] for fit in own if fit["error"]},
            "seconds_per_fit": sum(fit["seconds"] for fit in made) / len(made) if made else None,
            "bytes_per_edit": sum(fit["nbytes"] for fit in made) / len(made) if made else None,
            "edits_while_timed": speed.get("edits"),
            "tokens_per_second": pace,
            "tokens_per_second_unedited": plain,
            "speed": pace / plain if pace and plain else None,
        }
    return {"methods": found}


def environment(model: Any) -> dict[str, Any]:
    """What a run is measured on: versions, threads and the class of the machine, without its name."""
    import numpy
    import pandas
    import pyarrow

    affinity = getattr(os, "sched_getaffinity", None)
    device = next(model.parameters()).device
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "versions": {
            "errata": errata.__version__,
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, transformers, numpy, pandas, pyarrow)},
        },
        "sources": code_digest(NOT_IN_ROWS)[:16],
        "threads": torch.get_num_threads(),
        "machine": {
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "memory_gib": round(pages / 2**30) or None,
            "processor": platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def methods_of(spec: dict[str, Any]) -> tuple[Method, ...]:
    """The methods of a run's `spec`, as they were asked for."""
    names = [f.name for f in dataclasses.fields(Method)]
    return tuple(
        Method(**{name: method[name] for name in names if name in method}) for method in spec["methods"].values()
    )


def _method_json(method: Method) -> dict[str, Any]:
    return {**_json(method), "changes": dict(json.loads(json.dumps(dict(method.changes), default=list)))}


def _json(value: Any) -> dict[str, Any]:
    values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}


def _case_json(case: Case) -> dict[str, Any]:
    return _json(replace(case, probes=(), tfidf=None)) | {
        "request": json.loads(case.request.to_json()),
        "probes": [_json(probe) for probe in case.probes],
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _different(what: str, field_: str, values: Sequence[str]) -> None:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ConfigError(f"two {what} of a run have the {field_} {twice[0]!r}; give each its own")


def _with_old_object(model: Any, tokenizer: Any, case: Case) -> Case:
    """The case with the model's own answer as old object where its request names none, as every method needs or fills in.

    A case whose old object cannot be found stays as it is: methods that need one fail on it, by name.
    """
    try:
        return replace(case, request=with_old_object(model, tokenizer, case.request))
    except EditError:
        return case
