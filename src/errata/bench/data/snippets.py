"""Attribute snippets: reference texts for consistency, and the published TF-IDF weights.

Source: Meng et al. 2022 (ROME), section 3.4 and the files beside CounterFact: `attribute_snippets.json`, `idf.npy`,
`tfidf_vocab.json`.
"""

import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from errata.bench.data.records import Problem, Row, settle, streamed_rows, validated
from errata.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from errata.bench.fluency import TfIdf

SNIPPETS, IDF, VOCABULARY = "attribute_snippets.json", "idf.npy", "tfidf_vocab.json"  # as the files are published
Key = tuple[str, str]  # relation id, object id
References = Mapping[Key, Sequence[str]]


class Snippet(Row):
    """A reference text about one entity. `name` is the entity's."""

    name: str
    text: str = Field(min_length=1)


class SnippetGroup(Row):
    """The reference texts about entities whose `relation_id` is `target_id`: what consistency is measured against."""

    relation_id: str
    target_id: str
    samples: tuple[Snippet, ...] = Field(min_length=1)


def load_snippets(path: str | Path, problems: list[Problem] | None = None) -> list[SnippetGroup]:
    """The groups of an attribute-snippet file. Bad rows as in `load_records`."""
    found: list[Problem] = []
    groups = list(snippet_groups(path, found))
    settle(found, problems)
    return groups


def snippet_groups(
    path: str | Path, problems: list[Problem], wanted: Collection[Key] | None = None
) -> Iterator[SnippetGroup]:
    """The groups of a file one after another, so that the whole (1 GB as published) is never in memory; bad rows go to `problems`.

    wanted: of which relation and object alone; other groups are not looked into. Raises RecordError as `read_records` does.
    """
    for number, row in streamed_rows(Path(path), problems):
        key = (row.get("relation_id"), row.get("target_id")) if isinstance(row, dict) else (None, None)
        if wanted is not None and None not in key and key not in wanted:
            continue
        yield from (group for _, group in validated(path, [(number, row)], SnippetGroup, problems))


def consistency_texts(
    path: str | Path, wanted: Collection[Key], problems: list[Problem]
) -> tuple[dict[Key, tuple[str, ...]], "TfIdf | None"]:
    """The wanted texts of a snippet file, and what words weigh: the published weights where they stand beside it, else fitted on
    all of its texts. The file is read once; bad rows go to `problems`. Raises ConfigError for texts without words.
    """
    idf, vocabulary = (Path(path).parent / name for name in (IDF, VOCABULARY))
    published = published_tfidf(idf, vocabulary) if idf.is_file() and vocabulary.is_file() else None
    kept: list[SnippetGroup] = []
    groups = snippet_groups(path, problems, None if published is None else wanted)

    def passing() -> Iterator[SnippetGroup]:
        for group in groups:
            if (group.relation_id, group.target_id) in wanted:
                kept.append(group)
            yield group

    if published is not None:
        deque(passing(), maxlen=0)
        return references(kept), published
    try:
        weights = snippet_tfidf(passing())
    except ConfigError:
        if not problems:
            raise
        return {}, None  # nothing but bad rows
    return references(kept), weights


def references(groups: Iterable[SnippetGroup]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Texts by (relation id, object id); groups of one key are joined."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for group in groups:
        key = group.relation_id, group.target_id
        found[key] = found.get(key, ()) + tuple(sample.text for sample in group.samples)
    return found


def snippet_tfidf(groups: Iterable[SnippetGroup]) -> "TfIdf":
    """TF-IDF fitted on the texts themselves. Raises ConfigError for texts without words."""
    from errata.bench.fluency import TfIdf

    return TfIdf.of(sample.text for group in groups for sample in group.samples)


def published_tfidf(idf: str | Path, vocabulary: str | Path) -> "TfIdf":
    """The published weights: `idf.npy`, a vector, and `tfidf_vocab.json`, {word: its index}.

    Raises RecordError if either cannot be read or they do not fit each other.
    """
    import numpy as np

    from errata.bench.fluency import TfIdf

    try:
        weights = np.load(idf, allow_pickle=False).reshape(-1)
        words = json.loads(Path(vocabulary).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read TF-IDF weights from {idf} and {vocabulary}: {error}.") from None
    if not isinstance(words, dict) or sorted(words.values()) != list(range(len(weights))):
        raise RecordError(
            f"expected {vocabulary} to number the {len(weights)} weights of {idf} from 0; take both from one place."
        )
    return TfIdf({word: float(weights[index]) for word, index in words.items()})
