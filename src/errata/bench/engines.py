"""Engines: who does a run's jobs. `local` is this process, or processes of this machine; `ray` spreads them over a Ray cluster.

Jobs are fixed by the run, so all give the same texts and decisions, and floats that differ by rounding only. The driver writes
all results; a Ray worker that dies takes no result with it, and its job is given to another.
"""

import multiprocessing
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from errata import errors
from errata.bench.cases import Case, Probe
from errata.bench.preset import Context, Extra, Method
from errata.bench.store import PatchCache
from errata.bench.worker import MAKING, Given, Job, Outcome, Worker
from errata.errors import ConfigError
from errata.patch import Patch

LIVES = 3  # workers that may die over one job before the job is held to kill them
REACH = 5.0  # seconds in which a cluster has to answer


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker elsewhere needs to make a `Worker` of its own. context: without a model, which each worker has itself."""

    model_name: str
    dtype: str | None
    device_map: str | None
    cases: tuple[Case, ...]
    world: tuple[Probe, ...]
    methods: tuple[Method, ...]
    seed: int
    cache: str | Path | bool | None
    context: Context | None = None
    extra: Callable[[Context, Sequence[Case], Sequence[Method]], Extra] | None = None

    def model(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded."""
        from errata.model.loading import load

        return load(self.model_name, dtype=self.dtype, device_map=self.device_map)

    def worker(self, model: Any, tokenizer: Any, answers: dict[Any, dict[str, Any]] | None = None) -> Worker:
        """A worker with this model."""
        cache, parts = PatchCache(model, tokenizer, self.cache), None
        if self.extra is not None and self.context is not None:
            context = replace(self.context, model=model, tokenizer=tokenizer)
            parts = self.extra(context, self.cases, self.methods).parts
        return Worker(
            model, tokenizer, self.cases, self.world, self.methods,
            seed=self.seed, cache=cache, answers=answers, parts=parts,
        )  # fmt: skip


Give = Callable[[Job], Given]
Take = Callable[[Job, Outcome], None]


class Engine(Protocol):
    """What does jobs."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def workers(self) -> int:
        """How many jobs are under way at once."""

    @property
    def elsewhere(self) -> bool:
        """Whether other processes do the jobs, so that this one's model is free."""

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job, each after those that it needs (what `jobs` lacks is done), and hand each outcome to `take`."""


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The jobs by how many edits have to be made one after another from each on, so that no worker is left with a long chain
    at the end; in order where that is equal. jobs: each behind those that it needs.
    """
    length = {job.name: 0 for job in jobs}
    for job in reversed(jobs):
        length[job.name] += job.size if job.kind in MAKING else 0
        for name in job.needs:
            if name in length:
                length[name] = max(length[name], length[job.name])
    return sorted(jobs, key=lambda job: -length[job.name])


@dataclass(frozen=True)
class LocalEngine:
    """Everything in this process, job after job."""

    name: str = "local"
    workers: int = 1
    elsewhere: bool = False

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job in order."""
        for job in jobs:
            take(job, local.do(job, give(job)))


class ProcessEngine:
    """Processes on this machine, each with a model of its own; they stay for further runs until `close`, or the block's end.

    count: processes; threads: torch threads of each. A small model gains little from threads and nearly all from processes.
    Patches go through the pipes as their files' bytes, all else as `multiprocessing` sends plain values.
    """

    name = "local"
    elsewhere = True

    def __init__(self, count: int, threads: int = 1):
        self.workers, self._threads = count, threads
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> "ProcessEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job; those whose needs are done, longest chains first, in whichever process is free.

        Raises what a job raises (RuntimeError for what is not errata's), and ConfigError for a process that dies.
        """
        if not jobs:
            return
        self._start()
        for pipe in self._pipes:
            pipe.send(plan)
        waiting = longest_first(jobs)
        open_ = {job.name for job in jobs}
        held: dict[Connection, set[str]] = {pipe: set() for pipe in self._pipes}  # fits whose patches a process has
        patches: dict[str, list[bytes]] = {}
        busy: dict[Connection, Job] = {}
        try:
            while open_:
                free = [pipe for pipe in self._pipes if pipe not in busy]
                for job in [job for job in waiting if not open_ & set(job.needs)][: len(free)]:
                    waiting.remove(job)
                    given = give(job)
                    pipe = max(free, key=lambda one: len(held[one] & set(given.fits)))
                    free.remove(pipe)
                    lacking = {name: patches[name] for name in given.fits if name not in held[pipe]}
                    pipe.send((job, given.unedited, given.fits, lacking))
                    held[pipe] |= set(given.fits)
                    busy[pipe] = job
                for ready in wait(list(busy)):
                    pipe = next(one for one in busy if one is ready)
                    job = busy[pipe]
                    outcome, sealed = _received(pipe, job)
                    del busy[pipe]
                    if job.kind in MAKING:
                        patches[job.name] = sealed
                        held[pipe].add(job.name)
                    open_.discard(job.name)
                    take(job, outcome)
        except BaseException:  # what they are at is nobody's any more
            self.close()
            raise

    def _start(self) -> None:
        made = multiprocessing.get_context("spawn")
        while len(self._processes) < self.workers:
            ours, theirs = made.Pipe()
            process = made.Process(target=_serve, args=(theirs, self._threads), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


@dataclass(frozen=True)
class _Failure:
    """What a job raised: the exception's name and words."""

    name: str
    words: str

    def error(self) -> Exception:
        """The same exception where it is one of errata's, else a RuntimeError that names it."""
        kind = vars(errors).get(self.name)
        return kind(self.words) if kind is not None else RuntimeError(f"{self.name}: {self.words}")


def _received(pipe: Connection, job: Job) -> tuple[Outcome, list[bytes]]:
    """An outcome without its patches, and these."""
    try:
        found = pipe.recv()
    except (EOFError, ConnectionError):
        raise ConfigError(
            f"a process of this run died over the unit {job.name} (out of memory?); finished units are kept: resume with fewer "
            "--workers"
        ) from None
    if isinstance(found, _Failure):
        raise found.error()
    outcome, sealed = found
    return outcome, sealed


def _opened(sealed: Sequence[bytes], shared: dict[str, Any]) -> tuple[Patch, ...]:
    """Patches of their files' bytes; gates and counterfactual models that they have in common are held once, in `shared`."""
    found = []
    for patch in map(Patch.from_bytes, sealed):
        parts = []
        for part in patch.parts:
            own = {n: v for n in ("gate", "expert") if (v := getattr(part, n, None)) is not None}
            common: Any = {n: shared.setdefault(value.digest, value) for n, value in own.items()}
            parts.append(replace(part, **common))
        found.append(replace(patch, parts=tuple(parts)))
    return tuple(found)


def _serve(pipe: Connection, threads: int) -> None:
    """A process of `ProcessEngine`: a plan, then its jobs, until the next plan or the end of the pipe."""
    import torch
    import transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this process
    warnings.simplefilter("ignore")  # what a fit has to say is in its report; bars and remarks are the driver's
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    loaded: tuple[Any, Any, Any] = (None, None, None)
    answers: dict[Any, dict[str, Any]] = {}
    worker: Worker | None = None
    patches: dict[str, Sequence[Patch]] = {}
    shared: dict[str, Any] = {}
    while True:
        try:
            found = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if isinstance(found, WorkerPlan):
            if worker is not None:
                worker.close()
            patches = {}
            which = (found.model_name, found.dtype, found.device_map)
            if loaded[0] != which:
                loaded, answers = (which, *found.model()), {}
            worker = found.worker(*loaded[1:], answers)
            continue
        assert worker is not None
        job, unedited, fits, more = found
        try:
            patches |= {name: _opened(sealed, shared) for name, sealed in more.items()}
            given = Given(unedited, [patch for name in fits for patch in patches[name]], fits)
            outcome = worker.do(job, given)
            if job.kind in MAKING:
                patches[job.name] = outcome.patches
            sealed = [patch.to_bytes() for patch in outcome.patches]
            pipe.send((replace(outcome, patches=()), sealed))
        except Exception as error:
            words = str(error.args[0]) if error.args else str(error)  # a KeyError's str is its repr
            pipe.send(_Failure(type(error).__name__, words))


@dataclass
class RayEngine:
    """Jobs over a Ray cluster. address: of a running one; None starts one on this machine. count: workers, as many as fit by
    default. threads: CPU cores, and torch threads, for each worker. Workers with a device map take one GPU each.
    """

    address: str | None = None
    count: int | None = None
    threads: int = 1
    name: str = "ray"
    elsewhere: bool = True
    workers: int = field(default=1, init=False)

    def check(self) -> None:
        """Raises ConfigError without Ray, or where nothing answers at the address: said before a model is loaded, and not by
        Ray, which tries for a minute and then ends the process.
        """
        _ray()
        _answers(self.address)

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job; those whose needs are done, longest chains first, on whichever worker is free. Raises ConfigError
        without Ray, or for a job over which `LIVES` workers have died.
        """
        with _cluster(self.address) as ray:
            gpus = 1 if plan.device_map and ray.cluster_resources().get("GPU") else 0
            fit = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1) // (gpus or self.threads))
            self.workers = max(1, min(self.count or fit, len(jobs)))
            # What Ray's object store held at a worker's node would go with it, so all that outlives a job is put by the driver.
            kept = ray.put(plan)
            make = ray.remote(_Actor).options(num_cpus=self.threads, num_gpus=gpus)
            _Dispatch(ray, lambda: make.remote(kept, self.threads), self.workers, jobs, give, take).run()


class _Dispatch:
    """Which actor does which job. An actor that is still loading its model is waited for like one that works."""

    def __init__(self, ray: Any, make: Callable[[], Any], workers: int, jobs: Sequence[Job], give: Give, take: Take):
        self.ray, self.make, self.give, self.take = ray, make, give, take
        self.waiting = longest_first(jobs)
        self.open = {job.name for job in jobs}
        self.deaths: dict[str, int] = {}
        self.patches: dict[str, Any] = {}  # the name of a fit: its patches in the object store
        self.busy: dict[Any, tuple[Any, Job | None]] = {}
        self.idle: list[Any] = []
        for _ in range(workers):
            self._hire()

    def run(self) -> None:
        try:
            while self.open:
                self._hand_out()
                [ready], _ = self.ray.wait(list(self.busy), num_returns=1)
                self._back(ready)
        finally:
            for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
                self.ray.kill(actor)

    def _hire(self) -> None:
        actor = self.make()
        self.busy[actor.ready.remote()] = (actor, None)

    def _hand_out(self) -> None:
        for job in [job for job in self.waiting if not self.open & set(job.needs)][: len(self.idle)]:
            self.waiting.remove(job)
            given = self.give(job)
            actor = self.idle.pop()
            ref = actor.do.remote(job, given.unedited, given.fits, *(self.patches[name] for name in given.fits))
            self.busy[ref] = (actor, job)

    def _back(self, ready: Any) -> None:
        actor, job = self.busy.pop(ready)
        try:
            found = self.ray.get(ready)
        except self.ray.exceptions.RayActorError as error:
            if job is None and not self.busy and not self.idle:
                raise ConfigError(f"no Ray worker could start: {error}") from None
            if job is not None:
                self.deaths[job.name] = self.deaths.get(job.name, 0) + 1
                if self.deaths[job.name] == LIVES:
                    raise ConfigError(
                        f"{LIVES} Ray workers died over the unit {job.name}, the last with: {error}"
                    ) from None
                self.waiting.insert(0, job)
            self._hire()
            return
        self.idle.append(actor)
        if job is None:
            return
        outcome, packed = found
        if packed is not None:
            self.patches[job.name] = self.ray.put(packed)
        self.open.discard(job.name)
        self.take(job, outcome)


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, plan: WorkerPlan, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.worker = plan.worker(*plan.model())
        self.read: tuple[tuple[str, ...], tuple[Patch, ...]] = ((), ())

    def ready(self) -> None:
        """Return once the model is loaded."""

    def do(
        self, job: Job, unedited: dict[tuple[str, int], str], fits: tuple[str, ...], *packed: list[bytes]
    ) -> tuple[Outcome, list[bytes] | None]:
        """The outcome without its patches, and the patches as files. fits: the names of the packed ones."""
        if self.read[0] != fits:  # the next shard under the same edits reads them no second time
            self.read = (fits, _unpacked(packed))
        outcome = self.worker.do(job, Given(unedited, self.read[1], fits))
        files = [patch.to_bytes() for patch in outcome.patches] if job.kind in MAKING else None
        return replace(outcome, patches=()), files


def _unpacked(packed: Sequence[list[bytes]]) -> tuple[Patch, ...]:
    return tuple(Patch.from_bytes(file) for files in packed for file in files)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ConfigError("--engine ray needs the ray package; pip install 'errata[ray]'") from None
    return ray


def _answers(address: str | None) -> None:
    """Raises ConfigError unless something listens at the address of a cluster; names that Ray resolves by itself pass."""
    if address in (None, "auto", "local"):
        return
    host, _, port = str(address).rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"expected the address of a Ray cluster as HOST:PORT or ray://HOST:PORT, found {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or "no answer"
        raise ConfigError(
            f"no Ray cluster at {address}: {why}; start one there with `ray start --head`, or leave --address out"
        ) from None


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; disconnected afterwards unless it was connected before. Raises ConfigError."""
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    _answers(address)
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except (
        ConnectionError,
        RuntimeError,
        ValueError,
        SystemExit,
    ) as error:  # Ray exits where what answers is no cluster
        why = "what answers there is no cluster" if isinstance(error, SystemExit) else str(error)
        raise ConfigError(f"no Ray cluster at {address}: {why}; start one with `ray start --head`") from None
    try:
        yield ray
    finally:
        ray.shutdown()
