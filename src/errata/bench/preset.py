"""Presets: which cases, which methods, and what is made of the rows. One file each in `presets/`, found by its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.bench.cases import Case, Probe

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

Setting = Literal["single", "all", "sequential"]


@dataclass(frozen=True)
class Method:
    """A method as a run has it. label: its name in tables; editor: the method's file; setting: each edit alone on the model
    ("single"), all of them at once ("all"), or one after another on the model that the earlier ones left ("sequential").
    """

    label: str
    editor: str
    setting: Setting = "single"
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a preset may look at when it draws its cases. n: how many, None for the preset's own number."""

    model_name: str
    model: Any
    tokenizer: Any
    n: int | None = None
    seed: int = 0
    split: Literal["dev", "test"] = "test"
    data: str | None = None  # a data set instead of the preset's own


@dataclass(frozen=True)
class Preset:
    """A paper's table or figure, or one of ours.

    cases: the edits with their probes, a function of the context alone; methods: without the unedited model, which every run has;
    n: how many cases by default on Atlas, `published_n` on the papers' data. checkpoints: numbers of edits after which a
    sequential method is asked. world: probes of the whole run (collateral, unrelated text), asked of every method of
    setting "all" or "sequential". extra: further files, made once in the run's directory (traces, sweeps). tables, figures: of
    the run's rows and directory; a figure function writes PNG files and returns them with their captions.
    """

    name: str
    title: str
    source: str
    cases: Callable[[Context], Sequence[Case]]
    methods: tuple[Method, ...]
    tables: Callable[["DataFrame", Path], Sequence["Table"]]
    n: int = 100
    published_n: int | None = None
    checkpoints: tuple[int, ...] = ()
    world: Callable[[Context], Sequence[Probe]] | None = None
    extra: Callable[[Context, Path], None] | None = None
    figures: Callable[["DataFrame", Path], Sequence[tuple[Path, str]]] | None = None
