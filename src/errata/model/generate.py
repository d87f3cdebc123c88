"""Greedy answers: what a model says next, cut at the end of the answer; of a classifier, the name of its label.

A decoder goes on from the prompt, an encoder-decoder answers it, a classifier judges it: in all three a text comes back that
can be compared with what was expected.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.model.anatomy import anatomy
from errata.model.attached import asked, by_row
from errata.model.cache import cache_in, with_cache
from errata.model.labels import predicted_labels
from errata.model.room import check_room
from errata.model.states import input_device
from errata.model.tokens import pad, pad_id, token_ids

STOPS = (".", "\n", "?", "!", ";")
# Words with which a text goes on behind an object that is whole. Not "of": "United States of America" is another name.
GOES_ON = frozenset((
    "and", "or", "but", "nor", "in", "on", "at", "by", "for", "from", "to", "with", "is", "was", "are", "were", "who", "which",
    "that", "as", "since", "until", "when", "where", "while", "because", "before", "after", "during",
))  # fmt: skip
JOINS = frozenset(("and", "or", "nor"))  # behind which a name may be a part of a longer one: "Trinidad and Tobago"


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
    """Whether a continuation begins with the whole expected object: a boundary follows it, or a word of `GOES_ON`.

    "Paris.", "Paris, the", "Paris in 1666" and "Paris and is" say "Paris"; "Parisian", "Paris Hilton" and "Paris and Rome" do not.
    """
    text = text.lstrip(" ")
    if not text.startswith(expected):
        return False
    rest = text[len(expected) :]
    if not rest.strip() or rest[0] in ".,;:!?\n\"')":
        return True
    word = re.match(r" +([a-z]+)(?![\w'’-])(?: +(?:the +)?(\w))?", rest)
    return word is not None and word[1] in GOES_ON and not (word[1] in JOINS and (word[2] or "").isupper())


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int | Sequence[int] = 16, batch: int = 64
) -> list[str]:
    """The raw greedy continuation of each prompt (special tokens removed), through `model.generate`, left-padded.

    Of an encoder-decoder the answer, with a leading space if it begins a word; of a classifier the label's name. max_new_tokens:
    one number for all, or one for each. Attached contexts are put before prompts. Prompts of like length share a batch; where
    rows have patches of their own, they are asked at once, in the order given. Model and tokenizer are left as found. Raises
    RequestError, before anything is asked, for a prompt that with its answer is longer than the model's positions.
    """
    prompts = asked(model, prompts)
    role = anatomy(model).role
    if role == "classifier":
        return predicted_labels(model, tokenizer, prompts, batch)
    answers = role == "encoder-decoder"
    ids = token_ids(tokenizer, prompts)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    for row, prompt, limit in zip(ids, prompts, limits, strict=True):
        check_room(model, [row], [prompt], new=0 if answers else limit)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if by_row(model):
        order, batch = list(range(len(prompts))), max(1, len(prompts))
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = pad([ids[i] for i in chosen], pad_id(tokenizer), device, side="right" if answers else "left")
        with torch.no_grad():
            out = model.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask.long(),
                max_new_tokens=max(limits[i] for i in chosen),
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_id(tokenizer),
            )
        for i, row in zip(chosen, out[:, 1 if answers else rows.ids.shape[1] :], strict=True):
            texts[i] = tokenizer.decode(row[: limits[i]], skip_special_tokens=True)
    return texts


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """The greedy answer to each prompt, cut at its end; an empty string where the model says nothing."""
    return [cut(text) for text in greedy(model, tokenizer, prompts, max_new_tokens)]


def next_logits(model: Any, rows: Sequence[Sequence[int]], padding: int, batch: int = 32) -> Tensor:
    """(n, V) logits behind each row of token ids, on the CPU, always in the same batches."""
    found = []
    for start in range(0, len(rows), batch):
        chunk = pad(rows[start : start + batch], padding, input_device(model), "left")
        with torch.no_grad():
            found.append(model(**chunk.inputs(model), use_cache=False).logits[:, -1].cpu())
    return torch.cat(found)


def sampled(
    model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int], *, padding: int, top_k: int, seed: int,
    banned: Sequence[int] = (),
) -> list[list[int]]:  # fmt: skip
    """Each row of token ids, continued until it has its length with tokens drawn among the `top_k` likeliest.

    banned: ids that are never drawn. What is attached acts. The same seed gives the same texts; the global random state and the
    model stay as they are. A row that has its length already comes back as it is.
    """
    done = [list(row) for row in rows]
    if not any(len(row) < n for row, n in zip(done, lengths, strict=True)):
        return done
    never, generator = torch.tensor(sorted(set(banned)), dtype=torch.long), torch.Generator().manual_seed(seed)
    inputs, cache = pad(rows, padding, input_device(model), "left").inputs(model), None
    with torch.no_grad():
        while left := [i for i, row in enumerate(done) if len(row) < lengths[i]]:
            output = model(**inputs, **with_cache(model, cache))
            logits, cache = output.logits[:, -1].float().cpu(), cache_in(output)
            logits[:, never] = -torch.inf
            best, ids = logits[left].topk(min(top_k, logits.shape[1]), dim=-1)
            drawn = ids.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))[:, 0].tolist()
            token = torch.full_like(inputs["input_ids"][:, -1:], padding)
            for i, new in zip(left, drawn, strict=True):
                done[i].append(new)
                token[i] = new
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
            inputs = {**inputs, "input_ids": token, "attention_mask": mask}
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
    return done
