"""What Defer and Memory share: a small model at one linear map's output, trained on a stream of requests (Hartvigsen et al. 2023)."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from errata.codebook import Place, Replace, Routed
from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors._items import (
    ALREADY,
    Item,
    column_of,
    items_of,
    logits_of,
    losses_of,
    place_of,
    refuse_known,
    says,
    with_contradictions,
)
from errata.editors._value_search import _without_gradients
from errata.errors import AnatomyError, ConfigError
from errata.locate.resume import resumed
from errata.low_rank_table import base_layer, sizes
from errata.model.anatomy import anatomy, submodule
from errata.model.fingerprint import base_of
from errata.model.hooks import Hooks, first_tensor, with_first_tensor
from errata.output_table import replaced, routed_reply
from errata.patch import Patch, check_fits


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of an adapter.

    layer: negative from the end, "encoder.4" of an encoder; None for one near three quarters of the depth (of an encoder-
    decoder's decoder, with replace "prompt" of its encoder); site: the linear map, a role of the anatomy or a path in the
    block; key: the token that asks for its row, the prompt's "last" or "first"; None: the first of a classifier (the last with
    replace "prompt"), else the last; replace: see `Place` (published: "all"); None: "each" in a decoder, in an encoder the one
    token that asks ("last"). steps, lr: Adam's, for each request; stop: nats at which a request is done, 0 for never. skip:
    leave out what the model already says. ending: text that the model is to say behind the new object.
    """

    layer: int | str | None = None
    site: str = "mlp_out"
    key: Literal["last", "first"] | None = None
    replace: Replace | None = None
    steps: int = 100
    lr: float = 0.1
    stop: float = 0.05
    skip: bool = True
    ending: str = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.lr) <= 0 or self.stop < 0:
            raise ConfigError(f"expected steps and lr above 0 and stop of at least 0, found {self}")
        Place(0, self.site, self.replace or "each", self.key or "last")


C = TypeVar("C", bound=AdapterConfig)


class AdapterEditor(Editor[C]):
    """Requests in order, each training the adapter on. Subclasses say what it is, and what it answers while it is trained."""

    joint = True
    place = "external memory"
    how = "optimised"
    supports = ("decoder", "encoder-decoder", "classifier")
    streams = True
    form: ClassVar[Literal["defer", "memory"]]

    @abstractmethod
    def blank(self, a: int, b: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The adapter's weights before the first edit, for a linear map from a to b."""

    @abstractmethod
    def answer(self, weights: dict[str, Tensor], q: Tensor, y: Tensor) -> Tensor:
        """What training puts in the place of outputs y (..., b) for queries q (..., a), with a gradient to the weights.

        Where one token asks for its row, q is (n, 1, a) beside y (n, T, b).
        """

    def part(self, edits: tuple[str, ...], weights: dict[str, Tensor], place: Place) -> Routed:
        """The adapter as a part of a patch."""
        return Routed(edits, self.form, weights, place)

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
        """Train on requests in order. onto: a patch of this adapter to go on from; the result holds its edits too.

        Raises RequestError, SubjectNotFoundError, AnatomyError for a layer or site that is not there, ConfigError if nothing
        would be replaced, or `onto` is of another place, BaseMismatchError if it is of another model.
        """
        self.check(requests, model, tokenizer)
        parts, config = anatomy(model), self.config
        place, _ = place_of(model, config.layer, config.site, config.replace, config.key)
        size = sizes(base_layer(submodule(model, place.path(parts))))
        if size is None:
            raise AnatomyError(f"expected a linear map at {place.path(parts)!r}, found none.")
        before = onto or Patch(self.method, asdict(self.config), (), base_of(model, tokenizer), ())
        refuse_known(before, requests)
        known = _going_on(before, self.form, place, model, tokenizer)
        weights = known.weights if known else self.blank(size[1], size[0], torch.Generator().manual_seed(seed))
        items = items_of(tokenizer, requests, self.config.ending)
        report: dict[str, dict[str, Any]] = {}
        with quiet(model), _without_gradients(model):
            run = _Run(self, model, place, weights, inert=known is None)
            with Hooks(model, forward=[(place.path(parts), run.hook)]):
                for i, (request, item) in enumerate(zip(requests, items, strict=True)):
                    done = self.config.skip and run.says([item])[0]
                    report[request.id] = {"outcome": ALREADY} if done else run.train(item)
                    if progress is not None:
                        progress(i + 1, len(items))
                said = run.says(items)
        everything = before.requests + tuple(requests)
        for request, right in zip(requests, said, strict=True):
            report[request.id] |= {"layer": place.layer, "converged": right}
        found = {name: t.detach().cpu().clone() for name, t in run.weights.items()}
        trained = () if run.inert else (self.part(tuple(r.id for r in everything), found, place),)
        report = with_contradictions(before.report | report, everything)
        return replace(before, config=asdict(self.config), requests=everything, parts=trained, report=report)


class _Run:
    """The adapter while it is trained, at work on the model."""

    def __init__(
        self, editor: AdapterEditor[Any], model: Any, place: Place, weights: dict[str, Tensor], *, inert: bool
    ):
        self.editor, self.model, self.place, self.inert = editor, model, place, inert
        device = next(submodule(model, place.path(anatomy(model))).parameters()).device
        wide = torch.promote_types(model.dtype, torch.float32)
        self.weights = {name: t.detach().to(device, wide).clone().requires_grad_() for name, t in weights.items()}
        self._running: Sequence[Item] = ()
        self._training = False

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook of the place's linear map."""
        if self.inert:
            return None
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        shape, n = y.shape, len(self._running)
        wide = next(iter(self.weights.values())).dtype
        x, y = (
            x.reshape(n, -1, x.shape[-1]).to(y.device, wide),
            y.reshape(n, -1, shape[-1]),
        )  # OPT's MLP runs on (n * T, a)
        asks = [column_of(self.model, self.place.layer, item, self.place.ask) for item in self._running]
        at = torch.tensor(asks, device=x.device)
        if not self._training:
            part = self.editor.part(("",), {name: t.detach() for name, t in self.weights.items()}, self.place)
            return with_first_tensor(output, replaced(routed_reply(part), self.place, x, y, at).reshape(shape))
        each, own = self.place.replace == "each", y.to(wide)

        def reply(q: Tensor) -> tuple[Tensor, Tensor]:
            asking, outputs = (q, own.reshape(len(q), -1)) if each else (q[:, None], own)
            answers = self.editor.answer(self.weights, asking, outputs)
            return torch.ones(len(q), dtype=torch.bool, device=q.device), answers

        return with_first_tensor(output, replaced(reply, self.place, x, y, at).reshape(shape))

    def says(self, items: Sequence[Item]) -> list[bool]:
        """Whether the model with the adapter says each item's target."""
        found = []
        for start in range(0, len(items), 64):
            self._running = items[start : start + 64]
            found += says(self.model, self._running)
        return found

    def train(self, item: Item) -> dict[str, Any]:
        """Train the adapter on one item with a fresh Adam; notes for the report."""
        config, curve = self.editor.config, list[float]()
        optimiser = torch.optim.Adam(list(self.weights.values()), config.lr)
        self._running, self._training, self.inert = [item], True, False
        try:
            with self._above():
                for _ in range(config.steps):
                    with torch.enable_grad():
                        loss = losses_of(self.model, [item])[0]
                    curve.append(round(float(loss.detach()), 4))
                    if curve[-1] < config.stop:
                        break
                    gradients = torch.autograd.grad(loss, list(self.weights.values()))
                    for weight, gradient in zip(self.weights.values(), gradients, strict=True):
                        weight.grad = gradient
                    optimiser.step()
        finally:
            self._training = False
        return {"curve": curve, "steps": len(curve), "stopped": curve[-1] < config.stop}

    @contextmanager
    def _above(self) -> Iterator[None]:
        """Inside, a pass over what is running begins at the adapter's block: training changes nothing below."""
        parts, layer = anatomy(self.model), self.place.layer
        if parts.encoder is not None or not isinstance(layer, int) or layer == 0:
            yield  # of two stacks the other one would run all the same
            return
        whole: list[Any] = []

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            whole.append(output)

        with torch.no_grad(), Hooks(self.model, forward=[(parts.blocks[layer - 1], keep)]):
            logits_of(self.model, self._running)
        with resumed(self.model, layer, first_tensor(whole[0]), whole[0]):
            yield


def _going_on(patch: Patch, form: str, place: Place, model: Any, tokenizer: Any) -> Routed | None:
    """The adapter of a patch to go on from, None if it has none. Raises ConfigError or BaseMismatchError if it cannot be."""
    check_fits([patch], model, tokenizer)
    for part in patch.parts:
        if len(patch.parts) > 1 or not isinstance(part, Routed) or (part.form, part.place) != (form, place):
            found = f"one of {part.form!r} at {part.place}" if isinstance(part, Routed) else f"a {part.kind} part"
            raise ConfigError(
                f"expected a patch with one {form!r} adapter at {place} to go on from, found {found}; fit with the patch's own "
                "configuration, or without it"
            )
        return part
    return None
