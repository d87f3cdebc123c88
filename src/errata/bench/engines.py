"""Engines: who does a run's jobs. `local` is this process; `ray` spreads them over a Ray cluster, one model per worker.

Jobs are fixed by the run, so both give the same texts and decisions, and floats that differ by rounding only. The driver writes
all results; a Ray worker that dies takes no result with it, and its job is given to another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from errata.bench.cases import Case, Probe
from errata.bench.preset import Method
from errata.bench.store import PatchCache
from errata.bench.worker import Given, Job, Outcome, Worker
from errata.errors import ConfigError
from errata.patch import Patch

LIVES = 3  # workers that may die over one job before the job is held to kill them


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker elsewhere needs to make a `Worker` of its own."""

    model_name: str
    dtype: str | None
    device_map: str | None
    cases: tuple[Case, ...]
    world: tuple[Probe, ...]
    methods: tuple[Method, ...]
    seed: int
    cache: str | Path | bool | None

    def worker(self) -> Worker:
        """Load the model and make the worker."""
        from errata.model.loading import load

        model, tokenizer = load(self.model_name, dtype=self.dtype, device_map=self.device_map)
        cache = PatchCache(model, tokenizer, self.cache)
        return Worker(model, tokenizer, self.cases, self.world, self.methods, seed=self.seed, cache=cache)


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

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job, each after those that it needs (what `jobs` lacks is done), and hand each outcome to `take`."""


@dataclass(frozen=True)
class LocalEngine:
    """Everything in this process, job after job."""

    name: str = "local"
    workers: int = 1

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job in order."""
        for job in jobs:
            take(job, local.do(job, give(job)))


@dataclass
class RayEngine:
    """Jobs over a Ray cluster. address: of a running one; None starts one on this machine. count: workers, as many as fit by
    default. threads: CPU cores, and torch threads, for each worker. Workers with a device map take one GPU each.
    """

    address: str | None = None
    count: int | None = None
    threads: int = 1
    name: str = "ray"
    workers: int = field(default=1, init=False)

    def run(self, jobs: Sequence[Job], give: Give, take: Take, plan: WorkerPlan, local: Worker) -> None:
        """Do every job; those whose needs are done, in order, on whichever worker is free. Raises ConfigError without Ray,
        or for a job over which `LIVES` workers have died.
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
        self.waiting = list(jobs)
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
            fits = tuple(name for name in job.needs if name in self.patches)
            actor = self.idle.pop()
            ref = actor.do.remote(job, given.unedited, fits, *(self.patches[name] for name in fits))
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
        self.worker = plan.worker()
        self.read: tuple[tuple[str, ...], tuple[Patch, ...]] = ((), ())

    def ready(self) -> None:
        """Return once the model is loaded."""

    def do(
        self, job: Job, unedited: dict[tuple[str, int], str], fits: tuple[str, ...], *packed: list[bytes]
    ) -> tuple[Outcome, list[bytes] | None]:
        """The outcome without its patches, and the patches as files. fits: the names of the packed ones."""
        if self.read[0] != fits:  # the next shard under the same edits reads them no second time
            self.read = (fits, _unpacked(packed))
        outcome = self.worker.do(job, Given(unedited, self.read[1]))
        files = [patch.to_bytes() for patch in outcome.patches] if job.kind in ("fit", "chain") else None
        return replace(outcome, patches=()), files


def _unpacked(packed: Sequence[list[bytes]]) -> tuple[Patch, ...]:
    return tuple(Patch.from_bytes(file) for files in packed for file in files)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; disconnected afterwards unless it was connected before. Raises ConfigError."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ConfigError("--engine ray needs the ray package; pip install 'errata[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}; start one with `ray start --head`") from None
    try:
        yield ray
    finally:
        ray.shutdown()
