"""Where an edit's in-scope prompts come from. A source fills `fit_prompts` and `fit_implications` of a request.

`given`: what the request's file holds (an expert's prompts). `agentic`: written by a language model behind an
OpenAI-compatible endpoint, optionally refined in rounds against the fitted edit. Atlas's own phrasings are
`errata.atlas.requests.request_for`. With no prompts at all, editors put lead-ins over the bare prompt.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from errata.edit import EditRequest, Implication
from errata.errors import RequestError
from errata.model.generate import cut, greedy, greedy_answers, says
from errata.patch import Patch
from errata.prompts import agentic, contexts
from errata.prompts.agentic import Judge, Kind
from errata.prompts.endpoint import Endpoint
from errata.steering.parts import Decision

Source = Callable[[EditRequest], EditRequest]
JudgeFor = Callable[[EditRequest, Kind], Judge]


def given(request: EditRequest) -> EditRequest:
    """The request as it is."""
    return request


def with_old_object(model: Any, tokenizer: Any, request: EditRequest, wrap: Callable[[str], str] = str) -> EditRequest:
    """The request with the model's own greedy answer as target_true if it names none.

    wrap: what the prompt goes through before it is asked (`errata.model.tokens.wrapper`).
    Raises RequestError if the model says nothing, or target_new already.
    """
    if request.target_true is not None:
        return request
    [answer] = greedy_answers(model, tokenizer, [wrap(request.text)])
    if not answer or answer.casefold() == request.target_new.casefold():
        found = f"answers {answer!r} already" if answer else "says nothing"
        raise RequestError(
            f"target_true is not given, and to {request.text!r} the model {found}; there is nothing to replace"
        )
    return request.model_copy(update={"target_true": answer})


def agentic_source(
    endpoint: Endpoint,
    *,
    prompts: int = 100,
    implications: int = 25,
    seed: int = 0,
    rounds: int = 0,
    judge: JudgeFor | None = None,
    resolve: Source = given,
    cache_dir: Path | None = None,
) -> Source:
    """A source that asks the endpoint; with `rounds` and a judge, what the edit misses is refined so often.

    Rounds go to the prompts first, then, fitted on the refined prompts, to the implications. resolve: fills in the old
    object (`with_old_object`) before anything is asked: texts that contain it are refused, and without it none would be.
    Raises EndpointError if the endpoint is unreachable or gives nothing usable.
    """

    def source(request: EditRequest) -> EditRequest:
        request = resolve(request)
        about: dict[str, Any] = {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_true": request.target_true,
            "target_new": request.target_new,
        }
        found = agentic.paraphrases(endpoint, **about, n=prompts, seed=seed, cache_dir=cache_dir)
        follows = (
            agentic.implications(endpoint, **about, n=implications, seed=seed, cache_dir=cache_dir)
            if implications
            else []
        )
        filled = _filled(request, [request.text, *found], follows)
        if rounds and judge:
            more: dict[str, Any] = about | {"rounds": rounds, "seed": seed, "cache_dir": cache_dir}
            found = agentic.refine(endpoint, [request.text, *found], judge(filled, "paraphrase"), **more)
            filled = _filled(request, found, follows)
            if follows:
                follows = agentic.refine(endpoint, follows, judge(filled, "implication"), **more, kind="implication")
                filled = _filled(request, found, follows)
        return filled

    return source


def _filled(request: EditRequest, prompts: Sequence[str], follows: Sequence[str]) -> EditRequest:
    implications = request.fit_implications + tuple(Implication(prompt=p, subject=request.subject) for p in follows)
    unique = tuple(dict.fromkeys((*request.fit_prompts, *prompts)))
    return request.model_copy(update={"fit_prompts": unique, "fit_implications": implications})


def misses(
    model: Any, tokenizer: Any, fit: Callable[[EditRequest], Patch], wrap: Callable[[str], str] = str
) -> JudgeFor:
    """A judge for `agentic_source`: fits the edit on every other text and says why one is missed, by the gate or the map.

    A paraphrase should be answered by the new object, an implication by what the unedited model says where the edited
    fact is supposed; one to which it has no answer then is not missed. wrap: what each text goes through.
    """

    def judge_for(request: EditRequest, kind: Kind) -> Judge:
        def judge(prompts: Sequence[str]) -> list[str | None]:
            asked = [wrap(p) for p in prompts]
            if kind == "paraphrase":
                wanted = [request.target_new] * len(prompts)
            else:
                statement = f"{request.text} {request.target_new}"
                wanted = greedy_answers(model, tokenizer, [wrap(contexts.supposed(statement, p)) for p in prompts])
            with fit(_half(request, kind, prompts)).attach(model, tokenizer) as handle:
                decisions = handle.decide(asked)
                answers = greedy(model, tokenizer, asked)
            return [
                _reason(decision, answer, expected, kind)
                for decision, answer, expected in zip(decisions, answers, wanted, strict=True)
            ]

        return judge

    return judge_for


def _half(request: EditRequest, kind: Kind, prompts: Sequence[str]) -> EditRequest:
    """The request with every other one of the judged texts, and with what else it brought along."""
    half = prompts[::2]
    if kind == "paraphrase":
        return request.model_copy(update={"fit_prompts": tuple(half)})
    left_out = set(prompts) - set(half)
    known = {i.prompt for i in request.fit_implications}
    kept = [i for i in request.fit_implications if i.prompt not in left_out]
    kept += [Implication(prompt=p, subject=request.subject) for p in half if p not in known]
    return request.model_copy(update={"fit_implications": tuple(kept)})


def _reason(decision: Decision, answer: str, expected: str, kind: Kind) -> str | None:
    """Why a text is missed; None if it is not."""
    if kind == "implication" and (not expected or says(answer, expected)):
        return None  # nothing follows, or the model says so, by the edit or on its own
    if decision.edit is None:
        return f"the gate stays closed (distance {decision.distance:.3g}, radius {decision.radius:.3g})"
    return None if says(answer, expected) else f"the edited model answers {cut(answer)!r}, not {expected!r}"
