"""Training items of the published files: CounterFact, zsRE and FEVER in KILT's form, zsRE's array, or items as they are.

Only give files of the training split: whatever stands in a record is trained on, its paraphrases and neighbours too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.bench.data.counterfact import CounterFactRecord
from errata.bench.data.kilt import KiltRecord
from errata.bench.data.records import Problem, Row, read_rows, settle, validated
from errata.bench.data.zsre import ZsreRow
from errata.errors import RecordError
from errata.training import TrainingItem, read_items

ALTERNATIVES = 3  # of a KILT record, an item each


def load_items(path: str | Path) -> list[TrainingItem]:
    """Items of a file, whose kind its first row tells. Raises RecordError naming file, row and field of the first bad row."""
    problems: list[Problem] = []
    rows = read_rows(Path(path), problems)
    fields = set(rows[0][1]) if rows and isinstance(rows[0][1], dict) else set[str]()
    if {"prompt", "target_new"} <= fields:
        return read_items(path)
    kinds: dict[str, type[Row]] = {"requested_rewrite": CounterFactRecord, "input": KiltRecord, "src": ZsreRow}
    kind = next((kind for field, kind in kinds.items() if field in fields), None)
    if kind is None:
        settle(problems, None)
        raise RecordError(
            f"expected rows of CounterFact (requested_rewrite), KILT (input), zsRE (src) or training items (prompt, target_new) in "
            f"{path}, found {', '.join(sorted(fields)) or 'none'}"
        )
    records = [record for _, record in validated(path, rows, kind, problems)]
    settle(problems, None)
    return [item for record in records for item in items_of(record)]


def items_of(record: Any) -> Iterator[TrainingItem]:
    """The items of one record; none where it has no other answer to write."""
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
    elif record.alt.strip():
        elsewhere = f"{record.loc.strip().removesuffix('?')}?"
        said = record.pred or record.answers[0]
        yield TrainingItem(record.src, record.alt, said, (record.rephrase,), ((elsewhere, record.loc_ans),))
