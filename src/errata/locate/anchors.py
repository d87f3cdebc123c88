"""Anchors: the mean state at which a model is about to say an object that it knows (STEAM's latent positioning).

Source: Jeong et al. 2025 (STEAM). Reference triples that share the object are put to the unedited model; of those that it
answers with the whole object a sample is drawn, stratified over relations, and their states are averaged layer by layer.
Where there is none, contexts that state the object stand in, if the model follows them.

Inferred, since the paper does not say: states are read at the prompt's last token, where the object's first token is
produced; `read="subject_last"` reads them at the subject's.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.locate.facts import KnownFact, read_rows
from errata.model.anatomy import Site, anatomy
from errata.model.hooks import Capture
from errata.model.room import check_room
from errata.model.states import evaluating, input_device
from errata.model.tokens import continuation_ids, pad, pad_id, subject_tokens, token_ids

Read = Literal["prompt_last", "subject_last"]
Strata = Literal["balanced", "matched"]
TRIED = 4  # candidates put to the model for each reference that is wanted


@dataclass(frozen=True)
class Reference:
    """A true triple in words: `prompt` names `subject` (in place of a `{}`, if it has one) and is completed by `object`.

    Several wordings of one triple are several references. Raises RequestError, SubjectNotFoundError.
    """

    subject: str
    relation: str
    object: str
    prompt: str

    def __post_init__(self) -> None:
        for name in ("relation", "object"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise RequestError(f"expected a reference's {name} to be a text, found {getattr(self, name)!r}.")
        object.__setattr__(self, "prompt", KnownFact(self.prompt, self.subject, self.object).prompt)


@dataclass(frozen=True)
class Wanted:
    """What an edit needs an anchor for. forced: contexts that make a model say the object, for want of references.

    edited: (subject, relation) of the facts that will no longer be true, and are no references for it.
    """

    object: str
    relation: str | None = None
    forced: tuple[Reference, ...] = ()
    edited: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, eq=False)
class Anchor:
    """states (layers, d) float32 on the CPU, the mean over the references `used`, or None without any.

    found: references with the object; tried: those put to the model; known: those of them that it answers.
    forced: how many of `used` are contexts that state the object.
    """

    states: Tensor | None
    found: int
    tried: int
    known: int
    used: tuple[Reference, ...] = field(default=(), repr=False)
    forced: int = 0

    def note(self) -> dict[str, Any]:
        """The numbers as JSON values, with how many of `used` are of each relation."""
        relations = dict(sorted(Counter(r.relation for r in self.used).items()))
        counts = {"found": self.found, "tried": self.tried, "known": self.known, "forced": self.forced}
        return counts | {"used": len(self.used), "relations": relations}


def read_references(path: str | Path) -> list[Reference]:
    """References from JSONL (one a line) or a JSON array of {subject, relation, object, prompt}; other keys do not count.

    Raises RequestError naming the file and the row.
    """
    found = []
    for number, row in read_rows(path):
        try:
            found.append(Reference(*(row.get(key, "") for key in ("subject", "relation", "object", "prompt"))))
        except ValueError as error:  # RequestError and SubjectNotFoundError
            raise RequestError(f"{path}, row {number}: {error}") from None
    if not found:
        raise RequestError(f"expected references in {path}, found none; write one {{subject, relation, ...}} a line.")
    return found


def anchors_for(
    model: Any,
    tokenizer: Any,
    wanted: Sequence[Wanted],
    references: Iterable[Reference],
    layers: Sequence[Site],
    *,
    count: int = 16,
    strata: Strata = "balanced",
    read: Read = "prompt_last",
    least: int = 4,
    seed: int = 0,
) -> list[Anchor]:
    """One anchor for each of `wanted`, read from the model as it is: it should carry no patch.

    count: references per anchor at most; strata: "balanced", relations take turns, the edit's own first; "matched", those
    of the edit's own relation first, others fill up. least: below so many known references, forced contexts fill up to it.
    A sample depends on the seed, the object and the relation alone; each reference is run once, whoever shares it.
    Raises ConfigError out of range, AnatomyError for a bad layer.
    """
    if count < 1 or not 0 <= least <= count or strata not in ("balanced", "matched"):
        raise ConfigError(
            f"expected a count of at least 1, least from 0 to count, and strata 'balanced' or 'matched', found {count}, "
            f"{least} and {strata!r}."
        )
    by_object: dict[str, list[Reference]] = {}
    for reference in dict.fromkeys(references):
        by_object.setdefault(_name(reference.object), []).append(reference)
    found = [_unedited(by_object.get(_name(w.object), []), w.edited) for w in wanted]
    tried = [stratified(own, w.relation, strata, seed)[: TRIED * count] for w, own in zip(wanted, found, strict=True)]
    asked = _Asked(model, tokenizer, layers, read)
    asked.ask(reference for own in tried for reference in own)
    known = [[r for r in own if asked.known[r]] for own in tried]
    asked.ask(r for w, own in zip(wanted, known, strict=True) if len(own) < least for r in w.forced)
    made = []
    for w, everything, some, own in zip(wanted, found, tried, known, strict=True):
        used = stratified(own, w.relation, strata, seed)[:count]
        forced = [r for r in w.forced if asked.known[r]][: least - len(used)] if len(used) < least else []
        states = asked.mean([*used, *forced]) if used or forced else None
        made.append(Anchor(states, len(everything), len(some), len(own), (*used, *forced), len(forced)))
    return made


def stratified(references: Sequence[Reference], relation: str | None, strata: Strata, seed: int = 0) -> list[Reference]:
    """All of the references in the order in which they are to be taken.

    Relations take turns (`balanced`), or `relation` comes first and the others take turns behind it (`matched`); within
    a relation every triple comes before a second wording of any. Random but for that, by the seed and the object.
    """
    groups: dict[str, dict[str, list[Reference]]] = {}
    for reference in sorted(set(references), key=lambda r: (r.relation, r.subject, r.prompt)):
        groups.setdefault(reference.relation, {}).setdefault(reference.subject, []).append(reference)
    rng = random.Random("|".join((str(seed), relation or "", *sorted({r.object for r in references}))))
    turns: dict[str, list[Reference]] = {}
    for name in rng.sample(list(groups), len(groups)):
        triples = [rng.sample(own, len(own)) for own in groups[name].values()]
        turns[name] = list(_in_turn(rng.sample(triples, len(triples))))
    own = turns.pop(relation, []) if relation is not None else []
    if strata == "matched":
        return [*own, *_in_turn(turns.values())]
    return list(_in_turn([own, *turns.values()]))


def _in_turn(rows: Iterable[Sequence[Reference]]) -> Iterator[Reference]:
    """The first of each row, then the second of each, and so on."""
    return (r for turn in zip_longest(*rows) for r in turn if r is not None)


def _unedited(references: Sequence[Reference], edited: Iterable[tuple[str, str | None]]) -> list[Reference]:
    about = {(_name(subject), relation) for subject, relation in edited}
    return [r for r in references if (_name(r.subject), r.relation) not in about]


def _name(text: str) -> str:
    return text.strip().casefold().removeprefix("the ")


class _Asked:
    """What the model says to references, and its states while it does: each is run once."""

    def __init__(self, model: Any, tokenizer: Any, layers: Sequence[Site], read: Read, batch_tokens: int = 1024):
        if read not in ("prompt_last", "subject_last") or not layers:
            raise ConfigError(
                f"expected read 'prompt_last' or 'subject_last' and at least one layer, found {read!r} and {layers!r}."
            )
        parts = anatomy(model)
        self.known: dict[Reference, bool] = {}
        self._states: dict[Reference, Tensor] = {}
        self._paths = [parts.site(layer) for layer in layers]
        self._model, self._tokenizer, self._read, self._batch_tokens = model, tokenizer, read, batch_tokens

    def mean(self, references: Sequence[Reference]) -> Tensor:
        """(layers, d) the mean of their states."""
        return torch.stack([self._states[reference] for reference in references]).mean(0)

    def ask(self, references: Iterable[Reference]) -> None:
        """One forward pass of each prompt with its object behind it: states, and whether every token would be said."""
        new = [r for r in dict.fromkeys(references) if r not in self.known]
        heads = token_ids(self._tokenizer, [r.prompt for r in new])
        tails = [continuation_ids(self._tokenizer, r.prompt, r.object) for r in new]
        rows = [head + tail[:-1] for head, tail in zip(heads, tails, strict=True)]
        check_room(self._model, rows, [r.prompt for r in new])
        order = iter(sorted(range(len(new)), key=lambda i: len(rows[i])))
        device = input_device(self._model)
        while chosen := list(islice(order, max(1, self._batch_tokens // max(map(len, rows), default=1)))):
            batch = pad([rows[i] for i in chosen], pad_id(self._tokenizer), device)
            with torch.no_grad(), evaluating(self._model), Capture(self._model, self._paths) as seen:
                best = self._model(**batch.inputs(self._model), use_cache=False).logits.argmax(-1).cpu()
            for row, i in enumerate(chosen):
                last = len(heads[i]) - 1
                self.known[new[i]] = best[row, last : last + len(tails[i])].tolist() == tails[i]
                at = last if self._read == "prompt_last" else self._subject(new[i])
                states = [seen[path].reshape(*batch.ids.shape, -1)[row, at].float().cpu() for path in self._paths]
                self._states[new[i]] = torch.stack(states)

    def _subject(self, reference: Reference) -> int:
        return subject_tokens(self._tokenizer, reference.prompt, reference.subject)[1]
