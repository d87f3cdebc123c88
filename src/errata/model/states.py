"""Hidden states of many texts at chosen layers and positions, at the price of the layers below only."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import AnatomyError, ShapeError
from errata.model.anatomy import Anatomy, Site, anatomy
from errata.model.hooks import ForwardHook, Hooks, first_tensor
from errata.model.room import check_room
from errata.model.sparing import can_spare, sparing
from errata.model.tokens import pad, start_id, token_ids

CPU_TOKENS = 1024  # padded tokens a pass runs: activations that stay in a core's cache
OTHER_TOKENS = 8192
PASS_SHARE = 32  # a pass costs about as much as this part of a full one's tokens, however few it has


class _Stop(Exception):
    """Everything asked for has been computed."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on leaving, every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids: the embedding's device, also when layers are spread over several."""
    return next(model.get_input_embeddings().parameters()).device


def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    site: Site = "final",
    batch_tokens: int | None = None,
) -> Tensor:
    """(n, d) float32 on CPU: the state of each text's last token at `site`, activation units.

    site: a layer (its block's output) or "final" (after the final norm). The tokenizer adds its special tokens. Of an
    encoder-decoder these are the states that the answer's first token is read from; "encoder.final" and its like are at the
    prompt's last token.
    Raises RequestError for a text without tokens, AnatomyError for a bad site.
    """
    rows = token_ids(tokenizer, texts)
    check_room(model, rows, texts)
    states = states_at(model, rows, [[-1]] * len(rows), [site], batch_tokens=batch_tokens)[site]
    return torch.cat(states) if states else torch.empty(0, anatomy(model).d_model)


def states_at(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    batch_tokens: int | None = None,
    decoder_rows: Sequence[Sequence[int]] | None = None,
) -> dict[Site, list[Tensor]]:
    """States of tokenised texts: for each site one (len(positions[i]), d) float32 CPU tensor per row, in input order.

    rows: token ids, of different lengths; positions: token indices per row, negative ones count from the row's end;
    decoder_rows: of an encoder-decoder, what its decoder is fed, by default its start token alone. Positions then are in the
    decoder's rows, unless the sites are the encoder's ("encoder.2"); one call reads one stack.
    batch_tokens: padded tokens per forward pass, by default what suits the device. Attached patches act. The forward pass
    stops after the last module needed, and leaves no hook; weights, modes, gradients and random state stay as they are.
    Raises ShapeError if a position lies outside its row, AnatomyError for a bad site or for sites of both stacks,
    RequestError for a row that is longer than the model's positions.
    """
    check_room(model, rows)
    batch_tokens = batch_tokens or (CPU_TOKENS if input_device(model).type == "cpu" else OTHER_TOKENS)
    parts = anatomy(model)
    paths = {site: parts.site(site) for site in sites}
    fed = _decoder_rows(model, rows, decoder_rows) if parts.encoder else None
    options = {} if parts.role in ("encoder", "classifier") else {"use_cache": False}
    stacks = {parts.stack_of(site)[0].role: parts.stack_of(site)[0] for site in sites}
    if len(stacks) > 1:
        raise AnatomyError(
            f"expected sites of one stack, found {', '.join(map(str, sites))}; read each in a call of its own."
        )
    stack = next(iter(stacks.values()), parts)
    read = rows if fed is None or stack is parts.encoder else fed  # the rows that positions are in
    where = _absolute(read, positions)
    found: dict[Site, list[Tensor]] = {site: [torch.empty(0, parts.d_model)] * len(rows) for site in paths}
    order = [i for i in sorted(range(len(rows)), key=lambda i: len(rows[i])) if where[i]]
    with torch.no_grad(), evaluating(model):
        for chunk in _chunks(order, [len(row) for row in rows], batch_tokens):
            inputs = pad([rows[i] for i in chunk], 0, input_device(model)).inputs(model)
            if fed is not None:
                answers = pad([fed[i] for i in chunk], 0, input_device(model))
                inputs |= {"decoder_input_ids": answers.ids, "decoder_attention_mask": answers.mask}
            index = torch.tensor([(r, t) for r, i in enumerate(chunk) for t in where[i]])
            width = max(len(read[i]) for i in chunk)
            with _sparing(model, stack, list(paths.values()), (index[:, 0] * width + index[:, 1]).unique()):
                picked = _forward(model, inputs | options, list(paths.values()), index)
            for site, path in paths.items():
                for i, states in zip(chunk, torch.split(picked[path], [len(where[i]) for i in chunk]), strict=True):
                    found[site][i] = states.clone()
    return found


def _absolute(rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[list[int]]:
    if len(rows) != len(positions):
        raise ShapeError(f"expected one list of positions per row, found {len(positions)} for {len(rows)} rows.")
    for i, (row, wanted) in enumerate(zip(rows, positions, strict=True)):
        for t in wanted:
            if not -len(row) <= t < len(row):
                raise ShapeError(f"expected positions within the {len(row)} tokens of row {i}, found {t}.")
    return [[t % len(row) for t in wanted] for row, wanted in zip(rows, positions, strict=True)]


def _chunks(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows in ascending length, cut where passes together are cheapest: by the tokens they run, padding included, and a price of each.

    A pass has at most `batch_tokens` padded tokens, but for a row that is longer by itself.
    """
    price = batch_tokens // PASS_SHARE
    best, cut = [0.0], [0]  # of the first i rows: the least cost, and where its last pass begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        first = min(end - 1, max(0, end - max(1, batch_tokens // max(1, longest))))
        costs = [best[start] + price + (end - start) * longest for start in range(first, end)]
        best.append(min(costs))
        cut.append(first + costs.index(best[-1]))
    ends, end = [], len(order)
    while end:
        ends.append(end)
        end = cut[end]
    for end in reversed(ends):
        yield list(order[cut[end] : end])


def _decoder_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], decoder_rows: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    if decoder_rows is None:
        return [[start_id(model)]] * len(rows)
    if len(decoder_rows) != len(rows):
        raise ShapeError(f"expected one decoder row per row, found {len(decoder_rows)} for {len(rows)} rows.")
    return decoder_rows


def _sparing(model: PreTrainedModel, stack: Anatomy, paths: Sequence[str], flat: Tensor) -> AbstractContextManager[Any]:
    """Inside, the last block that a pass needs spares its MLP the tokens that are not read, if it can."""
    layers = [stack.blocks.index(path) if path in stack.blocks else stack.n_layers - 1 for path in paths]
    return (
        sparing(model, stack, max(layers), flat) if layers and can_spare(model, stack, max(layers)) else nullcontext()
    )


def _forward(model: PreTrainedModel, inputs: dict[str, Any], paths: Sequence[str], index: Tensor) -> dict[str, Tensor]:
    """{path: (len(index), d)}: states at index (m, 2) of row and position, computing no further than needed."""
    picked: dict[str, Tensor] = {}

    def keep(path: str) -> ForwardHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = first_tensor(output)
            at = index.to(states.device)
            picked[path] = states[at[:, 0], at[:, 1]].float().cpu()
            if len(picked) == len(set(paths)):
                raise _Stop

        return hook

    with Hooks(model, forward=[(path, keep(path)) for path in dict.fromkeys(paths)]), suppress(_Stop):
        model(**inputs)
    return picked
