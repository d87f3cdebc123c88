"""A run on disk, and the cache of patches that runs share.

A run's directory holds `run.json` (what was asked for), `units/<unit>.parquet` (rows), `fits/<unit>.parquet`, `speeds/<method>.json`,
`parts/<part>.json` (what a preset makes besides) and, once all is done, `summary.json`. Every file is whole or absent, so a run
that was killed goes on with the units that it lacks.
"""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import errata
from errata.edit import EditRequest
from errata.editor import Editor
from errata.editors._learned import LearnedEditor
from errata.errors import ConfigError, PatchFormatError
from errata.files import cache_directory, temporaries, write_atomically
from errata.model.attached import unmerged
from errata.model.fingerprint import base_of, weights_hash
from errata.patch import Patch, load_patch
from errata.scope.gate import gate_for

CACHE_LIMIT = 4 << 30  # bytes
# Of the package's folders those on which no fit's numbers depend: what they hold reaches a fit as requests only; and those on
# which no row depends.
_NOT_IN_FITS = ("atlas", "bench", "cli")
NOT_IN_ROWS = ("atlas", "cli")


class RunDirectory:
    """One run's files."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The directory's name: the `run` of its rows."""
        return self.path.resolve().name

    def read(self) -> dict[str, Any]:
        """`run.json`. Raises ConfigError if there is none."""
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} is not a run of `errata bench`: no readable run.json ({error})") from None
        return found

    def begin(self, spec: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
        """Write `run.json`, or find that it asks for the same; whether there was an earlier start. What killed processes were
        writing is removed.

        spec: what decides the rows; about: what else is kept (command, versions, machine, time). Raises ConfigError naming
        the first difference if the directory holds another run, or things that are no run's.
        """
        spec = json.loads(json.dumps(spec))
        begun = (self.path / "run.json").exists()
        half = [path for path in temporaries(self.path) if begun or path.name.startswith(".run.json.")]
        if begun:
            if (found := difference(self.read()["spec"], spec)) is not None:
                raise ConfigError(
                    f"{self.path} holds another run ({found}); name another directory, or repeat its command"
                )
        elif self.path.exists() and set(self.path.iterdir()) - set(half):
            raise ConfigError(f"{self.path} holds other files and no run; name a new or an empty directory")
        for path in half:
            path.unlink(missing_ok=True)
        if not begun:
            self.write_json("run.json", {"spec": spec, **about, "resumed": []})
        return begun

    def go_on(self, about: Mapping[str, Any]) -> None:
        """Keep a further start beside the first one; the run is not finished any more."""
        there = self.read()
        there.pop("finished", None)
        self.write_json("run.json", there | {"resumed": [*there["resumed"], dict(about)]})

    def note(self, **facts: Any) -> None:
        """Add to what is kept of the latest start."""
        there = self.read()
        (there["resumed"][-1] if there["resumed"] else there).update(facts)
        self.write_json("run.json", there)

    def finished(self) -> bool:
        """Whether the run was done to its end, summary and all."""
        return "finished" in self.read() and (self.path / "summary.json").exists()

    def finish(self, summary: Mapping[str, Any], finished: str) -> None:
        """Write `summary.json` and the time into `run.json`."""
        self.write_json("summary.json", summary)
        self.write_json("run.json", self.read() | {"finished": finished})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def has(self, unit: str) -> bool:
        """Whether a unit's rows are there."""
        return (self.path / "units" / f"{unit}.parquet").exists()

    def has_fits(self, unit: str) -> bool:
        """Whether a unit's fits are there."""
        return (self.path / "fits" / f"{unit}.parquet").exists()

    def write(self, unit: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a unit's rows, whole or not at all."""
        from errata.bench.rows import SCHEMA, write_rows

        write_rows(self.path / "units" / f"{unit}.parquet", rows, SCHEMA)

    def write_fits(self, unit: str, fits: Sequence[Mapping[str, Any]]) -> None:
        """Write a unit's fits, whole or not at all."""
        from errata.bench.rows import FITS, write_rows

        write_rows(self.path / "fits" / f"{unit}.parquet", fits, FITS)

    def write_part(self, name: str, value: Any) -> None:
        """Write the JSON values of a part that a preset makes besides, whole or not at all."""
        write_atomically(self._part(name), json.dumps(value, ensure_ascii=False, default=str) + "\n")

    def has_part(self, name: str) -> bool:
        """Whether a part is there."""
        return self._part(name).exists()

    def part(self, name: str) -> Any:
        """The JSON values of a part."""
        return json.loads(self._part(name).read_text(encoding="utf-8"))

    def _part(self, name: str) -> Path:
        return self.path / "parts" / f"{name}.json"

    def answers(self, unit: str) -> dict[tuple[str, int], str]:
        """{(case, probe): greedy answer} of an unedited unit."""
        import pyarrow.parquet as pq

        columns = pq.read_table(self.path / "units" / f"{unit}.parquet", columns=["case", "probe", "unedited"])
        return {
            (row["case"], row["probe"]): row["unedited"] for row in columns.to_pylist() if row["unedited"] is not None
        }

    def fits(self) -> list[dict[str, Any]]:
        """All fits so far, one for each method and case."""
        import pyarrow.parquet as pq

        paths = sorted((self.path / "fits").glob("[!.]*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process works on this run. Raises ConfigError if one does. A killed process holds no lock."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"another process is at work on the run in {self.path}; wait for it") from None
            yield
        finally:
            os.close(folder)


def other_sources(about: Mapping[str, Any]) -> list[str]:
    """In words, what of a run's code differs between its first start and the further ones, by which its rows may differ too."""
    found = []
    for start in about.get("resumed", ()):
        before, now = ({"sources": one.get("sources"), **one.get("versions", {})} for one in (about, start))
        other = [
            f"{name} {now[name]} in place of {before[name]}"
            for name in now
            if before.get(name) and now[name] and now[name] != before[name]
        ]
        if other:
            found.append(f"begun {about.get('started')}, resumed {start.get('started')} with {', '.join(other)}")
    return found


def difference(there: Any, here: Any, where: str = "") -> str | None:
    """The first place where two JSON values differ, in words; None if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            found = difference(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
            if found is not None:
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return next((f for i, (a, b) in pairs if (f := difference(a, b, f"{where}[{i}]")) is not None), None)
    if there == here:
        return None
    names = (_brief(value) for value in (there, here))
    return "{} is {} there and {} here".format(where, *names)


def _brief(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, dict) and "label" in v for v in value):
        return ", ".join(v["label"] for v in value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """{label: a name for files}, the same for the same labels, all different."""
    found: dict[str, str] = {}
    for label in labels:
        name = re.sub(r"[^\w.+]+", "_", label).strip("_.") or "method"
        while name in (*found.values(), "unedited"):
            name += "_"
        found[label] = name
    return found


class PatchCache:
    """Patches by what they were fitted from: the model's weights bit for bit, the requests, the editor with its options and with
    what it reads besides (key statistics, what it has learned), the seed.

    folder: None is `patches` in the user's cache directory, False keeps and finds nothing. What was least recently used goes
    first when `limit` bytes are exceeded. digest: of the model and its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: str | Path | bool | None = None, limit: int = CACHE_LIMIT):
        if isinstance(folder, bool):
            self.folder = None if folder is False else cache_directory("patches")
        else:
            self.folder = Path(folder) if folder is not None else cache_directory("patches")
        self.limit = limit
        self._asked = model, tokenizer
        self._reads: dict[
            str, dict[str, Any]
        ] = {}  # what each editor was found to read, so that its files are searched once
        gate, base = gate_for(model, tokenizer), base_of(model, tokenizer)
        text = json.dumps([base, weights_hash(model)], sort_keys=True)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self._identity = {
            "model": self.digest,
            "name": str(getattr(model.config, "_name_or_path", "")) if base["quantised"] else "",
            "dtype": str(next(model.parameters()).dtype),
            "device": next(model.parameters()).device.type,
            "gate": gate.digest if gate else None,
            "code": code_digest(),
            "versions": [torch.__version__, transformers.__version__],
        }

    @cached_property
    def base(self) -> dict[str, Any]:
        """`base_of` the model, with every weight that a patch could touch."""
        model, tokenizer = self._asked
        with unmerged(model):
            return base_of(model, tokenizer, [name for name, _ in model.named_parameters()])

    def key(self, editor: Editor[Any], requests: Sequence[EditRequest], seed: int, before: str = "") -> str:
        """What one fit is kept under. before: the key of the last of the edits that were in the weights already."""
        config = json_config(editor)
        name = json.dumps([editor.method, config], sort_keys=True)
        if name not in self._reads:
            self._reads[name] = editor.reads(self._asked[0])
        about = {
            "method": editor.method,
            "config": config,
            "reads": self._reads[name],
            "files": _named_files(editor) | self._learned(editor),
            "requests": [request.id for request in requests],
            "seed": seed,
            "before": before,
            "source": "" if type(editor).__module__.startswith("errata.") else inspect.getsource(type(editor)),
        }
        text = json.dumps(self._identity | about, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]

    def _learned(self, editor: Editor[Any]) -> dict[str, str]:
        """The digest of what an editor that learns has learned, wherever its artefact lies."""
        if not isinstance(editor, LearnedEditor):
            return {}
        path = editor.artefact_path(*self._asked)
        return {"artefact": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}

    def find(self, key: str) -> Patch | None:
        """The patch, or None; a damaged file is none."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            patch = load_patch(path)
            os.utime(path)
        except (PatchFormatError, OSError):
            return None
        return patch

    def keep(self, key: str, patch: Patch) -> None:
        """Write a patch, whole or not at all; a cache that cannot be written is no reason to stop."""
        if self.folder is not None:
            with suppress(OSError):
                patch.save(self._path(key))

    def trim(self) -> int:
        """Remove the least recently used patches beyond the limit; how many."""
        files = [(p.stat(), p) for p in self.folder.glob("*/*.safetensors")] if self.folder else []
        total, removed = sum(stat.st_size for stat, _ in files), 0
        for stat, path in sorted(files, key=lambda found: found[0].st_mtime):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total, removed = total - stat.st_size, removed + 1
        return removed

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


def json_config(editor: Editor[Any]) -> dict[str, Any]:
    """An editor's configuration as JSON values."""
    from dataclasses import asdict

    found: dict[str, Any] = json.loads(json.dumps(asdict(editor.config), default=str))
    return found


def code_digest(without: Sequence[str] = _NOT_IN_FITS) -> str:
    """SHA-256 of the package's sources, without some of its folders; by default of those that a fit runs through."""
    root = Path(errata.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json")):
        if path.relative_to(root).parts[0] in without:
            continue
        sha.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def _named_files(editor: Editor[Any]) -> dict[str, str]:
    """Digests of the files that a configuration names: gates, statistics, texts."""
    paths = [Path(v) for v in _leaves(json_config(editor)) if isinstance(v, str) and len(v) < 1000 and "\0" not in v]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _leaves(value: Any) -> Iterator[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inside is None:
        yield value
    else:
        for one in inside:
            yield from _leaves(one)
