"""Flexibility: what is left of edits that are taken back, by detaching them and by editing once more.

Edits of weights are said to be taken back by the inverse edit: the old object, fitted on the edited model. SAKE's paper
(Scialanga et al. 2025) names what that leaves behind as a limitation of such methods. Here both ways are measured on the same N
edits, all in the model at once: how far its logits are from the unedited model's, how many other facts it answers otherwise,
and whether its old answers are back.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.bench.metrics import by_case, rate
from errata.bench.verify import or_reason
from errata.edit import EditRequest
from errata.editor import Editor, Progress
from errata.errors import RequestError
from errata.merge import merge
from errata.model import attached
from errata.model.generate import cut, greedy, next_logits, says
from errata.model.tokens import pad_id, token_ids

PROTOCOLS = {
    "old_answers.generate": "unedited greedy answer given again, on the edit prompt; mean over edits",
    "old_answers_paraphrased.generate": "the same, on paraphrase prompts; mean over edits",
    "new_objects.generate": "whole new object, greedy, on the edit prompt; mean over edits",
    "facts_changed.generate": "greedy answer other than the unedited model's, on neighbouring prompts; mean over edits",
    "kl.prob": "KL(unedited || this model) of the next token, nats; mean over edit, neighbouring and unrelated prompts",
    "distance.logits": "|logits - unedited logits| / |unedited logits|, both centred, of the next token; mean over the same",
}


def inverse(request: EditRequest) -> EditRequest:
    """The edit that takes a request back: new and old object change places. Raises RequestError without an old object."""
    if request.target_true is None:
        raise RequestError(
            f"expected the old object of {request.text!r} to go back to, found none; give its target_true"
        )
    return request.model_copy(
        update={
            "target_new": request.target_true,
            "target_true": request.target_new,
            "fit_prompts": (),
            "fit_implications": (),
        }
    )


def flexibility(
    model: Any,
    tokenizer: Any,
    editor: Editor[Any],
    requests: Sequence[EditRequest],
    unrelated: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit the requests, then take them back in both ways. JSON values: for each state ("edited", "inverse", "detached") its
    figures by metric, {value, low, high, n, protocol} for shares; `restored`: whether detaching left every bit as it was.

    The inverse edits are fitted by the same editor on the model with the first merged into its weights, and attached on top
    of them; their key statistics are the first ones. The model is left as found. Raises RequestError for a request without
    an old object, UnsupportedPatchError for a method that does not edit weights.
    """
    back = [inverse(request) for request in requests]
    asked = _Asked.of(tokenizer, requests, unrelated)
    plain = asked.read(model, tokenizer)
    patch = editor.fit(model, tokenizer, requests, seed=seed, progress=progress)
    states: dict[str, _Read] = {}
    with ExitStack() as stack:
        stack.enter_context(merge(patch, model, tokenizer))
        undoing = editor.fit(model, tokenizer, back, seed=seed, progress=progress)
        states["edited"] = asked.read(model, tokenizer)
        # A patch's base is the model without what is merged into it, so that of the first edits is the inverse's too.
        stack.enter_context(replace(undoing, base=patch.base).attach(model, tokenizer))
        states["inverse"] = asked.read(model, tokenizer)
    with patch.attach(model, tokenizer):
        asked.logits(model, tokenizer)  # what a pass under the patch might leave behind is what detaching must undo
    states["detached"] = asked.read(model, tokenizer)
    return {
        "method": editor.method,
        "config": patch.config,
        "n_edits": len(patch),
        "n_prompts": len(asked.texts),
        "protocols": PROTOCOLS,
        **{name: asked.figures(plain, read) for name, read in states.items()},
        "restored": torch.equal(states["detached"].logits, plain.logits),
    }


@dataclass(frozen=True, eq=False)
class _Read:
    """What a model says: answers by prompt, and (n, V) logits of the next token of every text."""

    answers: dict[str, str]
    logits: Tensor


@dataclass(frozen=True)
class _Asked:
    """The prompts that are put to every state of the model."""

    requests: tuple[EditRequest, ...]
    texts: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, tokenizer: Any, requests: Sequence[EditRequest], unrelated: Sequence[str]) -> "_Asked":
        objects = [f" {t}" for r in requests for t in (r.target_new, r.target_true or "")]
        own = [prompt for r in requests for prompt in (r.text, *r.neighborhood_prompts)]
        length = max(map(len, token_ids(tokenizer, objects, special=False))) + 2
        return cls(tuple(requests), tuple(dict.fromkeys((*own, *unrelated))), length)

    def read(self, model: Any, tokenizer: Any) -> _Read:
        wanted = [p for r in self.requests for p in (r.text, *r.paraphrase_prompts, *r.neighborhood_prompts)]
        prompts = list(dict.fromkeys(wanted))
        texts = greedy(model, tokenizer, prompts, self.length)
        return _Read(dict(zip(prompts, texts, strict=True)), self.logits(model, tokenizer))

    def logits(self, model: Any, tokenizer: Any) -> Tensor:
        """(n, V) logits behind each text."""
        return next_logits(model, token_ids(tokenizer, attached.asked(model, self.texts)), pad_id(tokenizer))

    def figures(self, plain: _Read, read: _Read) -> dict[str, Any]:
        """One state's figures by metric."""
        same = {prompt: cut(text) == cut(plain.answers[prompt]) for prompt, text in read.answers.items()}
        outcomes = {
            "old_answers.generate": [(r.id, same[r.text]) for r in self.requests],
            "old_answers_paraphrased.generate": [(r.id, same[p]) for r in self.requests for p in r.paraphrase_prompts],
            "new_objects.generate": [(r.id, says(read.answers[r.text], r.target_new)) for r in self.requests],
            "facts_changed.generate": [(r.id, not same[p]) for r in self.requests for p in r.neighborhood_prompts],
        }
        found: dict[str, Any] = {}
        for name, cases in outcomes.items():
            figure = rate(by_case((c for c, _ in cases), (o for _, o in cases)).values(), PROTOCOLS[name])
            found[name] = or_reason(figure, "the requests carry no such prompts")
        p, q = (x.logits.double().log_softmax(-1) for x in (plain, read))
        here, there = (x.logits.double() - x.logits.double().mean(-1, keepdim=True) for x in (plain, read))
        found["kl.prob"] = float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))
        found["distance.logits"] = float(((there - here).norm(dim=-1) / here.norm(dim=-1)).mean())
        return found
