"""Contexts for keys and values: what stands before a prompt, so that an edit does not hang on one wording of its beginning.

Templates have one `{}` for the whole prompt. Generated ones are the model's own text, as in ROME (10 of 5 tokens and 10 of
10, sampled from nothing) and MEMIT (5 of 10 tokens, each from a one-word start), under a seed. Fixed ones need no model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.editor import quiet
from errata.errors import ConfigError
from errata.model.generate import sampled
from errata.model.tokens import pad_id, token_ids

BARE = "{}"
ROME_LENGTHS = (5,) * 10 + (10,) * 10
MEMIT_STARTS = ("The", "Therefore", "Because", "I", "You")
MEMIT_LENGTH = 10

FIXED = (
    "{}",
    "A short note on the subject. {}",
    "This is from an old notebook. {}",
    "The weather was mild that week. {}",
    "Several readers wrote in about this. {}",
    "There is more to say later. {}",
    "It was mentioned over dinner. {}",
    "He looked it up twice. {}",
    "We begin with a simple point. {}",
    "The next page is about something else. {}",
    "You may have heard of it before. {}",
    "First, some background for the class. {}",
    "Nobody in the room disagreed. {}",
    "Here is what the guide said. {}",
    "As the lecture went on, one thing was clear. {}",
    "They had been talking for an hour. {}",
    "That question comes up often. {}",
    "Not everything in the report was new. {}",
    "I read this in a magazine. {}",
    "The second paragraph is shorter. {}",
    "Turn to the chapter on people and places. {}",
)


def rome_contexts(model: Any, tokenizer: Any, seed: int = 0, lengths: Sequence[int] = ROME_LENGTHS) -> tuple[str, ...]:
    """The bare prompt and one generated prefix per length (tokens, the start-of-text token counted): ROME's 21 by default."""
    start = _start(tokenizer)
    texts = continuations(model, tokenizer, [start] * len(lengths), lengths, seed=seed)
    return (BARE, *(template(text) for text in texts))


def memit_contexts(
    model: Any, tokenizer: Any, seed: int = 0, starts: Sequence[str] = MEMIT_STARTS, length: int = MEMIT_LENGTH
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """MEMIT's two types of contexts: the bare prompt, and one prefix of `length` tokens from each start word.

    Keys are averaged within a type, then over types: see `type_weights`.
    """
    texts = continuations(model, tokenizer, token_ids(tokenizer, starts), [length] * len(starts), seed=seed)
    return (BARE,), tuple(template(text) for text in texts)


def type_weights(types: Sequence[Sequence[str]]) -> Tensor:
    """(n,) float64 weights of all contexts, in order: equal within a type and between types, 1 in sum."""
    return torch.tensor([1 / (len(types) * len(own)) for own in types for _ in own], dtype=torch.float64)


def template(text: str) -> str:
    """`text` as a prefix, "text. {}", with its braces made blanks: the one `{}` is where the prompt goes."""
    return f"{text.replace('{', ' ').replace('}', ' ').strip()}. {{}}"


def continuations(
    model: Any,
    tokenizer: Any,
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    seed: int = 0,
    top_k: int = 5,
) -> list[str]:
    """The model's own text from each start (token ids), sampled among the `top_k` likeliest until it has its length in tokens.

    Special tokens are never sampled and not part of the text.
    The same seed gives the same texts; the global random state, the model and the tokenizer stay as they are.
    Raises ConfigError for a row that starts empty, a length below its start's, or top_k below 1.
    """
    rows = [list(start) for start in starts]
    if len(rows) != len(lengths) or top_k < 1 or any(not r or n < len(r) for r, n in zip(rows, lengths, strict=False)):
        raise ConfigError(
            f"expected one length per start, at least as long, and top_k of at least 1, found starts of "
            f"{[len(row) for row in rows]} tokens, lengths {list(lengths)}, top_k {top_k}."
        )
    with quiet(model):
        done = sampled(
            model, rows, lengths, padding=pad_id(tokenizer), top_k=top_k, seed=seed, banned=tokenizer.all_special_ids
        )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in done]


def _start(tokenizer: Any) -> list[int]:
    """The token that begins a text: the tokenizer's BOS, else its end-of-text token."""
    for known in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if known is not None:
            return [int(known)]
    raise ConfigError(
        f"expected a tokenizer with a token that begins a text, found none in {type(tokenizer).__name__}; "
        f"use the fixed contexts."
    )
