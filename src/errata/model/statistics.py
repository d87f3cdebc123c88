"""Key statistics of a model: the uncentred second moment of the keys of some layers, over a corpus.

A key is the input of an MLP's output projection (`Anatomy.mlp_site`). As published for ROME and MEMIT: every token that is
no padding counts, position 0 and the special tokens that the tokenizer adds included; a text is cut to so many tokens;
C = E[k k^T] is not centred. Unlike the published code, sums are float64, the cache goes by content, and all layers asked
for are gathered in one pass, which ends before the deepest layer's projection.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import ConfigError, StatisticsError
from errata.maths.covariance import CholeskySolver, SecondMoment
from errata.model.anatomy import anatomy
from errata.model.corpora import Texts, as_texts, digest
from errata.model.fingerprint import tokenizer_hash
from errata.model.key_pass import GROUP, Pass, Progress
from errata.model.statistics_files import Store, read, weights_up_to

MAX_TOKENS = 1024  # of a text; ROME's for GPT-2


@dataclass(frozen=True)
class KeyStatistics:
    """C = E[k k^T] of one layer (counted from 0). identity: everything that the numbers depend on, JSON-ready."""

    layer: int
    moment: SecondMoment
    identity: dict[str, Any]

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.moment.count

    @property
    def width(self) -> int:
        """m, the length of a key."""
        return self.moment.width

    @property
    def matrix(self) -> Tensor:
        """(m, m) float64: C, uncentred, squared activation units."""
        return self.moment.matrix

    def solver(self, jitter: float | None = None, device: torch.device | str | None = None) -> CholeskySolver:
        """Solves with C + jitter I; jitter in units of the mean diagonal entry, see `CholeskySolver`.

        Raises StatisticsError with fewer tokens than m, or naming the smallest eigenvalue of a singular C.
        """
        return self.moment.solver(jitter, device)

    def check(self, model: PreTrainedModel, layer: int) -> None:
        """Raises StatisticsError unless these are statistics of this layer (negative: from the end) of this model.

        Weights are compared up to the layer's keys, by `tensor_hash`: the dtype that the model was loaded in is free.
        """
        asked = _from_zero(model, layer)
        if asked != self.layer:
            raise StatisticsError(
                f"expected key statistics of layer {asked}, found those of layer {self.layer}; gather them."
            )
        found = weights_up_to(model, [asked])[asked]
        if self.identity["weights"] != found:
            raise StatisticsError(
                f"expected key statistics of this {anatomy(model).family!r} model, found those of another one "
                f"({self.identity['family']!r}, or other weights up to layer {asked}); gather them on this model."
            )


def load_statistics(path: str | os.PathLike[str], model: PreTrainedModel, layer: int) -> KeyStatistics:
    """Statistics from a file of the cache. Raises StatisticsError for a damaged or unfinished one, and as `check`."""
    found = read(path)
    if not found.finished:
        raise StatisticsError(f"{path} is of a run that was interrupted; repeat the command that began it.")
    statistics = KeyStatistics(int(found.identity["layer"]), found.moment, dict(found.identity))
    statistics.check(model, layer)
    return statistics


def found_statistics(
    model: PreTrainedModel, layers: Sequence[int], cache: str | os.PathLike[str] | bool | None = None
) -> dict[int, KeyStatistics]:
    """{layer: its statistics} from the cache, over whatever corpus; of several the one with the most tokens.

    Raises StatisticsError for a layer of this model of which nothing was gathered.
    """
    found = {}
    for layer, path in found_files(model, layers, cache).items():
        number = _from_zero(model, layer)
        if path is None:
            raise StatisticsError(
                f"expected key statistics of layer {number} of this {anatomy(model).family!r} model, found none; gather them "
                f"with `errata statistics --layers {number}`, name a corpus, or do without (statistics=None)."
            )
        best = read(path)
        found[layer] = KeyStatistics(number, best.moment, dict(best.identity))
    return found


def found_files(
    model: PreTrainedModel, layers: Sequence[int], cache: str | os.PathLike[str] | bool | None = None
) -> dict[int, Path | None]:
    """{layer: the file that `found_statistics` reads}, named by what it holds; None for a layer of which nothing was gathered."""
    asked = {layer: _from_zero(model, layer) for layer in layers}
    weights, store = weights_up_to(model, sorted(set(asked.values()))), Store(cache)
    return {layer: store.of_weights(number, weights[number]) for layer, number in asked.items()}


def key_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Texts | Iterable[str],
    layers: Sequence[int],
    *,
    n_texts: int | None = None,
    n_tokens: int | None = None,
    max_tokens_per_text: int = MAX_TOKENS,
    batch_tokens: int = 4096,
    product: str = "float64",
    cache: str | os.PathLike[str] | bool | None = None,
    progress: Progress | None = None,
) -> dict[int, KeyStatistics]:
    """{layer as asked for: its statistics}, from the cache, or from one pass over the corpus for all that it lacks.

    n_texts: use the first so many texts that are not blank (None: all); n_tokens: stop behind the text with which so
    many tokens are reached; max_tokens_per_text: cut texts, at most at the model's context; batch_tokens: padded tokens
    per forward pass; product: "float64", or "float32" (see `SecondMoment` for its error). progress is called with how
    many texts are done, and of how many.

    cache: a folder, None for `cache_directory()`, False for none. The key of a file is everything that changes the
    numbers. An interrupted pass is kept there about every ten seconds and gone on with; its sums are then the same, bit
    for bit. Attached patches do nothing here, and the model and its random state stay as they are.

    Raises AnatomyError for a layer out of range, ConfigError for bad numbers, StatisticsError for a corpus without text
    or keys that are not finite.
    """
    cap = _check(model, layers, max_tokens_per_text, n_texts, n_tokens, batch_tokens)
    wanted = {layer: _from_zero(model, layer) for layer in layers}
    source, store = as_texts(corpus), Store(cache)
    texts = None if source.revision is not None else source.first(n_texts)
    sample = n_texts if texts is None else len(texts)
    limits = {"n_texts": sample, "n_tokens": n_tokens, "max_tokens_per_text": cap}
    revision = source.revision if texts is None else digest(texts)
    about = {"corpus": {"name": source.name, "revision": revision}, **limits, "product": product}
    identities = _identities(model, tokenizer, sorted(set(wanted.values())), about)
    found = {layer: store.find(identity) for layer, identity in identities.items()}
    sums = {layer: one for layer, one in found.items() if one is not None}
    missing = [layer for layer in identities if layer not in sums]
    if missing:
        texts = source.first(n_texts) if texts is None else texts
        if not texts:
            raise StatisticsError(f"expected texts in the corpus {source.name!r}, found none that is not blank.")
        pass_ = Pass(model, tokenizer, cap, n_tokens, batch_tokens)
        sums |= pass_.run(texts, {layer: identities[layer] for layer in missing}, store, progress)
    made = {layer: KeyStatistics(layer, one.moment, dict(one.identity)) for layer, one in sums.items()}
    return {asked: made[layer] for asked, layer in wanted.items()}


def _check(
    model: PreTrainedModel,
    layers: Sequence[int],
    cap: int,
    n_texts: int | None,
    n_tokens: int | None,
    batch_tokens: int,
) -> int:
    """The cap in force: no more tokens of a text than the model's context."""
    if not layers:
        raise ConfigError("expected at least one layer to gather key statistics of, found none.")
    numbers = {"max_tokens_per_text": cap, "n_texts": n_texts, "n_tokens": n_tokens, "batch_tokens": batch_tokens}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"expected {name} of at least 1, found {number}.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(cap, context) if isinstance(context, int) else cap


def _from_zero(model: PreTrainedModel, layer: int) -> int:
    parts = anatomy(model)
    return parts.mlp_out.index(parts.mlp_site(layer))


def _identities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int], about: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    parts = anatomy(model)
    weights = weights_up_to(model, layers)
    common = {"family": parts.family, "dtype": str(model.dtype), "tokenizer": tokenizer_hash(tokenizer), "group": GROUP}
    return {
        layer: {"layer": layer, "site": parts.mlp_site(layer), "weights": weights[layer], **common, **about}
        for layer in layers
    }
