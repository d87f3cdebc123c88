"""Greedy answers: what a model says next, cut at the end of the answer; of a classifier, the name of its label.

A decoder goes on from the prompt, an encoder-decoder answers it, a classifier judges it: in all three a text comes back that
can be compared with what was expected.
"""

from collections.abc import Sequence
from typing import Any

import torch

from errata.model.anatomy import anatomy
from errata.model.labels import predicted_labels
from errata.model.room import check_room
from errata.model.tokens import pad, pad_id, token_ids

STOPS = (".", "\n", "?", "!", ";")


def cut(text: str) -> str:
    """The answer in a continuation: up to a stop that is followed by a space, a line break or the end."""
    text = text.lstrip(" ")
    for i, character in enumerate(text):
        initial = character == "." and i and text[i - 1].isupper() and (i == 1 or not text[i - 2].isalnum())
        if character == "\n" or (
            character in STOPS and not initial and (i + 1 == len(text) or text[i + 1] in " \n\"'")
        ):
            return text[:i].strip()
    return text.strip()


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

    Of an encoder-decoder the answer, with a leading space if it begins a word; of a classifier the label's name.
    Prompts of like length share a batch. Model and tokenizer are left as found. Raises RequestError, before anything is
    asked, for a prompt that with its answer is longer than the model's positions.
    """
    role = anatomy(model).role
    if role == "classifier":
        return predicted_labels(model, tokenizer, prompts, batch)
    answers = role == "encoder-decoder"
    ids = token_ids(tokenizer, prompts)
    check_room(model, ids, prompts, new=0 if answers else max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = pad([ids[i] for i in chosen], pad_id(tokenizer), device, side="right" if answers else "left")
        with torch.no_grad():
            out = model.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask.long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_id(tokenizer),
            )
        for i, row in zip(chosen, out[:, 1 if answers else rows.ids.shape[1] :], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """The greedy answer to each prompt, cut at its end; an empty string where the model says nothing."""
    return [cut(text) for text in greedy(model, tokenizer, prompts, max_new_tokens)]
