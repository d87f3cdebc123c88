"""Judges: what counts as right, row by row. Each takes rows and gives an array with a value for each, NaN where it has none.

A row's expected names are one answer under its names, the canonical one first; of a question with several answers those of all,
and `answers` has each one's. Without any, what the unedited model said should stay. Rows come from
`errata.bench.metrics.select`, with the unedited model's outcome of the same probe as `base_...`.
"""

import string
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from errata.errors import RecordError
from errata.model.generate import cut, says

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Array = NDArray[np.float64]


# -- by the generated text -----------------------------------------------------------------------------------------------


def whole(rows: "DataFrame") -> Array:
    """The greedy continuation begins with the whole object under any name, and the object ends there."""
    said, before = _texts(rows["generated"]), _texts(rows["unedited"])
    return _array(
        any(says(text, name) for name in names) if names else cut(text) == cut(old)
        for text, old, names in zip(said, before, rows["expected"], strict=True)
    )


def kept(rows: "DataFrame") -> Array:
    """The greedy answer is the unedited model's, whatever is expected."""
    return _array(cut(a) == cut(b) for a, b in zip(_texts(rows["generated"]), _texts(rows["unedited"]), strict=True))


def changed(rows: "DataFrame") -> Array:
    """The greedy answer is not the unedited model's."""
    return 1 - kept(rows)


def lost(rows: "DataFrame") -> Array:
    """The unedited model said the whole object and the edited one does not; NaN where the unedited one did not."""
    knew = whole(rows.assign(generated=rows["unedited"]))
    return np.where(knew == 1, 1 - whole(rows), np.nan)


def contained(rows: "DataFrame") -> Array:
    """A name of every answer stands anywhere in prompt and continuation; names of one letter do not count, digits do."""
    read = [f"{prompt}{text}" for prompt, text in zip(_texts(rows["prompt"]), _texts(rows["generated"]), strict=True)]
    return _array(
        all(any(name in text for name in names if len(name) > 1 or name.isdigit()) for names in answers)
        for text, answers in zip(read, _answers(rows), strict=True)
    )


def begins(rows: "DataFrame") -> Array:
    """The greedy continuation begins with the letters of a name, whatever follows."""
    return _array(
        any(text.lstrip().startswith(name) for name in names) if names else np.nan
        for text, names in zip(_texts(rows["generated"]), rows["expected"], strict=True)
    )


def natural(rows: "DataFrame") -> Array:
    """The greedy answer up to its natural stop is a name, letter case, articles and punctuation apart."""
    return _array(
        words(cut(text)) in [words(name) for name in names] if names else np.nan
        for text, names in zip(_texts(rows["generated"]), rows["expected"], strict=True)
    )


def first_token(rows: "DataFrame") -> Array:
    """A name begins with the likeliest next token, spaces stripped: one letter matches all names that begin with it."""
    return _array(
        bool(token) and any(name.startswith(token) for name in names) if names else np.nan
        for token, names in zip(_stripped(rows["first_token"]), rows["expected"], strict=True)
    )


def f1(rows: "DataFrame") -> Array:
    """F1 of the words of the greedy answer and of a name, as bags, the best name's."""
    return _array(
        max(_f1(words(cut(text)), words(name)) for name in names) if names else np.nan
        for text, names in zip(_texts(rows["generated"]), rows["expected"], strict=True)
    )


def f1_set(rows: "DataFrame") -> Array:
    """GRACE's F1: distinct words in common over lengths with repeats, the end-of-text token being one more word of both."""

    def of(text: str, name: str) -> float:
        said, right = [*cut(text).split(), "</s>"], [*name.split(), "</s>"]
        common = len(set(said) & set(right))
        return 2 * common / (len(said) + len(right))

    return _array(
        of(text, names[0]) if names else np.nan
        for text, names in zip(_texts(rows["generated"]), rows["expected"], strict=True)
    )


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(" " if sign in string.punctuation else sign for sign in text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(said: list[str], right: list[str]) -> float:
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else float(said == right)


# -- by probabilities ----------------------------------------------------------------------------------------------------


def preferred(rows: "DataFrame") -> Array:
    """The expected object is strictly more probable than the first alternative; NaN without either."""
    return _compared(rows["p_expected"], rows["p_alternative"])


def preferred_first(rows: "DataFrame") -> Array:
    """The same of their first tokens."""
    return _compared(rows["p_expected_first"], rows["p_alternative_first"])


def margin(rows: "DataFrame") -> Array:
    """Probability of the expected object minus that of the first alternative."""
    return _numbers(rows["p_expected"]) - _numbers(rows["p_alternative"])


def target(rows: "DataFrame") -> Array:
    """Probability of the expected object."""
    return _numbers(rows["p_expected"])


def tokens(rows: "DataFrame") -> Array:
    """Share of the object's tokens that are the likeliest behind the ones before."""
    return _numbers(rows["token_accuracy"])


def exact(rows: "DataFrame") -> Array:
    """Every token of the object is the likeliest behind the ones before."""
    share = _numbers(rows["token_accuracy"])
    return np.where(np.isnan(share), np.nan, share >= 1)


def drawdown(rows: "DataFrame") -> Array:
    """Nats per token by which the expected text became less probable than in the unedited model."""
    with np.errstate(divide="ignore"):
        return np.log(_numbers(rows["base_p_expected"])) - np.log(_numbers(rows["p_expected"]))


# -- by the gate ---------------------------------------------------------------------------------------------------------


def own_open(rows: "DataFrame") -> Array:
    """The gate of the case's own edit was open; NaN without gates."""
    return np.where(rows["gate"].isna(), np.nan, rows["gate"] == rows["edit"])


def closed(rows: "DataFrame") -> Array:
    """No gate was open; NaN without gates."""
    return np.where(rows["gate"].isna(), np.nan, rows["gate"] == "")


# -- SAKE's code ---------------------------------------------------------------------------------------------------------


def first_token_or_none(rows: "DataFrame") -> Array:
    """`first_token`, for which a token of spaces alone is a match too: every name begins with nothing."""
    blank = np.array([not token for token in _stripped(rows["first_token"])], dtype=bool)
    return np.where(blank & rows["first_token"].notna().to_numpy(), 1.0, first_token(rows))


def token_of_first(rows: "DataFrame") -> Array:
    """`first_token`, of the names of the first of several answers alone."""
    return first_token(rows.assign(expected=[answers[0] for answers in _answers(rows)]))


def specificity_of_sake(rows: "DataFrame") -> Array:
    """Gate closed, or the new object's first token less probable than the old one's; NaN where the unedited model prefers
    the new one. The row's expected object is the old one, its alternative the new one.
    """
    dropped = _numbers(rows["base_p_alternative_first"]) > _numbers(rows["base_p_expected_first"])
    return np.where(dropped, np.nan, np.where(closed(rows) == 1, 1.0, preferred_first(rows)))


def relations_of_sake(rows: "DataFrame") -> Array:
    """Gate closed, or a first-token prefix match with the first answer."""
    return np.where(closed(rows) == 1, 1.0, token_of_first(rows))


def alias_of_sake(rows: "DataFrame") -> Array:
    """A first-token prefix match, of the prompts that the edit already answers with its gate always open: a circular filter.

    Raises RecordError for rows without the answers of an open gate.
    """
    if "ungated_first_token" not in rows:
        raise RecordError(
            "expected rows of the same method with its gate always open, found none; "
            "name them: score(..., ungated='the label of that method')."
        )
    passes = token_of_first(rows.assign(first_token=rows["ungated_first_token"]))
    return np.where(passes == 1, token_of_first(rows), np.nan)


# -- texts ---------------------------------------------------------------------------------------------------------------


def entropy(rows: "DataFrame") -> Array:
    """Generation entropy of each text, bits x 100."""
    from errata.bench.fluency import fluency

    return _array(fluency([text]) for text in _texts(rows["generated"]))


def consistency(rows: "DataFrame") -> Array:
    """TF-IDF cosine x 100 of all texts of the row's case with the case's references, by the weights of the run's data set.

    NaN for cases without references, and for runs without weights. Raises RecordError for rows without these columns (see
    `errata.bench.rows.results`).
    """
    from errata.bench.fluency import consistency as cosine

    if not {"references", "tfidf"} <= set(rows) and len(rows):
        raise RecordError("expected rows with their cases' references, found none; read them with `results(run)`.")
    found = {}
    for case, own in rows.groupby("case"):
        references, tfidf = own["references"].iloc[0], own["tfidf"].iloc[0]
        found[case] = cosine(_texts(own["generated"]), references, tfidf) if references and tfidf else np.nan
    return rows["case"].map(found).to_numpy(dtype=float)


def _answers(rows: "DataFrame") -> list[tuple[tuple[str, ...], ...]]:
    """Of each row the names of each of its answers."""
    return [several or (names,) for several, names in zip(rows["answers"], rows["expected"], strict=True)]


def _stripped(tokens: "Series") -> list[str]:
    return [token.strip() for token in _texts(tokens)]


def _texts(column: "Series") -> list[str]:
    return column.fillna("").tolist()


def _numbers(column: "Series") -> Array:
    return column.to_numpy(dtype=float)


def _compared(more: "Series", less: "Series") -> Array:
    a, b = _numbers(more), _numbers(less)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, a > b)


def _array(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=float)
