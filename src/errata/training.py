"""What an editor that learns to edit is trained on: rewrites, other wordings of them, and prompts that they must leave alone."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errata.errors import RecordError
from errata.files import write_atomically


@dataclass(frozen=True)
class TrainingItem:
    """One rewrite to practise on: `prompt` is to be answered by `target_new`, and so is each of `rephrases`.

    prompt: whole, with its subject in it. target_true: what the model says to it; None where that is not known (it is asked
    then). locality: (prompt, the model's answer or None) pairs that the rewrite must not change. A classifier's targets are
    names of labels. Raises RecordError for an empty prompt or target.
    """

    prompt: str
    target_new: str
    target_true: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.target_new.strip():
            raise RecordError(f"expected a prompt and a target_new, found {self.prompt!r} and {self.target_new!r}")

    @classmethod
    def of(cls, row: Any) -> "TrainingItem":
        """The item of a JSON object. Raises RecordError for one that is none."""
        try:
            texts = {name: row[name] for name in ("prompt", "target_new")} | {"target_true": row.get("target_true")}
            rephrases, locality = row.get("rephrases") or [], row.get("locality") or []
            if not all(isinstance(own, list | tuple) for own in (rephrases, locality, *locality)):
                raise TypeError("rephrases and locality are lists, and so are locality's pairs")
            rephrases, locality = tuple(rephrases), tuple((prompt, answer) for prompt, answer in locality)
            if not all(
                isinstance(t, str)
                for t in (texts["prompt"], texts["target_new"], *rephrases, *(p for p, _ in locality))
            ):
                raise TypeError("texts are strings")
            if not all(isinstance(answer, str | None) for answer in (texts["target_true"], *(a for _, a in locality))):
                raise TypeError("answers are strings or null")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(
                "expected an object with prompt, target_new, and perhaps target_true, rephrases [text, ...] and locality "
                f"[[prompt, answer], ...], found {row!r} ({error})"
            ) from None
        return cls(**texts, rephrases=rephrases, locality=locality)


def read_items(path: str | Path) -> list[TrainingItem]:
    """Items from JSONL, one a line. Raises RecordError naming the file and the line."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"cannot read the training items in {path}: {reason}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(TrainingItem.of(json.loads(line)))
            except (json.JSONDecodeError, RecordError) as error:
                raise RecordError(f"{path}, line {number}: {error}") from None
    return found


def write_items(path: str | Path, items: Iterable[TrainingItem]) -> None:
    """Write items as JSONL, whole or not at all."""
    write_atomically(path, "".join(f"{_json(item)}\n" for item in items))


def digest(items: Sequence[TrainingItem]) -> str:
    """Twelve hex digits that tell one list of items from another."""
    return hashlib.sha256("\n".join(map(_json, items)).encode()).hexdigest()[:12]


def _json(item: TrainingItem) -> str:
    return json.dumps(asdict(item), ensure_ascii=False)
