"""The only place that deals with text positions: spaces, special tokens, padding, subject spans, continuations.

Positions come from character offsets on the joint string, never from counting words or from the lengths of fragments
tokenised alone: byte-level BPE glues the leading space to a word, SentencePiece adds one to whatever it is given.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from errata.errors import ConfigError, RequestError, ShapeError, SubjectNotFoundError

Side = Literal["right", "left"]
COUNT_BEHIND_PADDING = {"roberta", "xlm-roberta", "camembert"}  # positions that begin behind the padding's id
_ANCHORS = ("a", ":", "\n")  # short prompts to which a target is joined when it merges with the real one


@dataclass(frozen=True)
class Batch:
    """Padded token ids, all tensors of integers: ids, mask, position_ids (n, T), lengths (n,).

    mask is 1 on real tokens; position_ids count the real tokens of a row from 0, whatever the side of the padding.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    lengths: Tensor

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Keyword arguments for `model`: position_ids only where its forward has them and counts from 0."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        known = "position_ids" in inspect.signature(model.forward).parameters
        if known and getattr(getattr(model, "config", None), "model_type", "") not in COUNT_BEHIND_PADDING:
            inputs["position_ids"] = self.position_ids
        return inputs


def with_space(target: str) -> str:
    """`target` with one leading space, unless it starts with one."""
    return target if target.startswith(" ") else f" {target}"


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of each text, unpadded; with the special tokens that the tokenizer adds (BOS for Llama) if `special`.

    Raises RequestError if a text has no tokens at all.
    """
    with _state_kept(tokenizer):
        rows = [list(row) for row in tokenizer(list(texts), add_special_tokens=special)["input_ids"]] if texts else []
    for i, row in enumerate(rows):
        if not row:
            raise RequestError(f"expected text, found {texts[i]!r} without a token (text {i + 1} of {len(rows)}).")
    return rows


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu", side: Side = "right") -> Batch:
    """Rows of token ids of different lengths as one batch, T being the longest. Raises ShapeError without rows."""
    if side not in ("right", "left"):
        raise ConfigError(f"expected side 'right' or 'left', found {side!r}.")
    if not rows:
        raise ShapeError("expected at least one row to pad, found none.")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, at] = torch.tensor(list(row), dtype=torch.long)
        mask[i, at] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids.to(device), mask.to(device), positions.to(device), mask.sum(1).to(device))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with: the pad token's, else the end-of-text token's, else 0 (the mask hides it)."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in known if isinstance(i, int)), 0)


def start_id(model: Any) -> int:
    """The id that an encoder-decoder's answer begins behind. Raises ConfigError if its config names none."""
    found = getattr(model.config, "decoder_start_token_id", None)
    if found is None:
        found = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.pad_token_id
    if found is None:
        raise ConfigError(
            f"expected a decoder_start_token_id in the config of this {model.config.model_type!r} model, found none; set it."
        )
    return int(found)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    device: torch.device | str = "cpu",
    side: Side = "right",
) -> Batch:
    """Texts as one padded batch, with the special tokens that the tokenizer adds.

    The tokenizer's padding side, pad token and backend state stay as they are; it may have no pad token.
    Raises RequestError if a text has no tokens.
    """
    return pad(token_ids(tokenizer, texts), pad_id(tokenizer), device, side)


def last_positions(mask: Tensor) -> Tensor:
    """(n,) index of the last real token of each row of mask (n, T), for either side of padding."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * steps).amax(1)


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Characters [start, end) of the subject in the prompt: its last occurrence.

    Exact case before any case, and within each a whole word before a part of one ("Rome" is not sought in "Romeo").
    Raises SubjectNotFoundError.
    """
    exact = re.escape(subject)
    for flags in (0, re.IGNORECASE):
        for pattern in (rf"(?<!\w){exact}(?!\w)", exact):
            if subject.strip() and (found := list(re.finditer(pattern, prompt, flags))):
                return found[-1].span()
    raise SubjectNotFoundError(
        f"expected the subject {subject!r} in the prompt {prompt!r}, found no match; "
        f"spell it as in the prompt, or write the prompt with {{}}."
    )


def subject_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> tuple[int, int]:
    """(first, last) index, both inclusive, of the subject's tokens in `tokenizer(prompt)`, special tokens counted.

    A token that holds any character of the subject is one of its tokens.
    Raises SubjectNotFoundError, ConfigError if the tokenizer gives no offsets.
    """
    start, end = subject_span(prompt, subject)
    offsets = _offsets(tokenizer, prompt)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not inside:
        raise SubjectNotFoundError(
            f"expected tokens for the subject {subject!r} in the prompt {prompt!r}, found none: "
            f"{type(tokenizer).__name__} drops these characters; name the subject otherwise."
        )
    return inside[0], inside[-1]


def continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """The ids that the target adds after the prompt, to be appended to the prompt's own ids.

    They are what follows the prompt's tokens in the joint string: prompt, a space, target; no space is added after a
    prompt that ends in one (or in a line break, as chat templates do). If the two merge at the boundary, the target's
    ids are those it has after a neutral word, with a leading space. Raises RequestError for a target without tokens.
    """
    if not target.strip():
        raise RequestError(f"expected a target to follow the prompt {prompt!r}, found {target!r}; name the object.")
    text = target.lstrip(" ") if prompt[-1:].isspace() else with_space(target)
    joined = [(prompt, text), *((anchor, with_space(target)) for anchor in _ANCHORS)]
    for before, after in joined:
        head, whole = _plain_ids(tokenizer, before), _plain_ids(tokenizer, before + after)
        if whole[: len(head)] == head and len(whole) > len(head):
            return whole[len(head) :]
    return token_ids(tokenizer, [with_space(target)], special=False)[0]


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's turn in the tokenizer's chat template, up to where the answer begins.

    A leading BOS is left out if the tokenizer adds its own, so that the text is encoded like any other; the prompt is
    in it unaltered, so that its subject is still found. Raises ConfigError if there is no template, or if it alters
    the prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"expected a tokenizer with a chat template, found none in {tokenizer.name_or_path or 'this tokenizer'!r}; "
            f"set tokenizer.chat_template, or do not ask for chat prompts."
        )
    turn = [{"role": "user", "content": prompt}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    if prompt.strip() not in text:
        raise ConfigError(
            f"expected the chat template to keep the prompt {prompt!r}, found {text!r}; mend the template."
        )
    bos = tokenizer.bos_token
    if isinstance(bos, str) and text.startswith(bos) and token_ids(tokenizer, ["a"])[0][0] == tokenizer.bos_token_id:
        return text[len(bos) :]
    return text


def wrapper(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> Callable[[str], str]:
    """`chat` with this tokenizer if it is wanted, else the text as it is."""
    return partial(chat, tokenizer) if wanted else str


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return token_ids(tokenizer, [text], special=False)[0] if text else []


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each token of `tokenizer(prompt)`; special tokens have (0, 0)."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"expected a fast tokenizer, which knows the characters of its tokens, found {type(tokenizer).__name__}; "
            f"load it with use_fast=True or convert it to a tokenizer.json."
        )
    with _state_kept(tokenizer):
        encoded = tokenizer([prompt], return_offsets_mapping=True, return_special_tokens_mask=True)
    # A special token written out in the text (chat templates) has a span of its own; one that was added has none.
    pairs = zip(encoded["offset_mapping"][0], encoded["special_tokens_mask"][0], strict=True)
    return [(0, 0) if special else (int(a), int(b)) for (a, b), special in pairs]


@contextmanager
def _state_kept(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put back the backend's padding and truncation, which every call of a fast tokenizer overwrites."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
