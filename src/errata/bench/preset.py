"""Presets: which cases, which methods, and what is made of the rows. One file each in `presets/`, found by its name."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.bench.cases import Case, Probe
from errata.errors import ConfigError, RequestError
from errata.model.anatomy import Role, anatomy
from errata.model.labels import label_id

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

Setting = Literal["single", "all", "sequential", "stream"]
STAGED: tuple[Setting, ...] = ("sequential", "stream")  # in which the same is asked again after more edits


@dataclass(frozen=True)
class Method:
    """A method as a run has it. label: its name in tables; editor: the method's file; setting: each edit alone on the model
    ("single"), all of them at once ("all"), one after another on the model that the earlier ones left ("sequential"), or so, but
    only what the model by then gets wrong ("stream", see `errata.bench.streams`).
    apart: of a sequence whose edits do not bear on each other's fits, as steering's do not, so that fits may be spread. most:
    how many of Atlas's cases it is given, the first ones, where no other number is asked for; of a stream, after how many edits
    it ends.
    """

    label: str
    editor: str
    setting: Setting = "single"
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Context:
    """What a preset may look at when it draws its cases. n: how many, None for the preset's own number.

    data_options: of the data set and of its loading, NAME: VALUE (`errata.bench.data.load_cases`). left_out: what the drawing adds to,
    {where it stands: why it was left out}.
    """

    model_name: str
    model: Any
    tokenizer: Any
    n: int | None = None
    seed: int = 0
    split: Literal["dev", "test"] = "test"
    data: str | None = None  # a data set instead of the preset's own
    data_options: Mapping[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Extra:
    """What a preset makes besides rows, in parts that are units of the run like its rows.

    parts: name -> what makes its JSON values, by whichever worker is free, in any order; combine: given all of them by name,
    writes the run's files.
    """

    parts: Mapping[str, Callable[[], Any]]
    combine: Callable[[Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Preset:
    """A paper's table or figure, or one of ours.

    cases: the edits with their probes, a function of the context alone; methods: without the unedited model, which every
    run has; n: how many cases by default on Atlas, `published_n` on the papers' data. checkpoints: numbers of edits after
    which a sequential method is asked. every, most: edits of a stream between two looks at it, and after which it ends.
    world: probes of the whole run (collateral, unrelated text), asked of every method of setting "all", "sequential" or
    "stream". extra: of the context, cases and methods, what is made besides (traces, states); other processes import it by
    its name. tables, figures: of the run's rows and directory; a figure function writes PNG files and returns them with
    their captions. roles: kinds of models (`model.anatomy`) that it is for; labels: what a classifier must have among its own. own_data: of
    a preset that takes no other data, which ones it has.
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
    every: int = 50
    most: int = 1000
    world: Callable[[Context], Sequence[Probe]] | None = None
    extra: Callable[[Context, Sequence[Case], Sequence[Method]], Extra] | None = None
    figures: Callable[["DataFrame", Path], Sequence[tuple[Path, str]]] | None = None
    roles: tuple[Role, ...] = ("decoder",)
    labels: tuple[str, ...] = ()
    own_data: str = ""


def unfit(preset: Preset, model: Any, data: str | None = None) -> str | None:
    """Why a preset is not for this model, or for the data set that it is given instead of its own; None if it is."""
    if data is not None and preset.own_data:
        return f"{preset.name} takes {preset.own_data} and has no --data"
    role = anatomy(model).role
    if role not in preset.roles:
        return f"{preset.name} is for models of the kind {' or '.join(preset.roles)}, found {type(model).__name__} ({role})"
    try:
        for name in preset.labels:
            label_id(model, name)
    except RequestError as error:
        return f"{preset.name} is for other labels: {str(error).rstrip('.')}"
    return None


def available_presets() -> list[str]:
    """The names of all presets, in order: `sake-counterfact` stands in `presets/sake_counterfact.py`."""
    from errata.bench import presets

    found = (m.name for m in pkgutil.iter_modules(presets.__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises ConfigError that lists what there is, near matches first."""
    known = available_presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}there are {', '.join(known) or 'none'}")
    module = importlib.import_module(f"errata.bench.presets.{name.replace('-', '_')}")
    return next(v for v in vars(module).values() if isinstance(v, Preset) and v.name == name)


def pick_methods(preset: Preset, names: Sequence[str]) -> tuple[Method, ...]:
    """The preset's methods with these labels; a name that is no label is an editor with the model's options, in the setting
    that most of the preset's methods have of those that write all edits at once, or of the others. A preset without methods
    has none to pick.

    Raises ConfigError that lists what there is, near matches first.
    """
    from errata.bench.methods import MODEL
    from errata.editors import available_editors

    labels, editors = {method.label: method for method in preset.methods}, available_editors()
    found = []
    for name in names:
        if name not in labels and name not in editors:
            near = difflib.get_close_matches(name, [*labels, *editors], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
            others = ", ".join(sorted(set(editors) - set(labels)))
            raise ConfigError(
                f"{preset.name} has no method {name!r}, and there is no editor of that name; {hint}"
                f"it has {', '.join(labels) or 'none'}; further editors are {others}"
            )
        found.append(labels.get(name) or Method(name, name, _setting(preset, name), MODEL))
    return tuple(found) if preset.methods else ()


def _setting(preset: Preset, editor: str) -> Setting:
    """The setting of an editor that the preset does not name."""
    if staged := [m.setting for m in preset.methods if m.setting in STAGED]:
        return staged[0]
    joint = _joint(editor, {})
    usual: Setting = "all" if joint else "single"
    like = [m.setting for m in preset.methods if _joint(m.editor, m.changes) == joint]
    return max((usual, *like), key=like.count)


def _joint(editor: str, changes: Mapping[str, Any]) -> bool:
    from errata.editors import get_editor

    kind = get_editor(editor)
    return kind.wrote_jointly({**asdict(kind().config), **changes})
