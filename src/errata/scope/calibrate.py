"""Choose a gate and its radius on data: the highest in-scope rate at a given false-positive rate.

Examples are facts with their prompts, `fit` ones and held-out ones. Two thirds of the facts teach the projection; of the
others, half play the loaded edits and half the world outside. A gate is judged on held-out prompts only: an in-scope prompt
must lie within the radius of its own edit and nearest to it; every prompt of an unloaded fact is a hard negative (same
relation and other subject, or same subject and other relation), and every position of every unrelated text a further one
(for encoder gates, which are asked where a text ends, the whole text).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.maths.discriminant import within_class_projection
from errata.model.anatomy import Site, anatomy
from errata.model.room import room
from errata.model.tokens import token_ids
from errata.scope.encoder import load_encoder
from errata.scope.features import features
from errata.scope.gate import Distance, Gate, Pooling
from errata.scope.portions import Portions
from errata.scope.recall import learn_cues

LIMIT = 4096  # features of a prompt up to which all prompts' features are held at once, and covariances are dense


@dataclass(frozen=True)
class ScopeExample:
    """One fact's prompts: those an edit would be fitted on, and held-out ones. answer: its object, for cues."""

    fit: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str = ""


@dataclass(frozen=True)
class Candidate:
    """A gate to be tried; `projected` puts the learned projection of width `k` before the distance.

    encoder: name of a sentence encoder to be read instead of layers.
    """

    layers: tuple[Site, ...] = ()
    pooling: Pooling = "last"
    distance: Distance = "euclidean"
    projected: bool = False
    k: int = 128
    encoder: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a candidate did: rates on held-out prompts (fractions), and the radius in the gate's unit.

    radii: what the radius would be at other false-positive rates, to try on dev edits (`benchmarks/scope.py`).
    """

    gate: Gate
    in_scope_rate: float
    false_positive_rate: float
    unrelated_rate: float
    n_in_scope: int
    n_out_of_scope: int
    n_unrelated: int
    radii: dict[float, float]


SHORT, UNBOUNDED, ROOM_LEFT = 24, 1024, 24  # tokens: shortest context, longest where a model sets no bound, kept free
CUE_FACTS, CUE_TEXTS = 600, 120  # facts and unrelated texts that cues are learned from
RATES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)


def default_candidates(n_layers: int) -> list[Candidate]:
    """Single layers with plain distances, and learned projections of one or many layers, last-token or mean pooled."""
    some = sorted({min(round(n_layers * share), n_layers - 1) for share in (0.5, 0.75)})
    upper = tuple(range(n_layers // 4, n_layers))
    return [
        *(Candidate((layer,), distance=d) for layer in some for d in ("euclidean", "cosine")),
        *(Candidate((layer,), projected=True) for layer in some),
        *(Candidate(upper, projected=True, k=k) for k in (64, 128, 256)),
        Candidate(upper, projected=True, distance="cosine"),
        Candidate(upper, pooling="mean", projected=True),
    ]


def encoder_candidates(name: str) -> list[Candidate]:
    """The gates over one sentence encoder's vectors, as they are."""
    return [Candidate(encoder=name, distance="euclidean"), Candidate(encoder=name, distance="cosine")]


def calibrate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[ScopeExample],
    unrelated: Sequence[str] = (),
    *,
    contexts: Mapping[str, Sequence[str]] | None = None,
    candidates: Iterable[Candidate] | None = None,
    target_false_positive_rate: float = 0.01,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    limit: int = LIMIT,
) -> list[Outcome]:
    """Outcomes of all candidates, best first; the first one's gate is the calibrated gate.

    contexts: sentences by kind ("filler", "facts", ...), each ready to stand before another text. One prompt to fit and one
    held-out prompt of each example then also stand behind so many of a kind that they reach up to all that the model has room
    for: a prompt must be known behind anything.

    Models with up to `limit` features a prompt (d_model times the layers that candidates read) have all prompts'
    features in memory at once. Larger ones are read in portions (`scope.portions`): then at most 2·BUDGET bytes of
    teaching prompts' features (facts beyond it do not teach) and BUDGET bytes of others' are held at a time, besides the
    points (at most d_model or k float32 numbers a prompt and candidate) and what `within_class_projection` states.

    Raises RequestError for fewer than 12 examples, or examples without fit or held-out prompts.
    """
    if len(examples) < 12 or any(not e.fit or not e.held_out for e in examples):
        raise RequestError(
            "calibration needs at least 12 facts, each with prompts to fit and held-out prompts; give more fit_prompts"
        )
    bare = examples
    if contexts:
        examples = _behind_contexts(model, tokenizer, examples, contexts, seed)
    split = _split(examples, seed)
    tried = list(candidates or default_candidates(anatomy(model).n_layers))
    outcomes = []
    for encoder, pooling in dict.fromkeys((c.encoder, c.pooling) for c in tried):
        group = [c for c in tried if (c.encoder, c.pooling) == (encoder, pooling)]
        layers = sorted({la for c in group for la in c.layers}, key=lambda la: (isinstance(la, str), la))
        count = len(split.fit) + len(split.held)
        source = f"vectors of {encoder}" if encoder else f"{pooling} states of {len(layers)} layers"
        progress(f"reading {count} prompts, {source}")
        wide = not encoder and anatomy(model).d_model * len(layers) > limit
        if wide:
            portions = Portions(model, tokenizer, layers, pooling)
            outcomes += _in_portions(portions, split, unrelated, group, target_false_positive_rate, limit, progress)
            continue
        if encoder:
            everything = load_encoder(encoder).encode([*split.fit, *split.held])
            noise = load_encoder(encoder).encode(unrelated) if unrelated else None
        else:
            everything = features(model, tokenizer, [*split.fit, *split.held], layers, pooling)
            noise = features(model, tokenizer, unrelated, layers, pooling, every=True) if unrelated else None
        outcomes += _in_memory(everything, noise, split, group, layers, target_false_positive_rate, limit, progress)
    outcomes.sort(key=lambda o: -o.in_scope_rate)
    best = outcomes[0].gate
    if best.layers and best.pooling == "last" and best.distance != "linear":
        progress("where questions end and answers are asked for again")
        outcomes[0] = replace(
            outcomes[0], gate=_with_cues(model, tokenizer, best, bare, contexts or {}, unrelated, seed)
        )
    return outcomes


def _behind_contexts(
    model: Any, tokenizer: Any, examples: Sequence[ScopeExample], contexts: Mapping[str, Sequence[str]], seed: int
) -> list[ScopeExample]:
    """Each example with one prompt to fit and one held-out prompt more, behind contexts of random kinds and lengths."""
    rng = random.Random(seed)
    pieces = [
        list(zip(texts, map(len, token_ids(tokenizer, texts)), strict=True)) for texts in contexts.values() if texts
    ]
    longest = min(room(model) or UNBOUNDED, UNBOUNDED) - ROOM_LEFT

    def behind(prompt: str) -> str:
        own = len(token_ids(tokenizer, [prompt])[0])
        wanted = int(SHORT * (max(longest, SHORT) / SHORT) ** rng.random()) - own  # log-uniform
        before, kind = "", rng.choice(pieces)
        while True:
            text, n = rng.choice(kind)
            if n > wanted:
                return before + prompt
            before, wanted = before + text, wanted - n - 1

    return [
        replace(e, fit=(*e.fit, behind(rng.choice(e.fit))), held_out=(*e.held_out, behind(rng.choice(e.held_out))))
        for e in examples
    ]


def _with_cues(
    model: Any, tokenizer: Any, gate: Gate, examples: Sequence[ScopeExample], contexts: Mapping[str, Sequence[str]],
    unrelated: Sequence[str], seed: int,
) -> Gate:  # fmt: skip
    """The gate with cues over one of its blocks, if the examples have answers; each prompt is put beside another's answer."""
    rng = random.Random(seed)
    answers = [e.answer for e in examples if e.answer]
    if len(answers) < 2:
        return gate
    chosen = rng.sample(list(examples), min(len(examples), CUE_FACTS))
    questions = [
        [p for p in e.fit if p.endswith("?")] or list(e.fit) for e in chosen
    ]  # few of the wordings are questions
    pairs = [(rng.choice(of), rng.choice(answers)) for e, q in zip(chosen, questions, strict=True) for of in (e.fit, q)]
    longer = _behind_contexts(model, tokenizer, chosen, contexts, seed) if contexts else []
    behind = [e.fit[-1] for e in longer]
    blocks = [layer for layer in gate.layers if layer != "final"] or list(gate.layers)
    cues, layer = learn_cues(model, tokenizer, pairs, unrelated[:CUE_TEXTS], blocks, behind, seed)
    return replace(gate, cues=cues, cue_layer=layer)


@dataclass(frozen=True)
class _Split:
    """Which facts (indices) teach the projection, play the loaded edits and the world outside; all prompts with labels."""

    teach: list[int]
    loaded: list[int]
    outside: list[int]
    fit: list[str]
    held: list[str]
    fit_label: Tensor
    held_label: Tensor

    @property
    def inside(self) -> Tensor:
        """Which held-out prompts are about loaded facts."""
        return torch.isin(self.held_label, torch.tensor(self.loaded))

    @property
    def without(self) -> Tensor:
        """Which held-out prompts are about facts outside."""
        return torch.isin(self.held_label, torch.tensor(self.outside))

    @property
    def own(self) -> Tensor:
        """Place among the loaded facts of each held-out prompt inside."""
        return torch.tensor([self.loaded.index(int(i)) for i in self.held_label[self.inside]])


def _split(examples: Sequence[ScopeExample], seed: int) -> _Split:
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    cut, half = len(order) * 2 // 3, len(order) * 5 // 6
    return _Split(
        teach=order[:cut],
        loaded=order[cut:half],
        outside=order[half:],
        fit=[p for e in examples for p in e.fit],
        held=[p for e in examples for p in e.held_out],
        fit_label=torch.tensor([i for i, e in enumerate(examples) for _ in e.fit]),
        held_label=torch.tensor([i for i, e in enumerate(examples) for _ in e.held_out]),
    )


def _in_memory(
    everything: Tensor, noise: Tensor | None, split: _Split, group: list[Candidate], layers: list[Site],
    target: float, limit: int, progress: Callable[[str], None],
) -> list[Outcome]:  # fmt: skip
    """Outcomes from raw features of all prompts (n, D) and of what is unrelated (m, D)."""
    outcomes = []
    width = everything.shape[1] // max(1, len(layers))
    for candidate in group:
        progress(_said(candidate))
        x, quiet = everything, noise
        if candidate.layers:
            columns = torch.cat([torch.arange(width) + width * layers.index(layer) for layer in candidate.layers])
            x, quiet = everything[:, columns], noise[:, columns] if noise is not None else None
        fit, held = x[: len(split.fit)], x[len(split.fit) :]
        gate = _gate(candidate)
        if candidate.projected:
            taught = torch.isin(split.fit_label, torch.tensor(split.teach))
            found = within_class_projection(fit[taught], split.fit_label[taught], candidate.k, limit=limit)
            gate = replace(gate, mean=_compact(found[0]), projection=_compact(found[1]))
        centres = torch.stack([gate.centre(gate.points(fit[split.fit_label == i])) for i in split.loaded])
        far = gate.distances(gate.points(held[split.inside]), centres)
        negatives = gate.distances(gate.points(held[split.without]), centres).min(1).values
        near = None
        if quiet is not None:
            near = torch.cat([gate.distances(gate.points(part), centres).min(1).values for part in quiet.split(4096)])
        outcomes.append(_judge(gate, far, split.own, negatives, near, target))
    return outcomes


def _in_portions(
    portions: Portions, split: _Split, unrelated: Sequence[str], group: list[Candidate],
    target: float, limit: int, progress: Callable[[str], None],
) -> list[Outcome]:  # fmt: skip
    """The same without ever holding the raw features of all prompts: they become points as they are read."""
    gates = _taught(portions, split, group, limit, progress)
    columns = [portions.columns(c.layers) for c in group]

    def points(texts: list[str]) -> list[Tensor]:
        read = [[g.points(raw[:, at]) for g, at in zip(gates, columns, strict=True)] for raw in portions.read(texts)]
        return [torch.cat(parts) for parts in zip(*read, strict=True)]

    progress(f"reading the prompts of {len(split.loaded) + len(split.outside)} facts")
    chosen = torch.isin(split.fit_label, torch.tensor(split.loaded))
    label = split.fit_label[chosen]
    fit = points(_kept(split.fit, chosen))
    centres = [
        torch.stack([gate.centre(p[label == i]) for i in split.loaded]) for gate, p in zip(gates, fit, strict=True)
    ]
    inside, without = points(_kept(split.held, split.inside)), points(_kept(split.held, split.without))
    near: list[list[Tensor]] = [[] for _ in group]
    progress(f"reading {len(unrelated)} unrelated texts")
    for raw in portions.read(unrelated, every=True):
        for gate, at, centre, found in zip(gates, columns, centres, near, strict=True):
            found.append(gate.distances(gate.points(raw[:, at]), centre).min(1).values)
    return [
        _judge(
            gate,
            gate.distances(inside[i], centres[i]),
            split.own,
            gate.distances(without[i], centres[i]).min(1).values,
            torch.cat(near[i]) if near[i] else None,
            target,
        )
        for i, gate in enumerate(gates)
    ]


def _taught(
    portions: Portions, split: _Split, group: list[Candidate], limit: int, progress: Callable[[str], None]
) -> list[Gate]:
    """The group's gates with their projections; one for each set of layers, cut to each candidate's width."""
    gates = [_gate(c) for c in group]
    widest: dict[tuple[Site, ...], int] = {}
    for c in group:
        if c.projected:
            widest[c.layers] = max(c.k, widest.get(c.layers, 0))
    if not widest:
        return gates
    taught: list[int] = []
    room = portions.rows
    for fact in split.teach:  # in random order
        room -= int((split.fit_label == fact).sum())
        if room < 0 and len(taught) >= 2:
            break
        taught.append(fact)
    chosen = torch.isin(split.fit_label, torch.tensor(taught))
    progress(f"reading the prompts of {len(taught)} facts that teach the projection")
    x = portions.gather(_kept(split.fit, chosen))
    for layers, k in widest.items():
        progress(f"projection of layers {list(layers)}")
        mean, projection = within_class_projection(
            x[:, portions.columns(layers)], split.fit_label[chosen], k, limit=limit
        )
        for i, c in enumerate(group):
            if c.projected and c.layers == layers:
                short = projection[:, : c.k]
                gates[i] = replace(gates[i], mean=_compact(mean, 1e-3), projection=_compact(short, 1e-3))
    return gates


def _gate(candidate: Candidate) -> Gate:
    return Gate(candidate.layers, candidate.pooling, candidate.distance, candidate.encoder)


def _said(candidate: Candidate) -> str:
    source = candidate.encoder or f"{candidate.pooling} of layers {list(candidate.layers)}"
    return f"{source}, {candidate.distance}, projected: {candidate.projected}"


def _kept(texts: Sequence[str], mask: Tensor) -> list[str]:
    return [text for text, ok in zip(texts, mask.tolist(), strict=True) if ok]


def _compact(x: Tensor, error: float = float("inf")) -> Tensor:
    """Half precision if it can hold every number, with at most this relative error; else float32."""
    half = x.half()
    fits = bool(half.isfinite().all()) and float((half.double() - x).norm()) <= error * float(x.norm())
    return half if fits else x.float()


def below(distance: float) -> float:
    """A radius that keeps a point at this distance outside, with a margin of two per cent."""
    return distance - 0.02 * abs(distance)


def _judge(
    gate: Gate, far: Tensor, own: Tensor, negatives: Tensor, quiet: Tensor | None, target: float
) -> Outcome:  # fmt: skip
    """far (n, edits): distances of in-scope prompts; own (n,): their edits; negatives, quiet: to the nearest edit."""
    nearest = far.min(1)
    ordered, ceiling = negatives.sort().values, float("inf")
    if quiet is not None:
        ceiling = below(float(quiet.min()))

    def radius_at(rate: float) -> float:
        return min(below(float(ordered[min(int(rate * len(ordered)), len(ordered) - 1)])), ceiling)

    radius = radius_at(target)
    hits = (nearest.indices == own) & (nearest.values <= radius)
    return Outcome(
        gate=replace(gate, radius=radius, note=f"calibrated for a false-positive rate of {target}"),
        in_scope_rate=float(hits.double().mean()),
        false_positive_rate=float((negatives <= radius).double().mean()),
        unrelated_rate=float((quiet <= radius).double().mean()) if quiet is not None else 0.0,
        n_in_scope=len(hits),
        n_out_of_scope=len(negatives),
        n_unrelated=len(quiet) if quiet is not None else 0,
        radii={rate: radius_at(rate) for rate in RATES},
    )
