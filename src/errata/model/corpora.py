"""Texts for statistics: text files, a data set of the `datasets` package, or any iterable of strings."""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from errata.errors import ConfigError


@dataclass(frozen=True)
class Texts:
    """A corpus. name: for people and cache keys; read: gives the texts in order, the same at every call.

    revision: a string that changes whenever the texts may have; None if there is none to trust, and then the texts
    themselves are digested. With a revision, cached statistics are found without reading a text.
    """

    name: str
    read: Callable[[], Iterable[str]]
    revision: str | None = None

    def first(self, n: int | None = None) -> list[str]:
        """The first `n` texts that are not blank; all of them for None."""
        return list(islice((text for text in self.read() if text.strip()), n))


def as_texts(corpus: Texts | Iterable[str]) -> Texts:
    """The corpus itself, or strings as one without a revision. Raises ConfigError for a single string."""
    if isinstance(corpus, Texts):
        return corpus
    if isinstance(corpus, str):
        raise ConfigError(f"expected texts, found the one string {corpus[:40]!r}; put it in a list, or read the file.")
    strings = corpus
    return Texts("texts", lambda: strings)


def digest(texts: Sequence[str]) -> str:
    """ "sha256:…" of the texts, their order and their boundaries."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return f"sha256:{sha.hexdigest()}"


def file_texts(paths: Sequence[str | os.PathLike[str]]) -> Texts:
    """UTF-8 files, one text a line, file after file. Reading raises OSError, or ConfigError for another encoding."""

    def read() -> Iterator[str]:
        for path in paths:
            try:
                with open(path, encoding="utf-8") as lines:
                    yield from (line.rstrip("\r\n") for line in lines)
            except UnicodeDecodeError as error:
                raise ConfigError(f"expected UTF-8 texts, one a line, in {Path(path)}: {error}") from None

    return Texts("files", read)


def named_texts(names: Sequence[str], revision: str | None = None) -> Texts:
    """Text files, or one data set as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT. Raises ConfigError for files that are missing."""
    if all(Path(name).is_file() for name in names):
        return file_texts(names)
    missing = [name for name in names if not Path(name).is_file()]
    if len(names) > 1 or Path(missing[0]).suffix == ".txt":
        raise ConfigError(f"expected text files, found none at {', '.join(missing)}")
    name, _, rest = missing[0].partition(":")
    config, _, split = rest.partition(":")
    return dataset_texts(name, config=config or None, split=split or "train", revision=revision)


def own_texts(model: Any) -> Texts | None:
    """The corpus that a model was trained on, where this package holds it: Atlas's (its directory has a recipe); else None."""
    recipe = Path(str(getattr(model.config, "_name_or_path", ""))) / "recipe.json"
    if not recipe.is_file():
        return None
    return _atlas_texts(json.loads(recipe.read_text(encoding="utf-8")).get("architecture", "gpt2"))


@lru_cache(maxsize=2)
def _atlas_texts(architecture: str) -> Texts:
    """Written once in a process: every fit of weights that stands alone asks for them, and writing takes half a second."""
    texts: Texts = import_module("errata.atlas.texts").atlas_texts(architecture=architecture)
    return texts


def dataset_texts(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    revision: str | None = None,
    seed: int = 1,
) -> Texts:
    """A data set by its name on the hub or its directory, in a pseudo-random order fixed by `seed`.

    ROME's statistics are over the first 100,000 of Wikipedia's articles, shuffled by `random.Random(1)`. A `revision` that
    is a full commit id names the texts for good; a branch or a tag does not.
    Reading raises ConfigError without the datasets package, or if there is no such data set, split or column.
    """

    def read() -> Iterator[str]:
        rows = _load(name, config, split, revision)
        if column not in rows.column_names:
            raise ConfigError(f"expected a column {column!r} in {name!r}, found {', '.join(rows.column_names)}.")
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        for i in order:
            yield str(rows[i][column] or "")

    full = ":".join((name, config or "", split, column, str(seed)))
    pinned = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and not Path(name).exists() else None
    return Texts(full, read, pinned)


def _load(name: str, config: str | None, split: str, revision: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"expected the datasets package to read {name!r}, found none; pip install 'errata[datasets]', or give text files."
        ) from None
    try:
        return load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # what it raises for names, configurations, splits and networks
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(
            f"expected a data set called {name!r} with a split {split!r}, found none: {reason}."
        ) from error
