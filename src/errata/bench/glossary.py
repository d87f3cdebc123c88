"""The papers' letters, what each stands for, and by which of our metrics it is measured.

One letter has several meanings: RS is relation specificity in SAKE and RippleEdits, and consistency ("reference score") in ROME.
Where a published protocol has a fault, `fault` says which, and tables print ours and the published one side by side.
"""

from dataclasses import dataclass

from errata.errors import ConfigError


@dataclass(frozen=True)
class Term:
    """paper's `letters`: `name` in full. ours: the metric by our protocol; published: by the paper's, or None where rows do not
    hold what it needs; equal to ours where the paper's has no fault.
    """

    paper: str
    letters: str
    name: str
    ours: str
    published: str | None
    fault: str = ""


ONE_TOKEN = "one token that begins the answer is a match, so that a lone 'S' matches every answer in S"
FORCED = "teacher forcing gives away the object's first tokens and its length"
_PROMPT = "a name counts anywhere in prompt and text, also where the prompt has it; edits that fail are left out"
_FILTER = (
    f"{ONE_TOKEN}; edits whose first token does not win are left out; only the first query, condition and answer count"
)

TERMS = (
    Term("ROME", "S", "score, the harmonic mean of ES, PS and NS", "score.prob", "score.prob"),
    Term("ROME", "ES", "efficacy score", "efficacy.prob", "efficacy.prob"),
    Term("ROME", "EM", "efficacy magnitude", "efficacy_magnitude.prob", "efficacy_magnitude.prob"),
    Term("ROME", "PS", "paraphrase score", "generalization.prob", "generalization.prob"),
    Term("ROME", "PM", "paraphrase magnitude", "generalization_magnitude.prob", "generalization_magnitude.prob"),
    Term("ROME", "NS", "neighborhood score", "specificity.prob", "specificity.prob"),
    Term("ROME", "NM", "neighborhood magnitude", "specificity_magnitude.prob", "specificity_magnitude.prob"),
    Term("ROME", "GE", "fluency, the entropy of generated n-grams", "fluency.entropy", "fluency.entropy"),
    Term("ROME", "RS", "consistency with reference texts", "consistency.tfidf", "consistency.tfidf"),
    Term("ROME zsRE", "Efficacy", "efficacy, token accuracy", "efficacy.generate", "efficacy.teacher_forced_token", FORCED),
    Term("ROME zsRE", "Paraphrase", "paraphrases, token accuracy", "generalization.generate",
         "generalization.teacher_forced_token", FORCED),
    Term("ROME zsRE", "Specificity", "unrelated questions, token accuracy", "locality.generate",
         "locality.teacher_forced_token", "gold answers are asked for, of which the unedited model knows few"),
    Term("MEMIT", "ES", "greedy efficacy", "efficacy.generate", "efficacy.teacher_forced_exact", FORCED),
    Term("MEMIT", "PS", "greedy paraphrase accuracy", "generalization.generate", "generalization.teacher_forced_exact", FORCED),
    Term("MEMIT", "NS", "greedy neighborhood accuracy", "specificity.generate", "specificity.teacher_forced_exact",
         "a neighbour that the unedited model never knew counts as damage"),
    Term("SAKE", "Acc", "accuracy on the edit's own prompt", "efficacy.generate", "efficacy.sake_code", ONE_TOKEN),
    Term("SAKE", "Gen", "generality, accuracy on paraphrases", "generalization.generate", "generalization.sake_code", ONE_TOKEN),
    Term("SAKE", "Spec", "specificity, neighbours as before", "specificity.generate", "specificity.sake_code",
         "the gate sees the edit's own centre alone; neighbours that the unedited model gets wrong are left out; a changed answer "
         "counts as kept while the old object's first token beats the new one's"),
    Term("SAKE RippleEdits", "Acc", "accuracy on the edit's own prompt", "efficacy.generate", "efficacy.sake_code_ripple",
         f"a token of spaces alone is a match; {ONE_TOKEN}"),
    Term("SAKE", "CI", "compositionality I, on from the new object", "compositionality_i.generate",
         "compositionality_i.sake_code", _FILTER),
    Term("SAKE", "CII", "compositionality II, through the subject", "compositionality_ii.generate",
         "compositionality_ii.sake_code", _FILTER),
    Term("SAKE", "SA", "subject aliasing", "subject_aliasing.generate", "subject_aliasing.sake_code",
         "only aliases that the edit answers with its gate open are counted: a circle"),
    Term("SAKE", "RS", "relation specificity", "relation_specificity.generate", "relation_specificity.sake_code",
         f"a closed gate of the edit's own centre is a success; {_FILTER}"),
    Term("SAKE", "DI", "doubt I, behind an objection", "doubt_i.generate", "doubt_i.first_token_prefix",
         f"the released gate is always open, so that the gate is not tested; {ONE_TOKEN}"),
    Term("SAKE", "DII", "doubt II, behind a dialogue on the old object's side", "doubt_ii.generate",
         "doubt_ii.first_token_prefix", f"the released gate is always open, so that the gate is not tested; {ONE_TOKEN}"),
    Term("RippleEdits", "CI", "compositionality I", "compositionality_i.generate", "compositionality_i.ripple", _PROMPT),
    Term("RippleEdits", "CII", "compositionality II", "compositionality_ii.generate", "compositionality_ii.ripple", _PROMPT),
    Term("RippleEdits", "SA", "subject aliasing", "subject_aliasing.generate", "subject_aliasing.ripple",
         f"its condition asks the unedited model for the new object, so that few tests are run; {_PROMPT}"),
    Term("RippleEdits", "RS", "relation specificity", "relation_specificity.generate", "relation_specificity.ripple", _PROMPT),
    Term("RippleEdits", "LG", "logical generalization", "logical_generalization.generate", "logical_generalization.ripple",
         _PROMPT),
    Term("RippleEdits", "PV", "preservation (forgetfulness)", "forgetfulness.generate", "forgetfulness.ripple", _PROMPT),
    Term("STEAM", "Efficacy", "efficacy score", "efficacy.prob", "efficacy.prob"),
    Term("STEAM", "Paraphrase", "paraphrase score", "generalization.prob", "generalization.prob"),
    Term("STEAM", "Neighborhood", "neighborhood score", "specificity.prob", "specificity.prob"),
    Term("STEAM", "Portability", "portability", "portability.generate", None, "its scoring is not stated"),
    Term("STEAM", "Fluency", "fluency", "fluency.entropy", "fluency.entropy"),
    Term("STEAM", "Consistency", "consistency", "consistency.tfidf", "consistency.tfidf"),
    Term("EasyEdit", "rewrite_acc", "efficacy, token accuracy", "efficacy.generate", "efficacy.teacher_forced_token", FORCED),
    Term("EasyEdit", "rephrase_acc", "paraphrases, token accuracy", "generalization.generate",
         "generalization.teacher_forced_token", FORCED),
    Term("EasyEdit", "portability_acc", "portability, token accuracy", "portability.generate",
         "portability.teacher_forced_token", FORCED),
    Term("EasyEdit", "locality_acc", "locality, agreement with the unedited model", "locality.generate", None,
         f"agreement position by position behind the true answer's tokens, which rows do not hold; {FORCED}"),
    Term("GRACE", "F1", "F1 of the generated answer", "efficacy.f1", "efficacy.f1_set",
         "the end of text counts as a word, so that a wrong word scores 0.5"),
)  # fmt: skip
_BY_LETTERS = {(term.paper, term.letters): term for term in TERMS}


def term(paper: str, letters: str) -> Term:
    """What a paper's letters mean. Raises ConfigError that lists the paper's letters, or the papers."""
    if (paper, letters) in _BY_LETTERS:
        return _BY_LETTERS[paper, letters]
    own = [known.letters for known in TERMS if known.paper == paper]
    papers = ", ".join(dict.fromkeys(known.paper for known in TERMS))
    raise ConfigError(
        f"no {letters!r} of {paper!r}; there are {', '.join(own)}" if own else f"no {paper!r}; there are {papers}"
    )
