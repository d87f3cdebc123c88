"""Requests as what a model is trained on and asked: token ids, and what it is to say where. For editors that learn by gradient.

An item is the same on every architecture; what it is fed as depends on the model that runs it: a decoder gets prompt and
target, an encoder-decoder the prompt and on its decoder's side the target, closed by the end token, a classifier the prompt,
its target being a label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from errata.codebook import Place, Replace, mlp_of
from errata.edit import EditRequest
from errata.editors._models import late, late_layer
from errata.editors._value_rows import Row, ValueJob, rows_of
from errata.errors import AnatomyError, ConfigError, RequestError
from errata.model.anatomy import Site, anatomy, role_of
from errata.model.labels import label_id
from errata.model.states import input_device
from errata.model.targets import answer_ids
from errata.model.tokens import pad, start_id, token_ids
from errata.patch import Patch

Call = Callable[..., Any]
"""The model, or the model with other parameters: keyword inputs -> an output with logits."""

# What a streaming editor's report says of a request that is no edit: the model says it by itself, or by earlier edits.
ALREADY, COVERED = "already", "covered"


@dataclass(frozen=True)
class Item(Row):
    """A request as a decoder's row (see `Row`), and as other models take it.

    prompt: ids of the prompt alone, as the tokenizer closes it; answer: of the target, as an encoder-decoder says it; name:
    the target, as a classifier's label.
    """

    prompt: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    name: str = ""


def items_of(tokenizer: Any, requests: Sequence[EditRequest], ending: str = "") -> list[Item]:
    """Each request as one item; `at` is its subject's last token (the prompt's without a subject)."""
    jobs = [ValueJob(r.prompt, r.target_new + ending, r.subject) for r in requests]
    rows = [own[0] for own in rows_of(tokenizer, jobs)]
    prompts = token_ids(tokenizer, [r.text for r in requests])
    answers = answer_ids(tokenizer, [r.target_new + ending for r in requests]) if requests else []
    return [
        Item(**{f.name: getattr(row, f.name) for f in fields(Row)}, prompt=tuple(p), answer=tuple(a), name=r.target_new)
        for row, p, a, r in zip(rows, prompts, answers, requests, strict=True)
    ]


def wanted(model: Any, item: Any) -> tuple[Sequence[int], tuple[int, ...]]:
    """(which of the item's logits are read, the ids that they should say: of the target's tokens, or of the label).

    Raises RequestError for a target that is no label of a classifier, naming those that there are, and ConfigError for a
    model that says nothing (a bare encoder).
    """
    role = role_of(model)
    if role == "decoder":
        return item.reads, item.targets
    if role == "encoder-decoder":
        return range(len(item.answer)), item.answer
    if role == "classifier":
        return (0,), (label_id(model, item.name),)
    raise ConfigError(f"expected a model that answers, found {type(model).__name__} ({role}); load it with its head.")


def logits_of(model: Any, items: Sequence[Any], call: Call | None = None) -> Tensor:
    """(n, T, V) logits of the items as one batch, padded on the right: over tokens, of a classifier over labels with T = 1."""
    role, device = role_of(model), input_device(model)
    batch = pad([item.ids if role == "decoder" else item.prompt for item in items], 0, device)
    inputs: dict[str, Any] = dict(batch.inputs(model))
    if role == "encoder-decoder":
        fed = pad([[start_id(model), *item.answer[:-1]] for item in items], 0, device)
        inputs |= {"decoder_input_ids": fed.ids, "decoder_attention_mask": fed.mask}
    if role in ("decoder", "encoder-decoder"):
        inputs["use_cache"] = False
    logits: Tensor = (call or model)(**inputs).logits
    return logits if logits.ndim == 3 else logits[:, None]


def losses_of(model: Any, items: Sequence[Any], call: Call | None = None, at_prompt: bool = False) -> Tensor:
    """(n,) mean over each item's target tokens (or its label) of -log P, nats.

    at_prompt: all are read where the first is (the published fine-tuning's "prompt_last"), right for targets of one
    token.
    """
    return _losses(model, items, logits_of(model, items, call), at_prompt)


def losses_and_says(
    model: Any, items: Sequence[Any], call: Call | None = None, at_prompt: bool = False
) -> tuple[Tensor, list[bool]]:
    """What `losses_of` and `says` find, from one pass."""
    logits = logits_of(model, items, call)
    return _losses(model, items, logits, at_prompt), _said(model, items, logits)


def says(model: Any, items: Sequence[Any], call: Call | None = None, batch: int = 64) -> list[bool]:
    """Whether greedy decoding of each item's prompt says its whole target (of an encoder-decoder: and ends there), or its label."""
    found = []
    with torch.no_grad():
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            found += _said(model, chunk, logits_of(model, chunk, call))
    return found


def _losses(model: Any, items: Sequence[Any], logits: Tensor, at_prompt: bool) -> Tensor:
    wide, found = torch.promote_types(logits.dtype, torch.float32), []
    for i, item in enumerate(items):
        reads, targets = wanted(model, item)
        where = [reads[0]] * len(reads) if at_prompt else list(reads)
        found.append(F.cross_entropy(logits[i, where].to(wide), torch.tensor(targets, device=logits.device)))
    return torch.stack(found)


def _said(model: Any, items: Sequence[Any], logits: Tensor) -> list[bool]:
    """For each item whether its logits (T, V) are highest for what they should say."""
    found = []
    for own, item in zip(logits.detach(), items, strict=True):
        reads, targets = wanted(model, item)
        found.append(tuple(own[list(reads)].argmax(-1).tolist()) == tuple(targets))
    return found


# -- places --------------------------------------------------------------------------------------------------------------


def layer_of(model: Any, layer: Site | None, default: Site) -> Site:
    """A block from 0, of an encoder-decoder's encoder as "encoder.3". Raises AnatomyError naming the valid range."""
    parts = anatomy(model)
    stack, within = parts.stack_of(default if layer is None else layer)
    path = stack.site(within)
    if path not in stack.blocks:
        raise AnatomyError(f"expected a layer, found {layer!r}; name a block by its number, as in 3 or 'encoder.3'")
    index = stack.blocks.index(path)
    return f"encoder.{index}" if stack is parts.encoder else index


def place_of(
    model: Any, layer: Site | None, site: str | None, replace: Replace | None, key: str | None
) -> tuple[Place, str]:
    """Where an editor acts, and which token asks: what its config leaves open is the model's to say.

    The layer is near three quarters of the depth, and the map its MLP; a classifier asks at its first token, which the head
    reads, all others at the prompt's last. In a decoder each token asks for itself; an encoder reads a text at once, and
    the token that asks is the only one to be replaced. Where the prompt's tokens are replaced, or its subject asks, the layer
    is one of a stack that reads the prompt (of an encoder-decoder its encoder), and the last token asks. Raises AnatomyError
    for a layer that is not there, ConfigError where nothing would be replaced or no token could ask.
    """
    parts = anatomy(model)
    if layer is None and parts.encoder and (replace == "prompt" or key == "subject"):
        layer = f"encoder.{late(parts.encoder.n_layers)}"
    found = layer_of(model, layer, late_layer(model))
    stack = parts.stack_of(found)[0]
    asks = key or ("first" if parts.role == "classifier" and replace != "prompt" else "last")
    answering = parts.encoder is not None and stack is parts
    if answering and (asks == "subject" or replace == "prompt"):
        raise ConfigError(
            f"expected a layer that reads the prompt (key={key!r}, replace={replace!r}), found the decoder's {found}, which asks at its "
            "start token; name a layer of the encoder, as in 'encoder.1', or leave key and replace open"
        )
    if asks == "first" and replace == "prompt":
        raise ConfigError(
            "expected replace 'each', 'last' or 'all' with key 'first', found 'prompt': it replaces the tokens before the one that "
            "asks, and before the first there is none; take key='last'"
        )
    alone = stack.role != parts.role or parts.role == "classifier"
    mode: Replace = replace or ("last" if alone and asks != "subject" else "each")
    if site is None:
        site = "mlp" if mlp_of(parts, found) is not None else "mlp_out"
    return Place(found, site, mode, "first" if asks == "first" else "last"), asks


def column_of(model: Any, layer: Site, item: Any, which: str) -> int:
    """The token of an item that asks at a layer (see `place_of`): the prompt's "first" or "last", or the "subject"'s last.

    In a decoder behind an encoder it is the start token, which the answer's first word is read from.
    """
    if role_of(model) == "encoder-decoder":
        parts = anatomy(model)
        if parts.stack_of(layer)[0] is not parts.encoder:
            return 0
    return {"first": 0, "subject": item.at, "last": len(item.prompt) - 1}[which]


def refuse_known(before: Patch, requests: Sequence[EditRequest]) -> None:
    """Raise RequestError for a request that the patch to go on from holds already."""
    if twice := set(before.ids) & {request.id for request in requests}:
        raise RequestError(
            f"the patch to go on from holds the edit {sorted(twice)[0]} already; leave it out, or remove it there"
        )


def with_contradictions(
    report: dict[str, dict[str, Any]], requests: Sequence[EditRequest]
) -> dict[str, dict[str, Any]]:
    """The report with what `contradictions` says of the requests, of the earlier one of two as well as of the later."""
    return report | {i: report.get(i, {}) | marks for i, marks in contradictions(requests).items()}


def contradictions(requests: Sequence[EditRequest]) -> dict[str, dict[str, list[str]]]:
    """What a report says of requests about one thing: of the later "contradicts", of the earlier "overruled", by ids."""
    found: dict[str, dict[str, list[str]]] = {}
    standing: dict[str, list[EditRequest]] = {}  # of each key: they agree
    for later in requests:
        agreeing = []
        for earlier in standing.get(later.key, []):
            if earlier.target_new == later.target_new:
                agreeing.append(earlier)
            else:
                found.setdefault(later.id, {}).setdefault("contradicts", []).append(earlier.id)
                found.setdefault(earlier.id, {}).setdefault("overruled", []).append(later.id)
        standing[later.key] = [*agreeing, later]
    return found


def later_wins(patch: Patch) -> Patch:
    """A patch of independent edits of weights without what overruled ones wrote, to which the later ones' would add; both are
    reported."""
    marks, kept = contradictions(patch.requests), patch
    for edit, own in marks.items():
        if "overruled" in own:
            kept = kept.without(edit)
    return (
        replace(patch, parts=kept.parts, report=with_contradictions(patch.report, patch.requests)) if marks else patch
    )
