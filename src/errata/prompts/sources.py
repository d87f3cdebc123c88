"""Where an edit's in-scope prompts come from. A source fills `fit_prompts` and `fit_implications` of a request.

`given`: what the request's file holds (an expert's prompts). `agentic`: written by a language model behind an
OpenAI-compatible endpoint, optionally refined in rounds against the fitted edit. Atlas's own phrasings are
`errata.atlas.requests.request_for`. With no prompts at all, editors put lead-ins over the bare prompt.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from errata.edit import EditRequest, Implication
from errata.model.generate import greedy, says
from errata.patch import Patch
from errata.prompts import agentic
from errata.prompts.agentic import Judge
from errata.prompts.endpoint import Endpoint

Source = Callable[[EditRequest], EditRequest]


def given(request: EditRequest) -> EditRequest:
    """The request as it is."""
    return request


def agentic_source(
    endpoint: Endpoint,
    *,
    prompts: int = 100,
    implications: int = 25,
    seed: int = 0,
    rounds: int = 0,
    judge: Callable[[EditRequest], Judge] | None = None,
    cache_dir: Path | None = None,
) -> Source:
    """A source that asks the endpoint; with `rounds` and a judge, prompts that the edit misses are refined so often.

    Raises EndpointError if the endpoint is unreachable or gives nothing usable.
    """

    def source(request: EditRequest) -> EditRequest:
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
            found = agentic.refine(
                endpoint, [request.text, *found], judge(filled), **about, rounds=rounds, seed=seed, cache_dir=cache_dir
            )
            filled = _filled(request, found, follows)
        return filled

    return source


def _filled(request: EditRequest, prompts: Sequence[str], follows: Sequence[str]) -> EditRequest:
    implications = request.fit_implications + tuple(Implication(prompt=p, subject=request.subject) for p in follows)
    unique = tuple(dict.fromkeys((*request.fit_prompts, *prompts)))
    return request.model_copy(update={"fit_prompts": unique, "fit_implications": implications})


def misses(model: Any, tokenizer: Any, fit: Callable[[EditRequest], Patch]) -> Callable[[EditRequest], Judge]:
    """A judge for `agentic_source`: fits the edit on every other prompt and says why a prompt is missed, by the gate or the map."""

    def judge_for(request: EditRequest) -> Judge:
        def judge(prompts: Sequence[str]) -> list[str | None]:
            half = request.model_copy(update={"fit_prompts": tuple(prompts[::2])})
            patch = fit(half)
            with patch.attach(model, tokenizer) as handle:
                decisions = handle.decide(prompts)
                answers = greedy(model, tokenizer, prompts)
            reasons: list[str | None] = []
            for decision, answer in zip(decisions, answers, strict=True):
                if decision.edit is None:
                    reasons.append(
                        f"the gate stays closed (distance {decision.distance:.3g}, radius {decision.radius:.3g})"
                    )
                else:
                    reasons.append(
                        None if says(answer, request.target_new) else f"the edited model answers {answer.strip()!r}"
                    )
            return reasons

        return judge

    return judge_for
