"""The editing methods, one file each. A method is found by its file's name, then among installed entry points."""

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from errata.editor import Editor
from errata.errors import UnknownEditorError

GROUP = "errata.editors"


def available_editors() -> dict[str, str]:
    """Every method by name, with the module that provides it; nothing heavy is imported."""
    own = {m.name: f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
    return {e.name: e.value for e in entry_points(group=GROUP)} | own


def get_editor(name: str) -> type[Editor[Any]]:
    """The editor class of a method: from the file of that name, else from the entry-point group `errata.editors`.

    Raises UnknownEditorError naming near matches.
    """
    known = available_editors()
    if name in {m.name for m in pkgutil.iter_modules(__path__)} and not name.startswith("_"):
        return _class_in(importlib.import_module(f"{__name__}.{name}"), name)
    for point in entry_points(group=GROUP, name=name):
        found = point.load()
        return found if isinstance(found, type) else _class_in(found, name)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"
    raise UnknownEditorError(f"there is no editing method {name!r}; {hint}")


def _class_in(module: Any, name: str) -> type[Editor[Any]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Editor) and getattr(value, "method", None) == name:
            return value
    raise UnknownEditorError(f"{module.__name__} has no Editor class whose `method` is {name!r}; set it on the class")
