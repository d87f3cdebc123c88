"""GRACE: edits as entries of a codebook at one layer, nothing else changes (Hartvigsen et al. 2023).

The input of one linear map at the prompt's last token is the query. A query that lies in the ball of a key is answered by that
key's value in place of the map's output; a new edit adds a key, widens the ball of a key with its label, or parts its ball
from one with another label (Algorithm 1), and its value is trained so that the model says the new object. Requests are taken
in order, each on the model as the earlier ones left it. One that the unedited model gets right is left out ("already" in the
report); one that only earlier edits make right is no edit either ("covered", and by which), but has a part that comes in where
one of these is taken out. Emits a codebook part for each.

Differs from the published code by default (preset "published" restores it): every token asks for itself, so that cached and
whole texts agree; the nearest *containing* ball answers, and balls of different labels never overlap; an edit whose ball had
to give way to another label's, and that it no longer holds, gets a key of its own, and a value that several edits share is
trained for all of them; labels are equal target ids; values start from the map's own output and stop once the model says the
object.

On an encoder-decoder the layer may be one of the encoder ("encoder.4", as published for T5, where the prompt's tokens are
replaced) or of the decoder, which asks at its start token. A classifier asks at its first token, which its head reads.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.codebook import CodebookEntry, Place, Replace
from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors._items import (
    ALREADY,
    COVERED,
    Item,
    column_of,
    items_of,
    logits_of,
    losses_of,
    place_of,
    refuse_known,
    says,
    wanted,
    with_contradictions,
)
from errata.editors._value_rows import ValueJob
from errata.editors._value_search import NLL, NormPenalty, Term, ValueSearchConfig, _without_gradients, search_values
from errata.editors._weights import entry
from errata.errors import ConfigError
from errata.maths.codebook import Codebook, Rules
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture, Hooks, first_tensor, with_first_tensor
from errata.model.states import input_device
from errata.output_table import book_reply, replaced
from errata.patch import Patch, check_fits

# Of a key's own length: chosen on Atlas's dev facts, between other phrasings of a fact and other facts; and of a classifier,
# whose cases of a class lie close together, on the docket's dev topics, between late cases and early ones.
REACH, CLOSE = 0.6, 0.1
AGAIN = 3  # a value that is not found is searched again at a third of the rate, for three times as many steps
AHEAD = 64  # requests whose values are searched as one batch
ALONE: dict[Replace, Replace] = {"each": "last"}  # where a value is trained by itself, only the token that asks has it


@dataclass(frozen=True)
class GRACEConfig:
    """Settings of GRACE.

    layer: negative from the end, "encoder.4" of an encoder; None for one near three quarters of the depth, of an encoder-
    decoder in its decoder, in its encoder with replace "prompt" or keys at the subject (which it alone reads); site: the map
    whose input asks and whose output is replaced, "mlp" for the whole MLP, a role of the anatomy or a path in the block; None:
    the MLP, or the last of its maps where it is no module of its own (BERT). key: the token that asks, the prompt's "last" or
    "first", or the "subject"'s (only where each token asks for itself); None: the first of a classifier (the last with replace
    "prompt"), else the last. replace: see `Place`; None: "each" in a decoder, in an encoder the one token that asks ("last").
    radius: of a new ball (the paper's epsilon), activation units; None for 0.6 |key| (0.1 |key| of a classifier). start:
    "warm", the map's own output or "cold" U[0, 1); training: plain "gradient" descent or with N(0, noise) added to the value at
    each step ("perturbed"). steps, lr (Adam's, activation units; a decoder's values that are not found by then are searched again,
    slower), stop (nats, 0 for never), norm: weight of the penalty (|value - output| / |output|)^2, for warm values at the MLP's
    output. expand, guard, defer, match, same: see `Rules`; same is at least 0.02 on models in half precision. skip: leave out
    what the model already says. ending: text that the model is to say behind the new object.
    """

    layer: int | str | None = None
    site: str | None = None
    key: Literal["last", "first", "subject"] | None = None
    replace: Replace | None = None
    radius: float | None = None
    start: Literal["warm", "cold"] = "warm"
    training: Literal["gradient", "perturbed"] = "gradient"
    noise: float = 1.0
    steps: int = 100
    lr: float = 3.0
    stop: float = 0.05
    norm: float = 0.0
    expand: Literal["add_init", "coverage", "moving_average"] = "add_init"
    guard: bool = True
    defer: Literal["containing", "nearest"] = "containing"
    match: Literal["exact", "mean"] = "exact"
    same: float = 1e-4
    skip: bool = True
    ending: str = ""

    def __post_init__(self) -> None:
        named = self.key in ("last", "first", "subject", None) and self.start in ("warm", "cold")
        if not named or self.training not in ("gradient", "perturbed"):
            raise ConfigError(
                "expected key 'last', 'first' or 'subject', start 'warm' or 'cold' and training 'gradient' or 'perturbed', found "
                f"{self.key!r}, {self.start!r} and {self.training!r}"
            )
        if (
            min(1.0 if self.radius is None else self.radius, self.lr, self.steps) <= 0
            or min(self.stop, self.noise, self.norm) < 0
        ):
            raise ConfigError(
                f"expected radius, lr and steps above 0, and stop, noise and norm of at least 0, found {self}"
            )
        if self.key == "subject" and self.replace not in ("each", None):
            raise ConfigError(
                f"expected replace 'each' with keys at the subject, found {self.replace!r}: no other mode asks at the subject"
            )
        Place(0, self.site or "mlp", self.replace or "each")
        self.rules(torch.float32)

    def rules(self, dtype: torch.dtype) -> Rules:
        """The codebook's rules on a model of this dtype."""
        half = dtype in (torch.float16, torch.bfloat16)
        return Rules(self.expand, self.guard, self.defer, self.match, max(self.same, 0.02) if half else self.same)


_PUBLISHED: dict[str, Any] = {
    "site": "mlp_out", "radius": 1.0, "replace": "prompt", "start": "cold", "stop": 0.0, "expand": "coverage", "guard": False,
    "defer": "nearest", "match": "mean", "same": 0.0, "skip": False, "lr": 1.0,
}  # fmt: skip


class GRACE(Editor[GRACEConfig]):
    """General retrieval adaptors for continual editing."""

    method = "grace"
    summary = "a codebook of keys, values and radii at one layer (Hartvigsen et al. 2023)"
    batch = AHEAD
    place = "external memory"
    how = "optimised"
    supports = ("decoder", "encoder-decoder", "classifier")
    streams = True
    scoped = True
    Config = GRACEConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": _PUBLISHED,
        "atlas-docket": {"layer": 1, "key": "last", "replace": "prompt", "lr": 1.0},
        "atlas-t5": {"layer": 1, "lr": 1.0},
        "t5-small": {**_PUBLISHED, "layer": "encoder.4", "radius": 3.0, "steps": 200},
        "bert-base": {**_PUBLISHED, "layer": 10, "key": "last"},
        "gpt2-xl": {**_PUBLISHED, "replace": "last", "layer": 35, "site": "mlp_in", "steps": 200},
        "gpt-j-6b": {**_PUBLISHED, "replace": "last", "layer": 25, "steps": 200},
        "llama-2-7b": {**_PUBLISHED, "replace": "last", "layer": 27, "steps": 50},
    }

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
        onto: Patch | None = None,
    ) -> Patch:
        """Fit requests in order. onto: a patch of this codebook that they come on top of; the result holds its edits too, and says
        anew which of them the model still says.

        Raises RequestError, SubjectNotFoundError, AnatomyError for a layer or site that is not there, ConfigError for a token
        that cannot ask there, or if `onto` is of another layer or other rules, BaseMismatchError if it is of another model.
        """
        self.check(requests, model, tokenizer)
        parts, rules, config = anatomy(model), self.config.rules(model.dtype), self.config
        place, key = place_of(model, config.layer, config.site, config.replace, config.key)
        before = onto or Patch(self.method, asdict(self.config), (), base_of(model, tokenizer), ())
        refuse_known(before, requests)
        _check_onto(before, place, rules, model, tokenizer)
        items, known_items = (items_of(tokenizer, own, config.ending) for own in (requests, before.requests))
        everything = before.requests + tuple(requests)
        report = {i: dict(own) for i, own in before.report.items()}
        with quiet(model), _without_gradients(model):
            stream = _Stream(self.config, model, tokenizer, place, key, Codebook(rules), seed)
            stream.know(everything, [*known_items, *items])
            for known in before.parts:
                stream.keep(known)
            with Hooks(model, forward=[(place.path(parts), stream.hook)]):
                for begin in range(0, len(items), AHEAD):
                    stream.look_ahead(requests[begin : begin + AHEAD], items[begin : begin + AHEAD])
                    for i in range(begin, min(begin + AHEAD, len(items))):
                        report[requests[i].id] = stream.edit(requests[i], items[i])
                        if progress is not None:
                            progress(i + 1, len(items))
                said = stream.says([*known_items, *items])
        for request, right in zip(everything, said, strict=True):
            report[request.id] = {**report.get(request.id, {}), "layer": place.layer, "converged": right}
        report = with_contradictions(report, everything)
        return replace(
            before, config=asdict(self.config), requests=everything, parts=tuple(stream.parts), report=report
        )


def _check_onto(patch: Patch, place: Place, rules: Rules, model: Any, tokenizer: Any) -> None:
    """Raise ConfigError or BaseMismatchError if these edits cannot come on top of the patch's."""
    check_fits([patch], model, tokenizer)
    for part in patch.parts:
        if not isinstance(part, CodebookEntry) or (part.place, part.rules) != (place, rules):
            found = (
                f"a codebook of {part.place}, {part.rules}"
                if isinstance(part, CodebookEntry)
                else f"a {part.kind} part"
            )
            raise ConfigError(
                f"expected a patch with a codebook of {place}, {rules} to go on from, found {found}; fit with the patch's own "
                "configuration, or without it"
            )


class _Stream:
    """The codebook while it grows, at work on the model: its hook answers with what the book holds so far."""

    def __init__(
        self, config: GRACEConfig, model: Any, tokenizer: Any, place: Place, key: str, book: Codebook, seed: int
    ):
        self.config, self.model, self.tokenizer, self.place, self.book = config, model, tokenizer, place, book
        self._key = key
        self.generator = torch.Generator().manual_seed(seed)
        self._path = place.path(anatomy(model))
        self._running: Sequence[Item] = ()
        self._values: Tensor | None = None  # in place of the book's, while one of them is trained
        self._own: Tensor | None = None  # a value for each running item, while they are trained together
        self._off = False
        self._keys: dict[str, Tensor] = {}
        self.parts: list[CodebookEntry] = []
        self._latest: dict[str, CodebookEntry] = {}
        self._items: dict[str, Item] = {}
        self._outputs: dict[str, Tensor] = {}
        self._starts: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        self._plain: dict[str, bool] = {}  # whether the unedited model says a request's target

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook of the place's linear map."""
        if self._own is None and (self._off or not len(self.book)):
            return None
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        shape, n = y.shape, len(self._running)
        x, y = x.to(y.device).reshape(n, -1, x.shape[-1]), y.reshape(n, -1, shape[-1])  # OPT's MLP runs on (n * T, a)
        at = torch.tensor([self._column(item) for item in self._running], device=x.device)
        if self._own is not None:
            own, place = self._own, replace(self.place, replace=ALONE.get(self.place.replace, self.place.replace))
            new = replaced(lambda q: (torch.ones(n, dtype=torch.bool, device=q.device), own), place, x, y, at)
        else:
            new = replaced(book_reply(self.book, self._values), self.place, x, y, at)
        return with_first_tensor(output, new.reshape(shape))

    def says(self, items: Sequence[Item]) -> list[bool]:
        """Whether the model with the book says each item's target."""
        found = []
        for start in range(0, len(items), AHEAD):
            self._running = items[start : start + AHEAD]
            found += says(self.model, self._running)
        return found

    def look_ahead(self, requests: Sequence[EditRequest], items: Sequence[Item]) -> None:
        """Read the keys of requests to come, and find values for those that the model gets wrong as it stands, in batches."""
        keys, outputs = self._read(items)
        self._keys = {r.id: key for r, key in zip(requests, keys, strict=True)}
        self._outputs = {r.id: output for r, output in zip(requests, outputs, strict=True)}
        right = self.says(items) if self.config.skip else [False] * len(items)
        plain = right
        if self.config.skip and len(self.book):
            with self._base():
                plain = self.says(items)
        self._plain = dict(zip((r.id for r in requests), plain, strict=True))
        wrong = [i for i, said in enumerate(right) if not said]
        found = self._search([requests[i] for i in wrong], [items[i] for i in wrong])
        self._starts = dict(zip((requests[i].id for i in wrong), found, strict=True))

    def know(self, requests: Sequence[EditRequest], items: Sequence[Item]) -> None:
        """Which items stand behind requests."""
        self._items = {r.id: item for r, item in zip(requests, items, strict=True)}

    def keep(self, part: Any) -> None:
        """Take up an edit that was fitted before."""
        part.insert_into(self.book)
        self._note(part)

    def _note(self, part: CodebookEntry) -> None:
        self.parts.append(part)
        self._latest[part.edit] = part

    def edit(self, request: EditRequest, item: Item) -> dict[str, Any]:
        """Take one request, unless the model says it already; its report."""
        if self.config.skip and self.says([item])[0]:
            return {"outcome": ALREADY} if self._plain[request.id] else self._covered(request, item)
        if request.id not in self._starts:  # it was right before an edit of this batch came in its way
            self._starts[request.id] = self._search([request], [item])[0]
        key, (value, notes) = self._keys[request.id], self._starts[request.id]
        label, radius = wanted(self.model, item)[1], self._radius(key)
        done = self.book.insert(key, value, radius, label, request.id)
        kept = done.outcome in ("cover", "expand")  # the value is its entry's, trained for an earlier edit
        if kept:
            notes = {"steps": 0}
        # A shared value may not do for this item, and what the book says to its other tokens may be in the way of its own.
        if (kept or notes["stopped"]) and not (self.config.stop and self.says([item])[0]):
            notes = self._train(self._behind(done.entry) if self.config.guard else [item], done.entry)
        value = self.book.values[done.entry].clone()
        self._note(CodebookEntry(request.id, key, value, radius, label, self.place, self.book.rules))
        about: dict[str, Any] = {"outcome": done.outcome, "radius": round(float(self.book.radii[done.entry]), 6)}
        if math.isfinite(done.distance):
            about["distance"] = round(done.distance, 6)
        about |= {name: list(tags) for name in ("shrunk", "replaced") if (tags := getattr(done, name))}
        if again := self._again(done.shrunk):
            about["again"] = again
        return about | notes

    def _covered(self, request: EditRequest, item: Item) -> dict[str, Any]:
        """Note a request that the edits so far make right, without touching the book; its report.

        Its value is the one that answers it, or one searched for it alone where that does not do without the other edits
        (they may answer at other tokens, or together).
        """
        entries, asked = self._answering(item)
        by = tuple(dict.fromkeys(tag for i in entries for tag in self.book.tags[i]))
        if not by:  # rounding alone: nothing answered
            return {"outcome": ALREADY}
        value = self.book.values[asked].clone() if asked >= 0 else None
        if value is None or not self._holds(item, value):
            drawn = self.generator.get_state()
            found = self._starts.get(request.id) or self._search([request], [item])[0]
            self.generator.set_state(drawn)  # later values are as if nothing had been searched
            value = found[0]
        key, label = self._keys[request.id], wanted(self.model, item)[1]
        rules = self.book.rules
        self._note(CodebookEntry(request.id, key, value, self._radius(key), label, self.place, rules, covered_by=by))
        return {"outcome": COVERED, "by": list(by)}

    def _answering(self, item: Item) -> tuple[list[int], int]:
        """The entries that answer any of an item's tokens, and the one that answers the token that asks (-1: none)."""
        self._running, at = [item], self._column(item)
        with Capture(self.model, [self._path], of="input") as seen:
            logits_of(self.model, [item])
        queries = seen[self._path].reshape(-1, seen[self._path].shape[-1])
        found = self.book.find(queries)[0].tolist()
        hit = found if self.place.replace == "each" else found[at : at + 1]
        return sorted({i for i in hit if i >= 0}), found[at]

    def _holds(self, item: Item, value: Tensor) -> bool:
        """Whether the model says an item's target with this value alone where it asks."""
        self._own = value[None].to(input_device(self.model))
        try:
            return self.says([item])[0]
        finally:
            self._own = None

    def _radius(self, key: Tensor) -> float:
        """The initial radius of a key."""
        reach = CLOSE if anatomy(self.model).role == "classifier" else REACH
        return self.config.radius or float(reach * torch.linalg.vector_norm(key))

    def _again(self, edits: Sequence[str]) -> list[str]:
        """Give a key of its own to each of these edits, and of those that they cover, that the balls behind it, which had to
        give way, no longer answer; not where a later edit of another label has its very key."""
        waiting = list(dict.fromkeys([*edits, *self._behind_cover(edits)])) if self.config.guard else []
        made = list[str]()
        while waiting:
            found = self.book.find(torch.stack([self._latest[edit].key for edit in waiting]))[0].tolist()
            lost = [
                e
                for e, at in zip(waiting, found, strict=True)
                if at < 0 or self.book.labels[at] != self._latest[e].label
            ]
            waiting = []
            for part in (self._latest[edit] for edit in lost if edit not in made):
                if self._overridden(part):
                    continue
                done = self.book.insert(part.key, part.value, part.radius, part.label, part.edit)
                shared = done.outcome in ("cover", "expand")
                value = self.book.values[done.entry] if shared else part.value
                # a file holds no tensor twice, and who has a key of its own is covered by nobody
                part = replace(part, key=part.key.clone(), value=value.clone(), covered_by=())
                self.book.set_value(done.entry, part.value)
                self._note(part)
                made.append(part.edit)
                waiting += [*done.shrunk, *self._behind_cover(done.shrunk)]
            waiting = list(dict.fromkeys(waiting))
        return made

    def _behind_cover(self, edits: Sequence[str]) -> list[str]:
        """The edits that have no key of their own, since some of these cover them."""
        gone = set(edits)
        return [part.edit for part in self._latest.values() if gone.intersection(part.covered_by)]

    def _overridden(self, part: CodebookEntry) -> bool:
        """Whether an entry of another label stands at the part's very key: a later edit of it, which holds."""
        far = torch.linalg.vector_norm(self.book.keys - part.key.to(self.book.keys), dim=-1)
        near, slack = int(far.argmin()), self.book.rules.same * float(torch.linalg.vector_norm(part.key))
        return float(far[near]) <= slack and self.book.labels[near] != part.label

    # -- keys and values ---------------------------------------------------------------------------------------------

    def _column(self, item: Item) -> int:
        return column_of(self.model, self.place.layer, item, self._key)

    def _read(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Keys (n, a) and the map's own outputs (n, b) where the items ask; the book bears on neither, it acts behind them."""
        at = torch.tensor([self._column(item) for item in items])
        with self._base(), Capture(self.model, [self._path], of="input") as x, Capture(self.model, [self._path]) as y:
            logits_of(self.model, items)
        seen = (t[self._path].reshape(len(items), -1, t[self._path].shape[-1]) for t in (x, y))
        keys, outputs = (
            t[torch.arange(len(items)), at].to("cpu", torch.promote_types(t.dtype, torch.float32)) for t in seen
        )
        return keys, outputs

    def _search(self, requests: Sequence[EditRequest], items: Sequence[Item]) -> list[tuple[Tensor, dict[str, Any]]]:
        """(value, notes for the report) for each request, searched as one batch on the unedited model."""
        if not requests:
            return []
        config, place = self.config, self.place
        plain = config.start == "warm" and config.training == "gradient" and config.stop > 0
        at_output = place.site in ("mlp", "mlp_out") and place.replace in ("each", "last")
        if not plain or not at_output or anatomy(self.model).role != "decoder" or isinstance(place.layer, str):
            return self._descend(requests, items)
        about = config.key == "subject"
        jobs = [
            ValueJob(r.prompt if about else r.text, r.target_new + config.ending, r.subject if about else None)
            for r in requests
        ]
        terms: list[Term] = [NLL()]
        terms += [NormPenalty(config.norm, counts=False)] if config.norm else []
        search = ValueSearchConfig(place.layer, "mlp", config.steps, config.lr, None, config.stop)
        with self._base():
            found = search_values(self.model, self.tokenizer, jobs, search, terms)
            values = [(found.value[i], entry(found, i)) for i in range(len(jobs))]
            if left := [i for i, (_, notes) in enumerate(values) if not notes["stopped"]]:
                longer = replace(search, steps=AGAIN * config.steps, lr=config.lr / AGAIN)
                found = search_values(self.model, self.tokenizer, [jobs[i] for i in left], longer, terms)
                for at, i in enumerate(left):
                    values[i] = found.value[at], {**entry(found, at), "searches": 2}
        return values

    def _descend(self, requests: Sequence[EditRequest], items: Sequence[Item]) -> list[tuple[Tensor, dict[str, Any]]]:
        """The same on any model, at any map and in any mode: a value each in one batch, and out of it once `stop` is reached."""
        config, device = self.config, input_device(self.model)
        starts = torch.stack([self._first(self._outputs[r.id]) for r in requests]).to(device)
        leaf, done = starts.clone().requires_grad_(), starts.clone()
        optimiser = torch.optim.Adam([leaf], config.lr)
        left, curves = list(range(len(items))), [list[float]() for _ in items]
        try:
            for _ in range(config.steps):
                self._running = [items[i] for i in left]
                with torch.enable_grad():
                    losses, total = self._losses(leaf, starts, left)
                for i, loss in zip(left, losses.detach().tolist(), strict=True):
                    curves[i].append(round(loss, 4))
                left = [i for i in left if curves[i][-1] >= config.stop]
                if not left or not total.requires_grad:
                    break
                (leaf.grad,) = torch.autograd.grad(total, [leaf])
                optimiser.step()
                done[left] = leaf.detach()[left]
        finally:
            self._own = None
        return [
            (value, {"curve": curve, "steps": len(curve), "stopped": curve[-1] < config.stop})
            for value, curve in zip(done.cpu(), curves, strict=True)
        ]

    def _losses(self, leaf: Tensor, starts: Tensor, left: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(k,) losses of the items that are left under their values, and what is to be descended."""
        config, own = self.config, leaf[left]
        if config.training == "perturbed":
            noise = torch.randn(own.shape, generator=self.generator, dtype=own.dtype) * config.noise
            own = own + noise.to(own.device)
        self._own = own
        losses = losses_of(self.model, self._running)
        if not config.norm:
            return losses, losses.sum()
        away = (own - starts[left]).square().sum(-1) / starts[left].square().sum(-1)
        return losses, losses.sum() + config.norm * away.sum().to(losses.device)

    def _first(self, output: Tensor) -> Tensor:
        """Where a value starts that is not searched: (b,)."""
        if self.config.start == "warm":
            return output
        return torch.rand(len(output), generator=self.generator, dtype=output.dtype)

    def _behind(self, entry: int) -> list[Item]:
        """The items that an entry answers."""
        return [self._items[edit] for edit in self.book.tags[entry]]

    def _train(self, items: Sequence[Item], at: int) -> dict[str, Any]:
        """Train an entry's value on items through the model with the book; notes for the report: the worst item's loss."""
        config, curve = self.config, list[float]()
        leaf = self.book.values[at].clone().requires_grad_()
        optimiser, self._running = torch.optim.Adam([leaf], config.lr), items
        index = torch.tensor([at], device=leaf.device)
        try:
            for _ in range(config.steps):
                noise = torch.randn(len(leaf), generator=self.generator, dtype=leaf.dtype) * config.noise
                with torch.enable_grad():
                    own = leaf + noise.to(leaf.device) if config.training == "perturbed" else leaf
                    self._values = self.book.values.index_copy(0, index, own[None])
                    losses = losses_of(self.model, items)
                    total = losses.sum()
                curve.append(round(float(losses.detach().max()), 4))
                if curve[-1] < config.stop or not total.requires_grad:
                    break
                (leaf.grad,) = torch.autograd.grad(total, [leaf])
                optimiser.step()
        finally:
            self._values = None
        self.book.set_value(at, leaf)
        return {"curve": curve, "steps": len(curve), "stopped": curve[-1] < config.stop}

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Inside, the book does nothing."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before
