"""Finished traces in a file of JSON lines, so that a long run goes on where it stopped."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errata.errors import ConfigError
from errata.files import write_atomically
from errata.locate.facts import KnownFact
from errata.locate.tracing import Dropped, Trace, TracingConfig


class TraceRows:
    """Outcomes by configuration and fact, under a first line `about`: everything else that changes them.

    The file is read at once and written whole: now and then by `add` (which never costs a tenth of the time), and by
    `keep`. path: None keeps nothing. Raises ConfigError for a file begun with another `about`, or one that is none.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path, self._head = path, json.dumps({"errata": "trace", **about}, sort_keys=True, ensure_ascii=False)
        self._found: dict[str, Trace | Dropped] = {}
        self._lines: list[str] = []
        self._kept, self._last, self._cost = 0, time.perf_counter(), 0.0
        if path and path.exists():
            self._read(path)
        self._kept = len(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, config: TracingConfig, fact: KnownFact) -> Trace | Dropped | None:
        """What there is for this fact, or None."""
        return self._found.get(_key(config, fact))

    def add(self, config: TracingConfig, fact: KnownFact, outcome: Trace | Dropped) -> None:
        """Put an outcome into the file."""
        if not self._path:
            return
        value = outcome.json() if isinstance(outcome, Trace) else asdict(outcome)
        self._lines.append(json.dumps({"key": _key(config, fact), "outcome": value}, ensure_ascii=False))
        if time.perf_counter() - self._last >= 1 + 10 * self._cost:
            self.keep()

    def keep(self) -> None:
        """Write the file, if there is anything new."""
        if not self._path or len(self._lines) == self._kept:
            return
        began = time.perf_counter()
        write_atomically(self._path, "".join(f"{line}\n" for line in (self._head, *self._lines)))
        self._kept, self._last = len(self._lines), time.perf_counter()
        self._cost = self._last - began

    def _read(self, path: Path) -> None:
        try:
            head, *self._lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
            about = json.loads(head)
            entries = [json.loads(line) for line in self._lines]
            self._found = {entry["key"]: _outcome(entry["outcome"]) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not a file of traces ({type(error).__name__}: {error}); name another."
            ) from None
        if about != json.loads(self._head):
            raise ConfigError(
                f"{path} was begun with another model, noise or rule; give the command that it was begun with, "
                "or name another file."
            )


def _key(config: TracingConfig, fact: KnownFact) -> str:
    fields = {name: value for name, value in asdict(config).items() if name != "batch_tokens"}
    return json.dumps([fields, asdict(fact)], sort_keys=True, ensure_ascii=False)


def _outcome(value: dict[str, Any]) -> Trace | Dropped:
    return Trace.of(value) if "restored" in value else Dropped(KnownFact(**value["fact"]), value["reason"])
