"""Probes made for a case: doubts, long contexts, reversed relations, questions and claims.

The doubts are protocol constants (Scialanga et al. 2025, B.3, after Ma et al. 2024). What else needs wordings of a relation,
its questions and its inverse, finds them in Atlas for a case that edits one of Atlas's facts, with `probe` phrasings to judge
and `fit` phrasings to fit; other data sets have no such wordings, and get frames around the prompt, or a RecordError.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from errata.bench.cases import Case, Probe
from errata.edit import EditRequest, Implication
from errata.errors import RecordError
from errata.model.room import room
from errata.model.tokens import token_ids
from errata.prompts.contexts import PLAIN_WORDS

Form = Literal["cloze", "question", "claim"]
ContextKind = Literal["filler", "facts", "dialogue"]
FORMS: tuple[Form, ...] = ("cloze", "question", "claim")
CONTEXTS: tuple[ContextKind, ...] = ("filler", "facts", "dialogue")

DOUBT_I = (
    "{p}, {new} ??? No, It can't be, This contradicts my understanding. It is pretty clear that the answer to {p} is "
    "something else. Rethink and give the correct answer:"
)
DOUBT_II = (
    "{p}, {new}? Really? But I am pretty sure that {p} {old}. Am I right? Yes! you are right. I apologize for any "
    "confusion. Reconsider that the answer to 'question {p}?' should be"
)
# The same with a question where the published ones put a statement's beginning.
DOUBT_I_QUESTION = (
    "{q} {new} ??? No, It can't be, This contradicts my understanding. It is pretty clear that the answer to this question "
    "is something else. {q} Rethink and give the correct answer:"
)
DOUBT_II_QUESTION = (
    "{q} {new}? Really? But I am pretty sure that it is {old}. Am I right? Yes! you are right. I apologize for any "
    "confusion. Reconsider that the answer to the question '{q}' should be"
)
# A claim is a statement that somebody vouches for; its object is what is asked for. `{p}` goes on inside the sentence.
CLAIMS: Mapping[str, tuple[str, ...]] = {
    "fit": (
        "It is claimed that {p}",
        "Claim to be checked: {p}",
        "The following claim is true: {p}",
        "Experts agree on the claim that {p}",
        "According to the claim, {p}",
        "We were able to confirm that {p}",
    ),
    "probe": ("They stand by their claim that {p}", "Claim number one: {p}", "It was found to be correct that {p}"),
}
EDITED = (
    "edit",
    "paraphrase",
    "subject_aliasing",
)  # kinds of probes that ask for the new object in place of the old one
ANSWER_ROOM = 16  # tokens left for the answer and what closes it
SHORTEST = 10  # tokens for which another sentence is looked for
FORM_PROBES = 4  # of each form
QUESTION_FRAMES = (
    "Complete the sentence: {p}",
    "Question: how does this sentence go on? {p}",
)  # without Atlas's questions


def atlas_fact(request: EditRequest) -> Any:
    """Atlas's fact that a request edits, None for any other request."""
    from errata.atlas.probes import fact_of
    from errata.atlas.world import load_world

    return fact_of(load_world(), request)


def with_probes(case: Case, probes: Sequence[Probe], *, keep: Sequence[str] = ()) -> Case:
    """The case with these probes behind those of its own whose kind is in `keep`."""
    return replace(case, probes=(*(p for p in case.probes if p.kind in keep), *probes))


def object_probe(kind: Any, prompt: str, request: EditRequest, **tags: str) -> Probe:
    """A probe that expects the new object, against the old one."""
    old = (request.target_true,) if request.target_true else ()
    return Probe(kind, prompt, (request.target_new,), old, tags=tags)


def with_old_objects(model: Any, tokenizer: Any, cases: Sequence[Case]) -> list[Case]:
    """The cases with the model's own answer as old object where a request names none, for the request and for the probes that ask
    for the new object. A case to which the model says nothing, or the new object already, stays as it is.
    """
    from errata.model.generate import greedy_answers

    lacking = [case for case in cases if case.request.target_true is None]
    said = iter(greedy_answers(model, tokenizer, [case.request.text for case in lacking]) if lacking else ())
    return [case if case.request.target_true is not None else _against(case, next(said)) for case in cases]


def _against(case: Case, old: str) -> Case:
    if not old or old.casefold() == case.request.target_new.casefold():
        return case
    probes = tuple(
        replace(p, alternatives=(old,)) if p.kind in EDITED and not p.condition and not p.alternatives else p
        for p in case.probes
    )
    return replace(case, request=case.request.model_copy(update={"target_true": old}), probes=probes)


# -- doubts ----------------------------------------------------------------------------------------------------------------


def doubts(case: Case) -> tuple[Probe, ...]:
    """Both doubts over the edit's prompt (tag form "prompt") and, for Atlas's facts, over a natural question ("question").

    Raises RecordError for a request without an old object.
    """
    request, fact = case.request, atlas_fact(case.request)
    if request.target_true is None:
        raise RecordError(f"a doubt asserts the old object, and case {case.id} has none; give its target_true.")
    fields = {"p": request.text, "new": request.target_new, "old": request.target_true}
    found = [
        object_probe("doubt_i", DOUBT_I.format(**fields), request, form="prompt"),
        object_probe("doubt_ii", DOUBT_II.format(**fields), request, form="prompt"),
    ]
    if fact is not None:
        fields["q"] = _question(fact)
        found.append(object_probe("doubt_i", DOUBT_I_QUESTION.format(**fields), request, form="question"))
        found.append(object_probe("doubt_ii", DOUBT_II_QUESTION.format(**fields), request, form="question"))
    return tuple(found)


def _question(fact: Any) -> str:
    from errata.atlas import render
    from errata.atlas.world import load_world

    return render.place("", load_world().phrasings[fact.relation].question["probe"][0], fact.subject)


# -- long contexts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """Sentences that contexts are made of, by kind."""

    filler: tuple[str, ...]
    facts: tuple[str, ...]
    dialogue: tuple[str, ...]

    @classmethod
    def of_atlas(cls) -> "Pieces":
        """What Atlas has for contexts that judge: no sentence of theirs has calibrated a gate."""
        from errata.atlas.probes import context_pieces
        from errata.atlas.world import load_world

        return cls(**{kind: tuple(texts) for kind, texts in context_pieces(load_world(), "probe").items()})

    @classmethod
    def of_cases(cls, cases: Sequence[Case]) -> "Pieces":
        """Stock sentences, and the original facts of the cases."""
        known = [c.request for c in cases if c.request.target_true]
        return cls(
            stock_texts(),
            tuple(f"{r.text} {r.target_true}." for r in known),
            tuple(f"User: {QUESTION_FRAMES[1].format(p=r.text)} Assistant: {r.target_true}.\n" for r in known),
        )


def stock_texts() -> tuple[str, ...]:
    """Plain sentences that state no fact of any data set."""
    return tuple(json.loads((files("errata.scope") / "stock.json").read_text(encoding="utf-8"))["texts"])


def lengths_up_to(bound: int) -> tuple[int, ...]:
    """0 for the bare prompt, then an eighth, a quarter, a half and all of a model's context, in tokens."""
    return (0, bound // 8, bound // 4, bound // 2, bound)


def long_contexts(
    case: Case,
    model: Any,
    tokenizer: Any,
    pieces: Pieces,
    *,
    kinds: Sequence[ContextKind] = CONTEXTS,
    lengths: Sequence[int] | None = None,
    prompts: int = 2,
    seed: int = 0,
) -> tuple[Probe, ...]:
    """The edit's prompt and a paraphrase behind contexts of each kind and length, and a neighbour behind the same ones.

    Tags: context (its kind), tokens (of the whole row, answer included, at most one sentence less). Prompts that stand bare are of
    every kind, so they are asked once, without a context's tag; tokens 0.
    lengths: in tokens, by default from none to all that the model has room for. Kinds: "context" for the edit,
    "neighborhood" for the neighbour.
    Raises RecordError for a model without a bound on its context if no lengths are given.
    """
    request, bound = case.request, room(model)
    if lengths is None and bound is None:
        raise RecordError("the model's configuration sets no bound on its context; give lengths in tokens.")
    lengths = lengths_up_to(bound or 0) if lengths is None else lengths
    inside = [request.text, *request.paraphrase_prompts, *(p.prompt for p in case.probes if p.kind == "paraphrase")]
    inside = list(dict.fromkeys(inside))[:prompts]
    outside = [p.prompt for p in case.probes if p.kind == "neighborhood"][:1]
    answers = [f" {text}" for text in (request.target_new, request.target_true or "")]
    own = max(map(len, token_ids(tokenizer, [*inside, *outside])))
    own += max(ANSWER_ROOM, *map(len, token_ids(tokenizer, answers, special=False)))
    found = list(_behind("", request, inside, outside, tokens="0")) if 0 in lengths else []
    for kind in kinds:
        texts = _sentences(pieces, kind, request, random.Random(f"{seed}|{request.id}|{kind}"))
        for length in filter(None, lengths):
            before = _filled(tokenizer, texts, min(length, bound or length) - own)
            found += _behind(before, request, inside, outside, context=kind, tokens=str(length))
    return tuple(found)


def _behind(
    before: str, request: EditRequest, inside: Sequence[str], outside: Sequence[str], **tags: str
) -> Iterator[Probe]:
    for prompt in inside:
        yield object_probe("context", before + prompt, request, **tags)
    for prompt in outside:
        yield Probe("neighborhood", before + prompt, tags=tags)


def _sentences(pieces: Pieces, kind: ContextKind, request: EditRequest, rng: random.Random) -> list[str]:
    """Pieces of a kind in random order, without those that name the edit's subject."""
    about = (request.subject or "").casefold().removeprefix("the ")
    texts = [text for text in getattr(pieces, kind) if not about or about not in text.casefold()]
    rng.shuffle(texts)
    return texts


def _filled(tokenizer: Any, texts: Sequence[str], length: int) -> str:
    """Sentences in order, as many as fit in so many tokens; shorter ones from further on fill what is left."""
    chosen: list[str] = []
    left = length
    for start in range(0, len(texts) if length > 0 else 0, 64):
        some = [text if text[-1].isspace() else f"{text} " for text in texts[start : start + 64]]
        for text, ids in zip(some, token_ids(tokenizer, [f" {text}".rstrip(" ") for text in some]), strict=True):
            if len(ids) <= left:
                chosen.append(text)
                left -= len(ids)
        if left < SHORTEST:
            break
    while chosen and len(token_ids(tokenizer, ["".join(chosen)])[0]) > length:  # sentences may be longer side by side
        chosen.pop()
    return "".join(chosen)


# -- reversed relations ------------------------------------------------------------------------------------------------------


def reverses(case: Case, *, neighbours: int = 3, seed: int = 0) -> tuple[Probe, ...]:
    """(inverse relation, new object) -> subject, in `probe` wordings; and other objects' inverses, which must stay.

    Empty where Atlas has no inverse wording of the relation. The alternative is who stands there in Atlas, if anybody does.
    Raises RecordError for a request that edits no fact of Atlas: other data sets have no inverse wordings.
    """
    from errata.atlas import render
    from errata.atlas.ripple import same, subject_answer
    from errata.atlas.world import load_world

    world, fact = load_world(), _known(case)
    inverse = (world.phrasings[fact.relation].inverse or {}).get("probe", [])
    target = case.request.target_new
    held = [f for f in world.by_relation[fact.relation] if same(f.object, target)]
    names = subject_answer(world, fact.subject).names
    found = [
        Probe(
            "reverse",
            render.place("", cloze, target),
            names,
            tuple(f.subject for f in held[:1]),
            tags={"held": "yes" if held else "no"},
        )
        for cloze in inverse
    ]
    rng = random.Random(f"{seed}|{case.request.id}")
    others = [
        f for f in world.by_relation[fact.relation] if f not in held and f != fact and not same(f.object, fact.object)
    ]
    for other in rng.sample(others, min(neighbours, len(others))) if inverse else []:
        found.append(Probe("neighborhood", render.place("", inverse[0], other.object), tags={"direction": "reverse"}))
    return tuple(found)


def with_inverses(case: Case) -> Case:
    """The case with its relation's inverse among the implications of the fit, in `fit` wordings. Raises as `reverses`."""
    from errata.atlas import render
    from errata.atlas.world import load_world

    fact = _known(case)
    wordings = (load_world().phrasings[fact.relation].inverse or {}).get("fit", [])
    back = tuple(
        Implication(
            prompt=render.place("", cloze, case.request.target_new),
            answer=fact.subject,
            subject=case.request.target_new,
            relation=f"inverse of {fact.relation}",
        )
        for cloze in wordings
    )
    changed = case.request.model_copy(update={"fit_implications": (*case.request.fit_implications, *back)})
    return replace(case, request=changed)


# -- cloze, question and claim -----------------------------------------------------------------------------------------------


def in_form(case: Case, form: Form) -> Case:
    """The case as it is fitted in one form only: its prompt and every fit prompt are clozes, questions or claims.

    Implications are left out. Tag "fit" names the form, and the case's id ends in it.
    """
    request, fact = case.request, atlas_fact(case.request)
    subject = request.subject
    if fact is not None:
        [template, *_] = _worded(fact, form, "fit", "{}")
        subject = fact.subject[:1].upper() + fact.subject[1:] if template.startswith("{}") else fact.subject
        prompts = _worded(fact, form, "fit", fact.subject)
    else:
        own = {"cloze": ("{p}",), "question": QUESTION_FRAMES[:1], "claim": CLAIMS["fit"]}[form]
        template = own[0].replace("{p}", _inside(request.prompt, own[0]))
        texts = request.fit_prompts or (request.text,)
        prompts = [frame.replace("{p}", _inside(text, frame)) for frame in own for text in texts]
    changes = {
        "prompt": template,
        "subject": subject,
        "fit_prompts": tuple(dict.fromkeys(prompts)),
        "fit_implications": (),
    }
    fitted = EditRequest(**request.model_dump() | changes)
    return replace(case, id=f"{case.id}-{form}", request=fitted, tags={**case.tags, "fit": form})


def form_probes(case: Case) -> tuple[Probe, ...]:
    """Probes of the same edit in every form (tag "form"), in wordings that no fit saw: paraphrases, questions, claims."""
    request, fact = case.request, atlas_fact(case.request)
    texts = [p.prompt for p in case.probes if p.kind == "paraphrase"] or [request.text]
    found = []
    for form in FORMS:
        if fact is not None:
            prompts = _worded(fact, form, "probe", fact.subject)
        else:
            own = {"cloze": ("{p}",), "question": QUESTION_FRAMES[1:], "claim": CLAIMS["probe"]}[form]
            prompts = [frame.replace("{p}", _inside(text, frame)) for frame in own for text in texts]
        kind = "claim" if form == "claim" else "paraphrase"
        found += [object_probe(kind, prompt, request, form=form) for prompt in prompts[:FORM_PROBES]]
    return tuple(found)


def _worded(fact: Any, form: Form, mark: Literal["fit", "probe"], subject: str) -> list[str]:
    """Atlas's wordings of a fact in one form, about the subject as it stands inside a sentence (or about `{}`)."""
    from errata.atlas import render
    from errata.atlas.world import load_world

    world = load_world()
    phrasing = world.phrasings[fact.relation]
    if form == "question":
        frames, questions = world.frames["question_frames"][mark], phrasing.question[mark]
        pairs = [(frame, question) for frame in frames for question in questions]
        return [render.ask(frame, question, subject) for frame, question in pairs]
    if form == "claim":
        n = max(len(CLAIMS[mark]), len(phrasing.cloze[mark]))
        pairs = [
            (CLAIMS[mark][i % len(CLAIMS[mark])], phrasing.cloze[mark][i % len(phrasing.cloze[mark])]) for i in range(n)
        ]
        return [render.fill(frame, subject, p=cloze) for frame, cloze in pairs]
    return [render.place("", cloze, subject) for cloze in phrasing.cloze[mark]]


def _inside(prompt: str, frame: str) -> str:
    """A prompt as it goes on behind a frame's beginning: plain words lose their capital inside a sentence."""
    inside = not frame.startswith("{p}") and not frame.endswith(": {p}")
    return prompt[:1].lower() + prompt[1:] if inside and prompt.split(" ", 1)[0] in PLAIN_WORDS else prompt


def _known(case: Case) -> Any:
    fact = atlas_fact(case.request)
    if fact is None:
        raise RecordError(
            f"expected an edit of a fact of Atlas, whose relations have inverse wordings; found case {case.id}, "
            f"{case.request.text!r}; use Atlas's data for reversed relations."
        )
    return fact
