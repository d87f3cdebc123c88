"""A classifier's answers: the names of its labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.model.attached import by_row
from errata.model.room import check_room
from errata.model.tokens import pad, pad_id, token_ids


def label_names(model: Any) -> list[str]:
    """The names of the labels by id, from the config ("LABEL_0", ... where it names none)."""
    names = model.config.id2label or {}
    return [str(names.get(i, f"LABEL_{i}")) for i in range(model.config.num_labels)]


def label_id(model: Any, name: str) -> int:
    """The id of a label, by its name or its number ("7", as data sets with numbered classes have it).

    Raises RequestError naming the labels that there are.
    """
    names = label_names(model)
    if name not in names and name.isdecimal() and int(name) < len(names):
        return int(name)
    if name not in names:
        raise RequestError(
            f"expected a label of this classifier ({', '.join(names)}), found {name!r}; spell it as there."
        )
    return names.index(name)


def label_logits(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 64) -> Tensor:
    """(n, labels) float32 on CPU: what the classifier gives each text. Texts of like length share a batch; where rows have patches of
    their own, they are asked at once, in the order given.

    Raises RequestError for a text that is longer than the model's positions; ConfigError for a model of one label, which
    scores and does not classify.
    """
    if model.config.num_labels < 2:
        raise ConfigError(
            f"expected a classifier of two labels or more, found {model.config.num_labels}; give its head a logit per label."
        )
    rows = token_ids(tokenizer, texts)
    check_room(model, rows, texts)
    found = torch.empty(len(rows), model.config.num_labels)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    if by_row(model):
        order, batch = list(range(len(rows))), max(1, len(rows))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = pad([rows[i] for i in chosen], pad_id(tokenizer), device)
        with torch.no_grad():
            found[chosen] = model(**padded.inputs(model)).logits.float().cpu()
    return found


def predicted_labels(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 64) -> list[str]:
    """The name of the likeliest label of each text."""
    names = label_names(model)
    return [names[i] for i in label_logits(model, tokenizer, texts, batch).argmax(-1).tolist()]
