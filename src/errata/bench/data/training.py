"""Training items of the published files: CounterFact, zsRE and FEVER in KILT's form, zsRE's array, SCOTUS, or items as they are.

A case of SCOTUS is to get another of the file's labels, as late cases ask whose area has moved. Only give files of the training split:
whatever stands in a record is trained on, its paraphrases and neighbours too.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.bench.data.counterfact import CounterFactRecord
from errata.bench.data.kilt import KiltRecord
from errata.bench.data.records import Problem, Row, read_rows, settle, validated
from errata.bench.data.scotus import ScotusRecord
from errata.bench.data.zsre import ZsreRow
from errata.errors import RecordError
from errata.model.anatomy import anatomy
from errata.model.labels import label_id, label_names
from errata.model.room import cut
from errata.training import TrainingItem, read_items

ALTERNATIVES = 3  # of a KILT record or a case, an item each


def load_items(path: str | Path) -> list[TrainingItem]:
    """Items of a file, whose kind its first row tells. Raises RecordError naming file, row and field of the first bad row."""
    problems: list[Problem] = []
    rows = read_rows(Path(path), problems)
    fields = set(rows[0][1]) if rows and isinstance(rows[0][1], dict) else set[str]()
    if {"prompt", "target_new"} <= fields:
        return read_items(path)
    kinds: dict[str, type[Row]] = {
        "requested_rewrite": CounterFactRecord, "input": KiltRecord, "src": ZsreRow, "label": ScotusRecord,
    }  # fmt: skip
    kind = next((kind for field, kind in kinds.items() if field in fields), None)
    if kind is None:
        settle(problems, None)
        raise RecordError(
            f"expected rows of CounterFact (requested_rewrite), KILT (input), zsRE (src), SCOTUS (label) or training items (prompt, "
            f"target_new) in {path}, found {', '.join(sorted(fields)) or 'none'}"
        )
    records = [record for _, record in validated(path, rows, kind, problems)]
    settle(problems, None)
    labels = sorted({record.label for record in records if isinstance(record, ScotusRecord)})
    return [item for record in records for item in items_of(record, labels)]


def of_classifier(model: Any, tokenizer: Any, items: Sequence[TrainingItem]) -> list[TrainingItem]:
    """Items as a classifier takes them: labels by its own names, texts cut to its room; any other model's as they are.

    Raises RequestError for a label that it has not, naming those that there are.
    """
    if anatomy(model).role != "classifier":
        return list(items)
    names = label_names(model)
    texts = list(dict.fromkeys(t for i in items for t in (i.prompt, *i.rephrases, *(text for text, _ in i.locality))))
    fit = dict(zip(texts, cut(model, tokenizer, texts), strict=True))

    def named(label: str | None) -> str | None:
        return None if label is None else names[label_id(model, label)]

    return [
        replace(
            item,
            prompt=fit[item.prompt],
            target_new=names[label_id(model, item.target_new)],
            target_true=named(item.target_true),
            rephrases=tuple(fit[text] for text in item.rephrases),
            locality=tuple((fit[text], named(label)) for text, label in item.locality),
        )
        for item in items
    ]


def items_of(record: Any, labels: Sequence[int] = ()) -> Iterator[TrainingItem]:
    """The items of one record; none where it has no other answer to write. labels: all those of a file of cases."""
    if isinstance(record, CounterFactRecord):
        rewrite = record.requested_rewrite
        kept = tuple((prompt, rewrite.target_true.str_) for prompt in record.neighborhood_prompts)
        prompt = rewrite.prompt.replace("{}", rewrite.subject)
        yield TrainingItem(prompt, rewrite.target_new.str_, rewrite.target_true.str_, record.paraphrase_prompts, kept)
    elif isinstance(record, KiltRecord):
        said = record.prediction or record.answers[0]
        others = [a for a in record.alternatives if a.strip() and a.casefold() != said.casefold()]
        kept = tuple((other.input, other.answer) for other in record.unrelated)
        for other in others[:ALTERNATIVES]:
            yield TrainingItem(record.input, other, said, record.asked_again, kept)
    elif isinstance(record, ScotusRecord):
        away = [str(label) for label in labels if label != record.label]
        for new in random.Random(record.text).sample(away, min(ALTERNATIVES, len(away))):
            yield TrainingItem(record.text, new, None, record.rephrases)
    elif record.alt.strip():
        elsewhere = f"{record.loc.strip().removesuffix('?')}?"
        said = record.pred or record.answers[0]
        yield TrainingItem(record.src, record.alt, said, (record.rephrase,), ((elsewhere, record.loc_ans),))
