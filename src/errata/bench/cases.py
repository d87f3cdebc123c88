"""Cases: an edit with every prompt that judges it. All data sets, published or made from Atlas, become cases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from errata.edit import EditRequest

if TYPE_CHECKING:
    from errata.bench.fluency import TfIdf

Kind = Literal[
    "edit",  # the edit's own prompt
    "paraphrase",
    "neighborhood",  # same relation and old object, other subjects
    "other_relation",  # the same subject, another relation
    "attribute",  # subjects that have the new object already
    "generation",  # text is sampled from it: fluency, consistency
    "compositionality_i",
    "compositionality_ii",
    "subject_aliasing",
    "relation_specificity",
    "logical_generalization",
    "forgetfulness",
    "portability",
    "reverse",  # (inverse relation, new object) -> subject
    "doubt_i",
    "doubt_ii",
    "context",  # the edit's prompt behind a long context
    "claim",
    "locality",  # unrelated questions, zsRE's and KnowEdit's
    "unrelated",  # running text, of which the probability is measured
    "upstream",  # what the model was made for: a stream of edits must leave it right
    "fact",  # any other fact that the model knows: collateral
]

# Kinds that an edit must leave as they are, whatever is right there; a name that stands with one is what its probability is
# measured for.
STAY: tuple[Kind, ...] = ("neighborhood", "other_relation", "attribute", "locality", "fact")


@dataclass(frozen=True)
class Probe:
    """One prompt put to a model, and what counts as right.

    expected: names of the right answer, the first the canonical one; empty: what the unedited model says should stay. answers: of
    a question with several answers the names of each, all of which are in `expected`.
    alternatives: answers whose probability is compared with it (the old object first). test: probes of one case with the same
    name are judged together, all of them ("and") or any ("or"). condition: asked of the unedited model; where the conditions
    of a test do not hold, the edit is not to blame for it. tags: strata for tables ("tokens": "256", "relation": "capital").
    """

    kind: Kind
    prompt: str
    expected: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    test: str = ""
    joined: Literal["and", "or"] = "and"
    condition: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Case:
    """An edit and its probes. id: the record's in its data set. references: texts for consistency; tfidf: what their words weigh
    in the whole data set. tags as a probe's.
    """

    id: str
    request: EditRequest
    probes: tuple[Probe, ...]
    references: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    tfidf: "TfIdf | None" = field(default=None, compare=False, repr=False)
