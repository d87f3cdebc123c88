"""How many tokens a row may have: said before the forward pass, which would end in an index error of the embedding."""

from collections.abc import Sequence
from typing import Any

from errata.errors import RequestError
from errata.model.tokens import COUNT_BEHIND_PADDING, token_ids

_SHOWN = 60  # characters of a prompt in a message


def room(model: Any) -> int | None:
    """The tokens that one row may have by the model's config; None where it sets no bound (ALiBi, dynamic RoPE, T5)."""
    config = model.config.get_text_config()
    if getattr(config, "relative_attention_num_buckets", None):
        return None  # T5's n_positions is the length that it was trained on
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        return None
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(length, int) and config.model_type in COUNT_BEHIND_PADDING:
        length -= (config.pad_token_id or 0) + 1
    return length if isinstance(length, int) and length > 0 else None


def check_room(model: Any, rows: Sequence[Sequence[int]], texts: Sequence[str] | None = None, new: int = 0) -> None:
    """Refuse rows of token ids that, with `new` tokens to be generated or scored behind them, the model has no room for.

    texts: what the rows were before; named in the message. The last new token is never fed, so it needs no position.
    Raises RequestError naming the prompt, its length and the limit.
    """
    limit, more = room(model), max(new - 1, 0)
    if limit is None:
        return
    for i, row in enumerate(rows):
        if len(row) + more > limit:
            name = _short(texts[i]) if texts is not None else f"in row {i + 1} of {len(rows)}"
            wanted = f" and {new} more are to follow" if new else ""
            raise RequestError(
                f"the prompt {name} has {len(row)} tokens{wanted}, but the model has room for {limit}; shorten it"
            )


def cut(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Each text, or the longest beginning of it that the model has room for: court opinions are longer than any BERT."""
    limit, found = room(model), list(texts)
    if limit is None or not found:
        return found
    for i, row in enumerate(token_ids(tokenizer, found)):
        low, high = (1, len(texts[i])) if len(row) > limit else (0, 0)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(token_ids(tokenizer, [texts[i][:middle]])[0]) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            found[i] = texts[i][:low].rstrip()
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
