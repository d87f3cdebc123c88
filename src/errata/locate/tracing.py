"""Causal tracing: which states, MLPs and attentions carry a fact from its subject to its answer.

Source: Meng et al. 2022 (ROME), section 2. One clean and S corrupted passes (noise on the subject's token embeddings),
then for every (token, layer) cell a corrupted pass with one clean thing put back: the block's output, or the outputs of
the MLPs or attentions of a window of layers. Effects are differences of the mean probability of the answer's first token.

Differs from the published code: cells run in batches, each pass begins at the first layer that it changes (the states
below are those of the corrupted pass), tokens before the subject, which causal attention keeps from the noise, have
exactly no effect and are not run; windows scale with the depth; the subject is found by character offsets, its last
occurrence, and may end the prompt; `replace` holds for every pass.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import AnatomyError, ConfigError, RequestError, SubjectNotFoundError
from errata.locate.facts import KnownFact
from errata.locate.noise import Noise
from errata.locate.resume import resumed
from errata.model.anatomy import Anatomy, anatomy, submodule
from errata.model.attached import without_patches
from errata.model.hooks import Capture, Hooks, intervene
from errata.model.states import evaluating, input_device
from errata.model.tokens import continuation_ids, pad, subject_tokens, token_ids

Kind = Literal["hidden", "mlp", "attention"]
Correct = Literal["first_token", "whole", "any"]
PAPER_DEPTH, PAPER_WINDOW = 48, 10  # GPT-2 XL


@dataclass(frozen=True)
class TracingConfig:
    """What is put back, and how often the noise is drawn. The paper's values but for `window`, which scales with depth.

    kind: "hidden" (one block's output), "mlp" or "attention" (module outputs in a window of layers); window: layers, None
    for max(1, round(10 L / 48)); sever: "mlp", "attention" or both: modules kept as corrupted at the restored token (only
    with "hidden"); samples: noise draws S; replace: noise instead of the embedding, not on top; seed of the noise;
    batch_tokens: rows x tokens of one pass.
    """

    kind: Kind = "hidden"
    window: int | None = None
    sever: tuple[Kind, ...] = ()
    samples: int = 10
    replace: bool = False
    seed: int = 1
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"expected kind {', '.join(get_args(Kind))}, found {self.kind!r}.")
        for name in ("window", "samples", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"expected {name} to be a whole number above 0, found {value!r}.")
        if self.sever and (self.kind != "hidden" or not set(self.sever) <= {"mlp", "attention"}):
            raise ConfigError(
                f"expected to sever mlp or attention while hidden states are restored, found {', '.join(self.sever)} "
                f"with {self.kind}; leave sever empty, or trace hidden."
            )


@dataclass(frozen=True, eq=False)
class Trace:
    """One fact traced. Probabilities are of the answer's first token after the prompt, means over the noise draws.

    tokens: the prompt's T tokens as text; first, last: the subject's, inclusive; window: layers put back at once (1 for
    hidden); restored (T, L) float64 on CPU: probability with the cell (token, layer or centre of the window) put back.
    """

    fact: KnownFact
    tokens: tuple[str, ...]
    first: int
    last: int
    answer: str
    answer_id: int
    kind: Kind
    window: int
    sever: tuple[Kind, ...]
    clean: float
    corrupted: float
    restored: Tensor = field(repr=False)

    @property
    def total_effect(self) -> float:
        """TE: what the corruption takes away."""
        return self.clean - self.corrupted

    @property
    def indirect_effects(self) -> Tensor:
        """(T, L) IE: what putting one cell back gives."""
        return self.restored - self.corrupted

    def json(self) -> dict[str, Any]:
        """As JSON values; `of` reads them."""
        return asdict(self) | {"restored": self.restored.tolist()}

    @classmethod
    def of(cls, value: dict[str, Any]) -> "Trace":
        """The trace that `json` wrote."""
        rows = {"tokens": tuple(value["tokens"]), "sever": tuple(value["sever"])}
        restored = torch.tensor(value["restored"], dtype=torch.float64)
        return cls(**value | rows | {"fact": KnownFact(**value["fact"]), "restored": restored})


@dataclass(frozen=True)
class Dropped:
    """A fact that was not traced, and why, in words."""

    fact: KnownFact
    reason: str


def scaled_window(n_layers: int) -> int:
    """Layers of a window in a model of this depth: ten of 48, scaled, at least one."""
    return max(1, round(PAPER_WINDOW * n_layers / PAPER_DEPTH))


def window_of(layer: int, width: int, n_layers: int) -> range:
    """The layers that a window restores: [layer - floor(w/2), layer + ceil(w/2)) within the model."""
    return range(max(0, layer - width // 2), min(n_layers, layer - (-width // 2)))


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fact: KnownFact,
    noise: Noise,
    config: TracingConfig | None = None,
    *,
    answer: str | None = None,
) -> Trace:
    """Trace one fact over all tokens and layers.

    answer: follow the probability of its first token, instead of the model's own answer's. Patches on the model
    rest meanwhile; weights, modes, hooks and random state stay as they are.
    Raises SubjectNotFoundError; RequestError for a prompt longer than the model takes; AnatomyError for a model that is
    no decoder with a head, or lacks the part to restore.
    """
    config = config or TracingConfig()
    target = None if answer is None else continuation_ids(tokenizer, fact.prompt, answer)[0]
    with _undisturbed(model):
        runs = _Runs(model, tokenizer, fact, noise, config)
        return runs.trace(tokenizer, runs.argmax if target is None else target)


def trace_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Iterable[KnownFact],
    noise: Noise,
    config: TracingConfig | None = None,
    *,
    correct: Correct = "first_token",
) -> Iterator[Trace | Dropped]:
    """For each fact, in order, its trace, or why it was dropped.

    correct: which facts with an attribute the model is held to know: "first_token": its most probable token begins the
    attribute; "whole": that token, stripped, is the attribute (the published rule, which loses attributes of several
    tokens); "any". A fact whose subject the tokenizer cannot place, or whose prompt is too long, is dropped as well.
    Raises AnatomyError like `trace`, ConfigError for another rule.
    """
    config = config or TracingConfig()
    if correct not in get_args(Correct):
        raise ConfigError(f"expected correct {', '.join(get_args(Correct))}, found {correct!r}.")
    for fact in facts:
        yield _outcome(model, tokenizer, fact, noise, config, correct)


def _outcome(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fact: KnownFact,
    noise: Noise,
    config: TracingConfig,
    correct: Correct,
) -> Trace | Dropped:
    try:
        with _undisturbed(model):
            runs = _Runs(model, tokenizer, fact, noise, config)
            said = str(tokenizer.decode([runs.argmax])).strip()
            if fact.attribute is not None and correct != "any":
                begins = runs.argmax == continuation_ids(tokenizer, fact.prompt, fact.attribute)[0]
                if not (begins if correct == "first_token" else said == fact.attribute.strip()):
                    return Dropped(fact, f"the model says {said!r}, not {fact.attribute!r}")
            return runs.trace(tokenizer, runs.argmax)
    except (SubjectNotFoundError, RequestError) as error:
        return Dropped(fact, str(error))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), evaluating(model), without_patches(model):
        yield


class _Runs:
    """The clean pass (row 0) and the S corrupted ones (rows 1 to S) of one prompt, and what later passes need of them.

    entries: L + 1 tensors (1 + S, T, d): what each block reads, and what the last one writes; modules: per kind, L tensors
    of module outputs, as (1 + S, T, d).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        fact: KnownFact,
        noise: Noise,
        config: TracingConfig,
    ) -> None:
        self.model, self.fact, self.noise, self.config = model, fact, noise, config
        self.first, self.last = subject_tokens(tokenizer, fact.prompt, fact.subject)
        [self.ids] = token_ids(tokenizer, [fact.prompt])
        _check_length(model, self.ids)
        self.parts = _parts(model)
        self.window = 1 if config.kind == "hidden" else config.window or scaled_window(self.parts.n_layers)
        self.paths = {kind: _paths(model, self.parts, kind) for kind in {config.kind, *config.sever} - {"hidden"}}
        self._run()

    def _run(self) -> None:
        """The full passes, in one batch."""
        blocks, rows = self.parts.blocks, 1 + self.config.samples
        outputs = [path for paths in self.paths.values() for path in paths]
        raw: list[Any] = []
        first_block = Hooks(self.model, forward={blocks[0]: lambda module, args, kwargs, output: raw.append(output)})
        with (
            intervene(self.model, {self.parts.embed: self._corrupt}),
            Capture(self.model, blocks, of="input") as read,
            Capture(self.model, [blocks[-1], *outputs]) as written,
            first_block,
        ):
            logits = self._logits(rows)
        self.like = raw[0]
        self.entries = [*(read[path] for path in blocks), written[blocks[-1]]]
        self.modules = {
            kind: [written[path].reshape(rows, len(self.ids), -1) for path in paths]
            for kind, paths in self.paths.items()
        }
        self.probabilities = logits.softmax(-1)
        self.argmax = int(logits[0].argmax())

    def _corrupt(self, embedded: Tensor) -> Tensor:
        """Embeddings (1 + S, T, d) with noise on the subject in all rows but the first."""
        subject = slice(self.first, self.last + 1)
        shape = (self.config.samples, self.last + 1 - self.first, embedded.shape[-1])
        drawn = torch.from_numpy(self.noise.draw(shape, self.config.seed)).to(embedded)
        corrupted = embedded.clone()
        corrupted[1:, subject] = drawn if self.config.replace else corrupted[1:, subject] + drawn
        return corrupted

    def _logits(self, rows: int) -> Tensor:
        """(rows, V), at least float32: the last token's, of so many copies of the prompt."""
        batch = pad([self.ids] * rows, 0, input_device(self.model))
        inputs: dict[str, Any] = dict(batch.inputs(self.model))
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        logits: Tensor = self.model(**inputs, use_cache=False).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def trace(self, tokenizer: PreTrainedTokenizerBase, answer: int) -> Trace:
        """Every cell's probability of the token `answer`."""
        clean, *corrupted = self.probabilities[:, answer].double().cpu()
        base = float(torch.stack(corrupted).mean())
        restored = torch.full((len(self.ids), self.parts.n_layers), base, dtype=torch.float64)
        at_once = max(1, self.config.batch_tokens // (self.config.samples * len(self.ids)))
        for layer in range(self.parts.n_layers):
            for start in range(self.first, len(self.ids), at_once):
                tokens = list(range(start, min(start + at_once, len(self.ids))))
                restored[tokens, layer] = self._cells(tokens, layer, answer)
        return Trace(
            fact=self.fact,
            tokens=_labels(tokenizer, self.ids),
            first=self.first,
            last=self.last,
            answer=_labels(tokenizer, [answer])[0],
            answer_id=answer,
            kind=self.config.kind,
            window=self.window,
            sever=tuple(self.config.sever),
            clean=float(clean),
            corrupted=base,
            restored=restored,
        )

    def _cells(self, tokens: Sequence[int], layer: int, answer: int) -> Tensor:
        """(len(tokens),) mean probabilities with `layer`, or the window around it, restored at each token in turn.

        A batch holds S corrupted rows for each token; row r belongs to token r // S and noise draw r % S.
        """
        samples, kind, n_layers = self.config.samples, self.config.kind, self.parts.n_layers
        layers = window_of(layer, self.window, n_layers)
        start = layer + 1 if kind == "hidden" else layers.start
        where = torch.tensor(tokens).repeat_interleave(samples)
        states = self.entries[start][1:].repeat(len(tokens), 1, 1)
        changes = {}
        if kind == "hidden":
            states = _put(states, where, self.entries[start][0, where])
        else:
            for at in layers:
                changes[self.paths[kind][at]] = _putting(where, self.modules[kind][at][0, where])
        draws = 1 + torch.arange(samples).repeat(len(tokens))
        for severed in self.config.sever:  # at the layers below `start` the modules are as corrupted anyway
            for at in range(start, n_layers):
                changes[self.paths[severed][at]] = _putting(where, self.modules[severed][at][draws, where])
        with resumed(self.model, start, states, self.like), intervene(self.model, changes):
            logits = self._logits(len(where))
        return logits.softmax(-1)[:, answer].double().cpu().reshape(len(tokens), samples).mean(1)


def _put(states: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """`states` (n, T, d) with row r's token where[r] set to values[r]."""
    changed = states.clone()
    changed[torch.arange(len(where)), where] = values.to(states)
    return changed


def _putting(where: Tensor, values: Tensor) -> Any:
    """`_put` as a change of a module's output, (n, T, d) or flattened to (n * T, d)."""
    return lambda output: _put(output.reshape(len(where), -1, output.shape[-1]), where, values).reshape(output.shape)


def _parts(model: PreTrainedModel) -> Anatomy:
    parts = anatomy(model)
    if parts.role != "decoder" or parts.head is None:
        raise AnatomyError(
            f"expected a decoder with a language-model head to trace, found {type(model).__name__} ({parts.role}); "
            "load it as a causal language model."
        )
    return parts


def _paths(model: PreTrainedModel, parts: Anatomy, kind: Kind) -> tuple[str, ...]:
    """The modules, one per layer, whose outputs a window of this kind restores."""
    paths = parts.mlp_out if kind == "mlp" else parts.attention
    if not paths:
        raise AnatomyError(
            f"expected one {kind} module per layer to restore, found none in this {parts.family!r} model."
        )
    if kind == "attention" and "residual" in inspect.signature(submodule(model, paths[0]).forward).parameters:
        raise AnatomyError(
            f"the attention modules of this {parts.family!r} model add the residual themselves, so their output is no "
            "attention output; trace hidden or mlp."
        )
    return paths


def _check_length(model: PreTrainedModel, ids: Sequence[int]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and len(ids) > limit:
        raise RequestError(f"expected a prompt of at most {limit} tokens, found {len(ids)}; shorten it.")


def _labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text; as the tokenizer's own piece where it is only a part of a character."""
    texts = [str(tokenizer.decode([i])) for i in ids]
    pieces = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
    return tuple(piece if "\ufffd" in text or not text else text for text, piece in zip(texts, pieces, strict=True))
