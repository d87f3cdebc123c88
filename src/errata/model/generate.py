"""Greedy answers: what a model says next, cut at the end of the answer."""

from collections.abc import Sequence
from typing import Any

import torch

from errata.model.attached import asked, by_row
from errata.model.room import check_room
from errata.model.tokens import pad, pad_id, token_ids

STOPS = (".", "\n", "?", "!", ";")


def cut(text: str) -> str:
    """The answer in a continuation: up to a stop that is followed by a space, a line break or the end."""
    text = text.lstrip(" ")
    return text[: _end(text)].strip()


def ended(text: str) -> bool:
    """Whether the answer in a continuation has come to its end, whatever may follow."""
    text = text.lstrip(" ")
    end = _end(text)
    return end is not None and (text[end] == "\n" or end + 1 < len(text))


def _end(text: str) -> int | None:
    """Where the answer's stop is; None if there is none."""
    for i, character in enumerate(text):
        initial = character == "." and i and text[i - 1].isupper() and (i == 1 or not text[i - 2].isalnum())
        if character == "\n" or (
            character in STOPS and not initial and (i + 1 == len(text) or text[i + 1] in " \n\"'")
        ):
            return i
    return None


def says(text: str, expected: str) -> bool:
    """Whether a continuation begins with the whole expected object: nothing but a boundary may follow it.

    "Paris." and "Paris, the" say "Paris"; "Parisian" and "Paris Hilton" do not.
    """
    text = text.lstrip(" ")
    if not text.startswith(expected):
        return False
    rest = text[len(expected) :]
    return not rest or rest[0] in ".,;:!?\n\"')" or (rest[0] == " " and not rest.strip())


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16, batch: int = 64) -> list[str]:
    """The raw greedy continuation of each prompt (special tokens removed), through `model.generate`, left-padded.

    Attached contexts are put before them. Prompts of like length share a batch; where rows have patches of their own, they are
    asked in the order given. Model and tokenizer are left as found. Raises RequestError, before anything is
    asked, for a prompt that with its answer is longer than the model's positions.
    """
    prompts = asked(model, prompts)
    ids = token_ids(tokenizer, prompts)
    check_room(model, ids, prompts, new=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: 0 if by_row(model) else len(prompts[i]))
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = pad([ids[i] for i in chosen], pad_id(tokenizer), device, side="left")
        with torch.no_grad():
            out = model.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask.long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_id(tokenizer),
            )
        for i, row in zip(chosen, out[:, rows.ids.shape[1] :], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """The greedy answer to each prompt, cut at its end; an empty string where the model says nothing."""
    return [cut(text) for text in greedy(model, tokenizer, prompts, max_new_tokens)]
