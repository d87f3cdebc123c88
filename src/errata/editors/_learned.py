"""What the editors that learn to edit share: training that goes on where it stopped, and the artefact that `fit` loads.

A method says what is trained (`learner`) and what a fit makes of it; here are the loop, the checkpoint and the file. Batches
are functions of (seed, step) and the optimisers' states are kept, so a run that was stopped ends in the same weights as one
that was not. The artefact is one safetensors file with a JSON header: config, base, steps and figures; no pickle.
"""

import hashlib
import json
import random
import shlex
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from errata.editor import Editor, Progress, quiet
from errata.editors._value_search import _without_gradients
from errata.errors import BaseMismatchError, ConfigError
from errata.files import cache_directory, write_atomically
from errata.model.attached import unmerged
from errata.model.fingerprint import base_of, check_base
from errata.model.loading import bundled, is_atlas
from errata.patch import _digest, _sorted
from errata.training import TrainingItem, digest

KEEP_SECONDS = 60.0  # between two checkpoints
Watch = Callable[[int, dict[str, float]], None]
"""Called with the steps made and the figures of a validation."""


@dataclass(frozen=True)
class LearnedConfig:
    """What every editor that learns has.

    artefact: the file that a fit loads; None for the default place, beside the model or in the user's cache. name: what the
    artefact is called, None for the method's name, so that two trainings of a method stand side by side. steps: of training;
    batch: items in a step; lr; every: steps between validations; held_out: prompts kept for validation, never trained on.
    """

    artefact: str | None = None
    name: str | None = None
    steps: int = 2000
    batch: int = 8
    lr: float = 1e-3
    every: int = 200
    held_out: int = 64

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.lr, self.every) <= 0 or self.held_out < 0:
            raise ConfigError(f"expected steps, batch, lr and every above 0 and held_out of at least 0, found {self}")


class Learner:
    """What is trained, and how one step goes. Tensors of `module`, the states of `optimisers` and `notes` are what a run is.

    module: everything that the artefact holds, parameters and buffers; optimisers: by name; notes: other numbers that change
    while it is trained (margins, say), JSON values.
    """

    module: nn.Module
    optimisers: Mapping[str, torch.optim.Optimizer] = {}
    notes: dict[str, Any] = {}

    @abstractmethod
    def step(self, number: int) -> float:
        """Make one step, counted from 0: a function of the state and the number alone. Returns its loss."""

    def validate(self) -> dict[str, float]:
        """Figures on the items that are held out; may change `notes`."""
        return {}

    # -- the state as tensors ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a later run goes on from; the notes aside."""
        found = {f"module.{name}": t for name, t in self.module.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for i, state in optimiser.state_dict()["state"].items():
                found |= {f"optimiser.{name}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return {name: t.detach().cpu().contiguous().clone() for name, t in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        own = {n.removeprefix("module."): t for n, t in tensors.items() if n.startswith("module.")}
        self.module.load_state_dict(own)
        for name, optimiser in self.optimisers.items():
            states: dict[int, dict[str, Tensor]] = {}
            for full, value in tensors.items():
                if full.startswith(f"optimiser.{name}."):
                    i, key = full.removeprefix(f"optimiser.{name}.").split(".", 1)
                    states.setdefault(int(i), {})[key] = value
            optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})


C = TypeVar("C", bound=LearnedConfig)


class LearnedEditor(Editor[C]):
    """An editor that is trained before it edits: `train` writes an artefact, `fit` loads it.

    fit_only: options that say nothing about the training; all others are those that the artefact was trained with. reads_rewrites:
    whether it is made for counterfactual rewrites under any name, and not for questions.
    """

    learns: ClassVar[bool] = True
    fit_only: ClassVar[tuple[str, ...]] = ("artefact",)
    reads_rewrites: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What the artefact is called."""
        return self.config.name or self.method

    @property
    def rewrites(self) -> bool:
        """Whether counterfactual rewrites are what it is trained on where nothing else is named: by its kind, or as "-cf"."""
        return self.reads_rewrites or self.name.endswith("-cf")

    # -- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def learner(
        self, model: Any, tokenizer: Any, items: Sequence[TrainingItem], held_out: Sequence[TrainingItem], seed: int
    ) -> Learner:
        """What is to be trained for this model, from the seed. Called, as its steps are, with the model frozen and unpatched."""

    def edited_weights(self, model: Any, config: C) -> list[str]:
        """Names of the weights that its edits change: the artefact is for a model that has the same ones."""
        return []

    def train(
        self,
        model: Any,
        tokenizer: Any,
        items: Sequence[TrainingItem],
        out: Path,
        *,
        seed: int = 0,
        minutes: float | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Path:
        """Train on the items and write `out/<name>.safetensors`; goes on from the checkpoint in `out` if there is one.

        minutes: stop after so long, with a checkpoint and an artefact of what has been learnt; the same call goes on later.
        progress: called with (steps made, steps in all); watch: with each validation's figures. Model and random state stay.
        Raises ConfigError for too few items, or a checkpoint of another training; UnsupportedModelError, AnatomyError.
        """
        self.check_model(model)
        training, held_out = _parted(items, self.config.held_out, seed)
        identity = {
            "method": self.method, "config": self._trained_config(), "seed": seed,
            "items": {"n": len(items), "digest": digest(items)}, "base": base_of(model, tokenizer, self.edited_weights(model, self.config)),
        }  # fmt: skip
        path, checkpoint = out / f"{self.name}.safetensors", out / f"{self.name}.checkpoint"
        with quiet(model), _without_gradients(model), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every device's generator
            learner = self.learner(model, tokenizer, training, held_out, seed)
            step, curve, spent = _resume(checkpoint, identity, learner, model, tokenizer)
            total, started, kept = self.config.steps, time.perf_counter(), time.perf_counter()

            def keep() -> None:
                state = {"step": step, "curve": curve, "seconds": seconds(), "notes": learner.notes}
                write_atomically(checkpoint, artefact_bytes(identity | state, learner.tensors()))

            def seconds() -> float:
                return round(spent + time.perf_counter() - started, 1)

            while step < total:
                if minutes is not None and time.perf_counter() - started > 60 * minutes:
                    break
                with torch.enable_grad():
                    loss = learner.step(step)
                step += 1
                if step % self.config.every == 0 or step == total:
                    curve.append({"step": step, "loss": round(loss, 6)} | learner.validate())
                    if watch is not None:
                        watch(step, curve[-1])
                if progress is not None:
                    progress(step, total)
                if time.perf_counter() - kept > KEEP_SECONDS:
                    keep()
                    kept = time.perf_counter()
            keep()
            header = identity | {"name": self.name, "steps": step, "curve": curve, "seconds": seconds()}
            weights = {n: t.detach().cpu().contiguous().clone() for n, t in learner.module.state_dict().items()}
        write_atomically(path, artefact_bytes(header, weights))
        return path

    def recorded(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The artefact's configuration with this one's options of a fit; where the artefact lies is nobody else's business."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self.trained(model, tokenizer)[0])))
        return plain | {"artefact": None}

    def _trained_config(self) -> dict[str, Any]:
        found = {k: v for k, v in asdict(self.config).items() if k not in self.fit_only}
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    # -- the artefact ------------------------------------------------------------------------------------------------

    def artefact_path(self, model: Any, tokenizer: Any) -> Path:
        """The artefact's path: the config's, else beside the model if it is there, else in the user's cache."""
        if self.config.artefact is not None:
            return Path(self.config.artefact).expanduser()
        beside = Path(str(getattr(model.config, "_name_or_path", ""))) / f"errata-{self.name}.safetensors"
        return beside if beside.is_file() else default_folder(model, tokenizer) / f"{self.name}.safetensors"

    def trained(self, model: Any, tokenizer: Any) -> tuple[C, dict[str, Any], dict[str, Tensor]]:
        """(this config as the artefact was trained with it, the artefact's header, its tensors).

        Edits merged into the model are left out of account. The file is read once for a model. Raises ConfigError that names the
        command where there is no artefact, or it is another method's or damaged; BaseMismatchError for another model's.
        """
        known: _Known[C] | None = vars(self).get("_known")
        if known is None or not known.serves(model, tokenizer):
            with unmerged(model):
                path = self.artefact_path(model, tokenizer)
                found = self._read(path, model, tokenizer)
            known = _Known(path, path.stat().st_mtime_ns, weakref.ref(model), weakref.ref(tokenizer), found)
            vars(self)["_known"] = known
        return known.found

    def _command(self, model: Any) -> str:
        """The command that trains this editor on this model, by the preset for both, else by one with its options, else by these.

        Only Atlas's models have a set of their own; others name a FILE.
        """
        place = str(getattr(model.config, "_name_or_path", "")) or "MODEL"
        name = next((name for name, folder in bundled().items() if str(folder) == place), place)
        options = self._trained_config()
        own = name + self.name.removeprefix(self.method)
        same = (p for p, changes in self.presets.items() if type(self)(**changes)._trained_config() == options)
        preset = own if own in self.presets else next(same, None)
        words = ["errata", "train", self.method, "--model", name, *([] if is_atlas(name) else ["--data", "FILE"])]
        if preset is not None:
            return shlex.join([*words, "--preset", preset])
        plain = type(self)()._trained_config()
        for k, v in options.items():
            if v != plain[k]:
                words += ["--set", f"{k}={v if isinstance(v, str) else json.dumps(v)}"]
        return shlex.join(words)

    def _read(self, path: Path, model: Any, tokenizer: Any) -> tuple[C, dict[str, Any], dict[str, Tensor]]:
        command = self._command(model)
        if not path.is_file():
            raise ConfigError(
                f"{self.name} learns to edit before it can, and there is no artefact for this model at {path}; run `{command}`, or "
                "name the file with artefact="
            )
        header, tensors = read_artefact(path)
        if header.get("method") != self.method:
            raise ConfigError(f"expected an artefact of {self.method}, found one of {header.get('method')} in {path}")
        try:
            check_base(header["base"], model, tokenizer)
        except BaseMismatchError as error:
            first = str(error).partition(";")[0].replace("the patch was fitted", "this editor was trained")
            raise BaseMismatchError(f"{path} is for another model: {first}; run `{command}`") from None
        known = {f.name for f in fields(self.config)} - set(self.fit_only)
        values = {k: _tuples(v) for k, v in header["config"].items() if k in known}
        return replace(self.config, **values), header, tensors


@dataclass(frozen=True)
class _Known(Generic[C]):
    """What was read from an artefact for a model, which it was checked against then."""

    path: Path
    written: int
    model: "weakref.ref[Any]"
    tokenizer: "weakref.ref[Any]"
    found: tuple[C, dict[str, Any], dict[str, Tensor]]

    def serves(self, model: Any, tokenizer: Any) -> bool:
        """Whether it is of this model, and the file is still the one that was read."""
        same = self.model() is model and self.tokenizer() is tokenizer
        return same and self.path.is_file() and self.path.stat().st_mtime_ns == self.written


def default_folder(model: Any, tokenizer: Any) -> Path:
    """Where in the user's cache the artefacts for a model are."""
    text = json.dumps(base_of(model, tokenizer), sort_keys=True)
    return cache_directory("editors") / hashlib.sha256(text.encode()).hexdigest()[:12]


class Batches:
    """Items in an order that is shuffled anew each epoch: the batch of a step depends on the seed and the step only."""

    def __init__(self, n: int, batch: int, seed: int):
        self.n, self.batch, self.seed = n, batch, seed
        self._epoch, self._order = -1, list[int]()

    def at(self, number: int) -> list[int]:
        """Indices of the items of step `number`."""
        found = []
        for place in range(number * self.batch, (number + 1) * self.batch):
            epoch, at = divmod(place, self.n)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(self.n))
                random.Random(f"{self.seed}|{epoch}").shuffle(self._order)
            found.append(self._order[at])
        return found

    def draws(self, number: int) -> random.Random:
        """What else is random in step `number`."""
        return random.Random(f"{self.seed}|step|{number}")


def _parted(items: Sequence[TrainingItem], n: int, seed: int) -> tuple[list[TrainingItem], list[TrainingItem]]:
    """(items to train on, one item for each of `n` prompts that are held out). Raises ConfigError if none are left."""
    prompts = list(dict.fromkeys(item.prompt for item in items))
    random.Random(f"{seed}|held out").shuffle(prompts)
    chosen = set(prompts[:n])
    kept = [item for item in items if item.prompt not in chosen]
    if not kept:
        raise ConfigError(
            f"expected training items about more than the {n} prompts that are held out, found {len(prompts)} prompts; give more items "
            "or lower held_out"
        )
    first = {item.prompt: item for item in reversed(items)}
    return kept, [first[prompt] for prompt in prompts[:n]]


def _resume(
    path: Path, identity: dict[str, Any], learner: Learner, model: Any, tokenizer: Any
) -> tuple[int, list[dict[str, Any]], float]:
    """(steps made, the curve, seconds spent) of a checkpoint, which the learner takes up; of none, from the beginning.

    Raises ConfigError for a checkpoint of another training.
    """
    if not path.is_file():
        return 0, [], 0.0
    header, tensors = read_artefact(path)
    same = {key: header.get(key) == json.loads(json.dumps(value)) for key, value in identity.items()}
    try:
        check_base(header["base"], model, tokenizer)
        same["base"] = True  # by what the checkpoint names, as an artefact is judged
    except BaseMismatchError:
        same["base"] = False
    if other := [key for key, kept in same.items() if not kept]:
        raise ConfigError(
            f"{path} is of a training with another {other[0]}; repeat its command to go on with it, or name another folder"
        )
    learner.load(tensors)
    learner.notes = header["notes"]
    return header["step"], header["curve"], header["seconds"]


# -- the file --------------------------------------------------------------------------------------------------------------

FORMAT = "errata.editor"
FORMAT_VERSION = 1


def artefact_bytes(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A header (JSON values) and tensors as one safetensors file, with a checksum over both."""
    about = header | {"format": FORMAT, "format_version": FORMAT_VERSION, "content": _digest(tensors)}
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    return _sorted(
        save_tensors(tensors, metadata={"errata": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    )


def read_artefact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `artefact_bytes` wrote. Raises ConfigError for a file that is something else, damaged, or of a later version."""
    try:
        data = path.read_bytes()
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        text, tensors = metadata["errata"], load_tensors(data)
        header = json.loads(text)
        sealed = hashlib.sha256(text.encode()).hexdigest() == metadata["sha256"] and header["content"] == _digest(
            tensors
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not an artefact that `errata train` wrote, or is damaged: {error}; train again"
        ) from None
    if not sealed or header.get("format") != FORMAT:
        raise ConfigError(f"{path} has been altered since it was written, or is no editor's artefact; train again")
    if header.get("format_version", 0) > FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {header['format_version']}, this errata reads {FORMAT_VERSION}; update errata"
        )
    return header, tensors


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
