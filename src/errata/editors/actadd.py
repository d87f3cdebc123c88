"""ActAdd: one contrast pair of prompts is one direction to steer by (Turner et al. 2023, as SAKE's paper uses it, B.2).

For each edit there is a prompt after which the unedited model is about to say the old object, p_old, and one after which it
is about to say the new one, p_new; where the gate says that the edit is meant, h' = h + c (h(p_new) - h(p_old)). Site, gate
and scope are SAKE's, so that the two differ in the direction alone. Emits one steering part for each edit.

Differs from the paper by default (the presets restore its first token and its gate): an object of several tokens has a
pair for each, behind p_old + o*[:t] and p_new + o*[:t], and the gate reads the model's own activations, calibrated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from errata.edit import EditRequest
from errata.editor import Editor, Progress
from errata.editors.sake import MINILM, SAKEConfig, SteeringFit, fit_each
from errata.errors import ConfigError
from errata.patch import Patch
from errata.prompts import contexts
from errata.steering.parts import Steering

WORDINGS = 3  # of a pair's prompts that are tried
PAPER = {"prompts": 100, "span": "first", "half": False, "gate": MINILM}


@dataclass(frozen=True)
class ActAddConfig:
    """Settings of ActAdd.

    coefficient: c. prompts: in-scope prompts that make the scope. span: `all` tokens of the new object or the `first`; layer:
    `final` (the final norm's output) or a block's index; token: which position's state is shifted, from the end. gate, radius,
    half, chat: as SAKE's.
    """

    coefficient: float = 1.0
    prompts: int = 50
    span: Literal["all", "first"] = "all"
    layer: str | int = "final"
    token: int = -1
    gate: str = "auto"
    radius: float | None = None
    half: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ConfigError(f"expected a coefficient above 0, found {self.coefficient}")
        self.sake()

    def sake(self) -> SAKEConfig:
        """SAKE's settings for the same site and scope. Raises ConfigError for what cannot be."""
        own = ("prompts", "span", "layer", "token", "gate", "radius", "half", "chat")
        return SAKEConfig(
            map="uniform", strength=self.coefficient, implications="none", lift=False, tolerance=0.0,
            **{name: getattr(self, name) for name in own},
        )  # fmt: skip


class ActAdd(Editor[ActAddConfig]):
    """Steering by one contrast pair behind SAKE's scope test."""

    method = "actadd"
    summary = "shift of the last hidden state by one contrast pair, behind SAKE's scope test (Turner et al. 2023)"
    place = "external memory"
    how = "direct"
    scoped = True
    Config = ActAddConfig
    presets = {
        "paper-gpt2-xl-counterfact": PAPER | {"radius": 6.75},
        "paper-llama-2-7b-counterfact": PAPER | {"radius": 6.75},
        "paper-gpt2-xl-popular": PAPER | {"radius": 5.5},
        "paper-llama-2-7b-popular": PAPER | {"radius": 5.3},
    }

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Fit every request on its own, on the model without any patch. Raises RequestError for what cannot be fitted."""
        return fit_each(self, self.config.sake(), _Pair, model, tokenizer, requests, seed, progress)


class _Pair(SteeringFit):
    """One request's pair; its scope is made of the prompts that SAKE would take."""

    def edit(self) -> Steering:
        request, old, new = self.request, self.request.target_true or "", self.request.target_new
        given = list(dict.fromkeys((*request.fit_prompts, request.text)))
        prompts = contexts.lead_ins(given, self.config.prompts, self.seed)
        wanted, said = self._answer(request.text, new), self._answer(request.text, old)
        negative = [contexts.repeat(request.text, old, w) for w in range(WORDINGS)]
        positive = [contexts.instead(request.text, old, new, w) for w in range(WORDINGS)]
        before, self.report["old_is_said"] = self._first_saying(negative, said)
        after, self.report["new_is_said"] = self._first_saying(positive, wanted)
        source, target = self._states([before], wanted), self._states([after], wanted)
        none: tuple[Tensor, Tensor] = (source[:0, 0], target[:0, 0])
        self.report["prompts"] = len(prompts)
        return self._part(request.key, prompts, len(given), source, target, wanted, none, self.report)

    def _first_saying(self, prompts: Sequence[str], answer: list[int]) -> tuple[str, bool]:
        """The first prompt after which the unedited model says the answer, else the first of all; and whether it does."""
        for prompt in prompts:
            if bool(self._said(self._states([prompt], answer), answer)[0]):
                return prompt, True
        return prompts[0], False
