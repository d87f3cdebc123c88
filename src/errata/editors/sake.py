"""SAKE: an edit is a distribution of prompts, moved by linear optimal transport (Scialanga et al. 2025).

For each edit the last-token states of prompts that ask for the fact, plain and behind "repeat: prompt + old object", form
the source; the same prompts behind "do not mention the old; repeat: prompt + new object" form the target. The linear
optimal transport map between the two Gaussians is applied to the output of the final norm wherever the gate says that the
edit is meant. Emits one steering part for each edit, and one for each implication.

Differs from the paper by default (`variant="paper"` and `variant="code"` restore the published behaviour):
- objects of several tokens: step t has its own map, fitted on the states after prompt + o*[:t] (the paper: first token),
  and an object that the model would not end by itself ("5" running on to "52") gets a last map that ends it;
- an implication is a distribution of its own, with its own map and scope (the paper pools its states with the edit's, so
  that one map must serve different answers);
- the gate reads the model's own activations, calibrated (the paper: a sentence encoder with fixed thresholds);
- regularisation is relative to the source's variance (the paper: absolute), each target context is checked to really
  produce the new object, and where none does the target states are lifted until they do;
- the shift between the means is lengthened by `strength`, there are 50 prompts, of which 12 get contexts (the paper: 100, all),
  and maps are truncated and stored in half precision; the report states the error.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.edit import EditRequest, Implication
from errata.editor import Editor, Progress, quiet
from errata.editors._items import with_contradictions
from errata.editors._scope import Scope, gate_named
from errata.errors import ConfigError, RequestError
from errata.maths.transport import LinearMap, gaussian_distance, gaussian_transport, mean_shift
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.generate import greedy_answers
from errata.model.room import check_room
from errata.model.states import states_at
from errata.model.tokens import chat, continuation_ids, token_ids, wrapper
from errata.patch import Patch
from errata.prompts import contexts
from errata.prompts.sources import with_old_object
from errata.scope.gate import Gate
from errata.steering.parts import Steering

MINILM = "encoder:sentence-transformers/paraphrase-MiniLM-L6-v2"
PAPER = {
    "prompts": 100,
    "context_prompts": 100,
    "strength": 1.0,
    "lift": False,
    "tolerance": 0.0,
    "half": False,
    "span": "first",
    "reg": 1e-2,
    "reg_relative": False,
    "gate": MINILM,
    "affirm": False,
    "implications": "none",
}
CODE = PAPER | {"affirm": True}
POOLED = {"implications": "pooled", "pooled_implications": 25}
# How many wordings of a consequence tell how far apart wordings lie. Its near neighbours are about the very same subject ("the
# mother tongue of X", "the language of the country of X"), so it is held tight; an edit itself must be found behind any context.
WORDINGS = 2


@dataclass(frozen=True)
class SAKEConfig:
    """Settings of SAKE.

    prompts: in-scope prompts per edit; context_prompts: how many of them also get the two contexts; implication_prompts:
    prompts per implication. span: `all` tokens of the new object or the `first`. layer: `final` (the final norm's output)
    or a block's index; token: which position's state is mapped, from the end. map: `transport` or `uniform` (shift of the
    mean). reg: ridge on both covariances, as a share of the source's mean variance, or absolute with reg_relative=False.
    implications: `own` distributions, `pooled` into the edit's, or `none`; of pooled ones the `pooled_implications` best by
    cosine with the mean shift are kept, with `noise_copies` neighbours each at `noise` standard deviations of the source
    (absolute units with reg_relative=False); affirm: sources of implications stand behind the original fact. lift: where no
    context makes the model say the new object, move target states until they do. strength: factor on the shift between the
    means (1: the paper's). gate: `auto` (the model's calibrated gate, else mid-depth activations), `classifier` (a logistic
    plane over the same points, trained on the edit's prompts against stock texts), `final` (what the head reads), a gate file,
    or `encoder:NAME`; radius: in the gate's unit, instead of the calibrated one; reach: a calibrated radius of a
    consequence with several wordings is cut to this many times the distance of the farthest (None: it is not).
    tolerance: relative error at which maps are truncated. half: store maps in half precision. chat: wrap every prompt
    in the tokenizer's chat template.
    """

    prompts: int = 50
    context_prompts: int = 12
    implication_prompts: int = 10
    span: Literal["all", "first"] = "all"
    layer: str | int = "final"
    token: int = -1
    map: Literal["transport", "uniform"] = "transport"
    reg: float = 0.2
    reg_relative: bool = True
    implications: Literal["own", "pooled", "none"] = "own"
    pooled_implications: int = 10
    noise: float = 0.0
    noise_copies: int = 0
    affirm: bool = True
    lift: bool = True
    gate: str = "auto"
    radius: float | None = None
    reach: float | None = 1.5
    strength: float = 1.15
    tolerance: float = 0.02
    half: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        if min(self.prompts, self.context_prompts, self.implication_prompts) < 1:
            raise ConfigError(
                "SAKE needs at least one prompt of each kind; raise prompts, context_prompts or implication_prompts"
            )
        earlier = self.span == "first" and self.layer != "final" and not self.gate.startswith("encoder:")
        if self.token > -1 or (self.token < -1 and not earlier):
            raise ConfigError(
                f"token counts from the prompt's end; found {self.token}; use -1, or a lower one with span='first', a block's "
                "index as layer and a gate that reads activations"
            )
        choices = {"span": ("all", "first"), "map": ("transport", "uniform"), "implications": ("own", "pooled", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"expected {name} to be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if min(self.noise, self.noise_copies, self.pooled_implications, self.radius or 0.0, self.reach or 0.0) < 0:
            raise ConfigError(
                "expected noise, noise_copies, pooled_implications, radius and reach of at least 0; found a negative one"
            )
        if not self.reg > 0 or not 0 <= self.tolerance < 1:
            raise ConfigError(
                f"expected reg > 0 and 0 <= tolerance < 1, found reg={self.reg}, tolerance={self.tolerance}"
            )


class SAKE(Editor[SAKEConfig]):
    """Steering by linear optimal transport behind a scope test."""

    method = "sake"
    summary = "optimal-transport steering of the last hidden state behind a scope test (Scialanga et al. 2025)"
    place = "external memory"
    how = "direct"
    scoped = True
    Config = SAKEConfig
    presets = {
        "paper-gpt2-xl-counterfact": PAPER | {"radius": 6.75},
        "paper-llama-2-7b-counterfact": PAPER | {"radius": 6.75},
        "paper-gpt2-xl-popular": PAPER | POOLED | {"radius": 5.5, "noise": 0.1, "noise_copies": 4},
        "paper-llama-2-7b-popular": PAPER | POOLED | {"radius": 5.3},
        "code-counterfact": CODE | {"radius": 6.5},
        "code-popular": CODE | POOLED | {"pooled_implications": 10, "noise": 0.1, "noise_copies": 4, "radius": 5.0},
        "code-doubt": CODE | {"gate": "final", "radius": 1000.0},
        "atlas-llama": {"reach": 2.0},  # on its dev edits, wordings of consequences lie farther apart than Atlas's
    }

    def __init__(
        self,
        config: SAKEConfig | None = None,
        *,
        variant: Literal["errata", "paper", "code"] = "errata",
        **changes: Any,
    ):
        variants: dict[str, dict[str, Any]] = {
            "errata": {},
            "paper": PAPER | {"radius": 6.75},
            "code": CODE | {"radius": 6.5},
        }
        if variant not in variants:
            raise ConfigError(f"expected the variant 'errata', 'paper' or 'code', found {variant!r}")
        super().__init__(config, **(variants[variant] | changes))

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
        return fit_each(self, self.config, SteeringFit, model, tokenizer, requests, seed, progress)


def fit_each(
    editor: Editor[Any], config: SAKEConfig, kind: type["SteeringFit"], model: Any, tokenizer: Any,
    requests: Sequence[EditRequest], seed: int, progress: Progress | None,
) -> Patch:  # fmt: skip
    """The editor's patch with the parts that a `kind` of fit makes of each request by itself, in SAKE's settings."""
    editor.check(requests, model, tokenizer)
    parts: list[Steering] = []
    report: dict[str, dict[str, Any]] = {}
    resolved = []
    with quiet(model):
        gate = gate_named(config.gate, model, tokenizer, config.layer)
        for number, request in enumerate(requests, 1):
            request = with_old_object(model, tokenizer, request, wrapper(tokenizer, config.chat))
            if request.id in report:
                raise RequestError(
                    f"request {number} ({request.text!r}) is one before it, which names its old object; remove one"
                )
            fit = kind(config, model, tokenizer, gate, request, seed)
            parts += [fit.edit(), *fit.implications()]
            report[request.id] = fit.report
            resolved.append(request)
            if progress:
                progress(number, len(requests))
    report = with_contradictions(report, resolved)
    return Patch(editor.method, asdict(editor.config), tuple(resolved), base_of(model, tokenizer), tuple(parts), report)


class SteeringFit:
    """One request's fit: the texts, their states, the maps, the scope, and the report."""

    def __init__(self, config: SAKEConfig, model: Any, tokenizer: Any, gate: Gate, request: EditRequest, seed: int):
        self.config, self.model, self.tokenizer, self.gate = config, model, tokenizer, gate
        self.request, self.seed = request, seed
        parts = anatomy(model)
        parts.site(config.layer)  # an unknown layer is refused before any work
        self.scope = Scope(model, tokenizer, gate, config.radius, config.reach, self._wrap, config.token)
        self.head = parts.module(model, parts.head) if parts.head else None
        self.report: dict[str, Any] = {"target_true": request.target_true}
        self._seen: dict[str, Tensor] = {}  # raw gate features of texts whose states were read

    def edit(self) -> Steering:
        """The edit's own part: paraphrases before and after, step by step."""
        request, old, new = self.request, self.request.target_true or "", self.request.target_new
        given = request.fit_prompts or (request.text,)
        self.report["prompts_from"] = "fit_prompts" if request.fit_prompts else "lead-ins over the bare prompt"
        prompts = contexts.lead_ins(list(dict.fromkeys((*given, request.text))), self.config.prompts, self.seed)
        some = prompts[: self.config.context_prompts]
        answer = self._answer(request.text, new)
        sources = [*prompts, *(contexts.repeat(p, old) for p in some)]
        wordings = [lambda p, w: contexts.instead(p, old, new, w)]
        targets = self._targets(wordings, some, answer, self.report)
        states = self._states(sources, answer)
        pooled = (
            self._pooled(states, targets) if self.config.implications == "pooled" else (states[:0, 0], targets[:0, 0])
        )
        self.report["prompts"] = len(prompts)
        return self._part(request.key, prompts, len(set(given)), states, targets, answer, pooled, self.report)

    def implications(self) -> list[Steering]:
        """A part for each thing that follows from the edit and that the model does not say already."""
        if self.config.implications != "own":
            return []
        groups: dict[tuple[str, str | None], list[Implication]] = {}
        for implication in self.request.fit_implications:
            groups.setdefault((implication.relation or implication.prompt, implication.answer), []).append(implication)
        parts, notes = [], []
        for (about, answer), members in groups.items():
            note: dict[str, Any] = {"about": about, "answer": answer}
            part = self._implication([m.prompt for m in members], about, answer, note)
            parts += [part] if part else []
            notes.append(note)
        if notes:
            self.report["implications"] = notes
        return parts

    def _implication(self, prompts: list[str], about: str, text: str | None, note: dict[str, Any]) -> Steering | None:
        request = self.request
        old, new = f"{request.text} {request.target_true}", f"{request.text} {request.target_new}"
        if text is None:
            [text] = greedy_answers(self.model, self.tokenizer, [self._wrap(contexts.supposed(new, prompts[0]))])
            note["answer"] = text
        if not text:
            note["skipped"] = "the model gives no answer under the new premise"
            return None
        answer = self._answer(prompts[0], text)
        n_wordings = len(set(prompts))
        prompts = contexts.lead_ins(prompts, self.config.implication_prompts, self.seed)
        states = self._states(prompts, answer)
        if self._said(states, answer).double().mean() > 0.9:
            note["skipped"] = "the model answers so already"
            return None
        if self.config.affirm:
            some = prompts[: len(prompts) // 2]
            states = torch.cat([states, self._states([contexts.affirmed(old, p) for p in some], answer)])
        wordings = [lambda p, w: contexts.supposed(new, p, w), lambda p, w: contexts.repeat(p, text, w)]
        targets = self._targets(wordings, prompts, answer, note)
        none = (states[:0, 0], targets[:0, 0])
        key = f"{request.key} -> {about} = {text}"
        return self._part(key, prompts, n_wordings, states, targets, answer, none, note)

    # -- states ------------------------------------------------------------------------------------------------------

    def _wrap(self, text: str) -> str:
        return chat(self.tokenizer, text) if self.config.chat else text

    def _answer(self, prompt: str, text: str) -> list[int]:
        ids = continuation_ids(self.tokenizer, self._wrap(prompt), text)
        return ids if self.config.span == "all" else ids[:1]

    def _states(self, texts: Sequence[str], answer: list[int]) -> Tensor:
        """(n, T + 1, sites, d): states of each text before every token of the answer and behind it (span `first`: T).

        Sites: the one that is mapped, and the final norm's output.
        """
        ids = token_ids(self.tokenizer, [self._wrap(text) for text in texts])
        ends = [len(row) + self.config.token for row in ids]
        steps = len(answer) + (
            self.config.span == "all"
        )  # the state behind the whole object says whether it ends there
        places = [list(range(end, end + steps)) for end in ends]
        check_room(self.model, ids, texts, new=steps)
        sites = (self.config.layer, "final")
        read = self.gate.layers if self.gate.pooling == "last" else ()
        rows = [row + answer[: steps - 1] for row in ids]
        found = states_at(self.model, rows, places, list(dict.fromkeys((*sites, *read))))
        if self.config.token != -1:  # what the model says is read where the prompt ends, wherever its state is mapped
            behind = [[len(row) - 1 + t for t in range(steps)] for row in ids]
            found["final"] = states_at(self.model, rows, behind, ["final"])["final"]
        for i, text in enumerate(texts if read else ()):
            self._seen[text] = torch.cat([found[layer][i][0] for layer in read])
        return torch.stack([torch.stack(found[site]) for site in sites], 2)

    def _points(self, prompts: list[str]) -> Tensor:
        """(n, k) the gate's points of the prompts: read along with their states where that is possible."""
        if all(p in self._seen for p in prompts):
            return self.gate.points(torch.stack([self._seen[p] for p in prompts]))
        return self.scope.points(prompts)

    def _said(self, states: Tensor, answer: list[int]) -> Tensor:
        """(n,) whether the unedited model, at these states, says the answer token by token."""
        return self._argmax(states[:, : len(answer), 1]).eq(torch.tensor(answer)).all(1)

    def _ends(self, states: Tensor, answer: list[int]) -> Tensor:
        """(n,) whether the unedited model ends the object behind its last token: with punctuation, a line or the end."""
        following = self._argmax(states[:, len(answer), 1])
        ends = {int(i): self._boundary(int(i)) for i in following.unique()}
        return torch.tensor([ends[int(i)] for i in following], dtype=torch.bool)

    def _boundary(self, token: int) -> bool:
        text = self.tokenizer.decode([token])
        return token == self.tokenizer.eos_token_id or not text.strip() or text.lstrip(" ")[0] in ".,;:!?\"')"

    def _argmax(self, final: Tensor) -> Tensor:
        """Greedy tokens of states after the final norm; through the model's own head."""
        if self.head is None:
            raise ConfigError("SAKE needs a language-model head, and this model has none")
        weight = next(self.head.parameters())
        return self.head(final.to(weight.device, weight.dtype)).argmax(-1).cpu()

    def _targets(self, wordings: list[Any], prompts: list[str], answer: list[int], note: dict[str, Any]) -> Tensor:
        """States behind target contexts that really produce the answer; the note says for how many prompts there is one.

        Where fewer than a quarter have one, the states of the others are lifted (`_lifted`).
        """
        found, left = [], list(prompts)
        every: list[Tensor] = []
        for attempt in [(make, w) for w in range(3) for make in wordings]:
            if not left:
                break
            make, wording = attempt
            states = self._states([make(p, wording) for p in left], answer)
            every = every or [states]
            good = self._said(states, answer)
            found.append(states[good])
            left = [p for p, ok in zip(left, good.tolist(), strict=True) if not ok]
        kept = torch.cat(found)
        note["target_contexts_kept"] = len(kept) / len(prompts)
        if len(kept) >= max(2, len(prompts) // 4):
            return kept
        if self.config.lift and self.config.layer == "final":
            note["targets_lifted"] = len(left) / len(prompts)
            return torch.cat([kept, self._lifted(states[~good], answer)])
        return kept if len(kept) >= 2 else every[0]

    def _lifted(self, states: Tensor, answer: list[int], margin: float = 2.0) -> Tensor:
        """States behind contexts that fail to produce the answer, moved until they do: for names the model cannot copy.

        Each state gets the smallest change that puts the wanted token `margin` logits above its strongest rival, rival
        after rival (the head is linear, so each step is a projection onto a half-space).
        """
        moved = states.clone()
        assert self.head is not None
        weight = next(self.head.parameters()).detach().float().cpu()
        bias = getattr(self.head, "bias", None)  # GPT-J and Phi have one
        bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().cpu()
        for t, token in enumerate(answer):
            x = moved[:, t, 1]
            for _ in range(200):
                logits = x @ weight.T + bias
                logits[:, token] -= margin
                rival = logits.argmax(1)
                short = (logits.gather(1, rival[:, None])[:, 0] - logits[:, token]).clamp(min=0)
                if not (rival != token).any():
                    break
                away = weight[token] - weight[rival]
                x = x + (short / away.square().sum(1).clamp(min=1e-6))[:, None] * away * (rival != token)[:, None]
            moved[:, t, 0] = moved[:, t, 1] = x
        return moved

    def _pooled(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Implications' source and target states for the edit's own first step (the paper), best ones with noisy copies."""
        config, request = self.config, self.request
        prompts = [i.prompt for i in request.fit_implications]
        if not prompts:
            return states[:0, 0], targets[:0, 0]
        old, new = f"{request.text} {request.target_true}", f"{request.text} {request.target_new}"
        source = self._states([contexts.affirmed(old, p) if config.affirm else p for p in prompts], [0])[:, 0]
        target = self._states([contexts.supposed(new, p) for p in prompts], [0])[:, 0]
        shift = targets[:, 0, 0].mean(0) - states[:, 0, 0].mean(0)
        best = torch.cosine_similarity((target - source)[:, 0], shift[None]).argsort(descending=True)[
            : config.pooled_implications
        ]
        scale = config.noise * (float(states[:, 0, 0].var(0).mean().sqrt()) if config.reg_relative else 1.0)
        generator = torch.Generator().manual_seed(self.seed)

        def copies(x: Tensor) -> Tensor:
            noisy = [x + scale * torch.randn(x.shape, generator=generator) for _ in range(config.noise_copies)]
            return torch.cat([x, *noisy])

        return copies(source[best]), copies(target[best])

    # -- map and scope -----------------------------------------------------------------------------------------------

    def _part(
        self, key: str, prompts: list[str], wordings: int, states: Tensor, targets: Tensor, answer: list[int],
        pooled: tuple[Tensor, Tensor], note: dict[str, Any],
    ) -> Steering:  # fmt: skip
        """Maps of every step (§15: X_s to X_t), the scope, and what the report says about them.

        wordings: how many of the prompts differ by more than a lead-in; they come first.
        """
        held = (torch.arange(len(states)) % 10 == 9) & (len(states) >= 20)
        fitted, none = states[~held], states[:0, 0, 0]
        maps = [
            self._map(
                torch.cat([fitted[:, t, 0], none if t else pooled[0][:, 0]]),
                torch.cat([targets[:, t, 0], none if t else pooled[1][:, 0]]),
            )
            for t in range(len(answer))
        ]
        ending = None
        if self.config.span == "all":
            own, behind = self._ends(states, answer), targets[self._ends(targets, answer)]
            if own.double().mean() < 0.98 and note.setdefault("closed", len(behind) >= 2):
                maps.append(self._map(fitted[:, len(answer), 0], behind[:, len(answer), 0]))
            ended = torch.cat([behind, states[own]])[:, len(answer), 0]
            ending = ended.mean(0).to(torch.float16 if self.config.half else torch.float32) if len(ended) else None
        if self.config.layer == "final":
            moved = torch.stack([step(states[:, t, 0]) for t, step in enumerate(maps[: len(answer)])], 1)
            said = self._argmax(moved).eq(torch.tensor(answer)).all(1)
            note["on_fit_states"], note["converged"] = (
                float(said[~held].double().mean()),
                bool(said.double().mean() > 0.5),
            )
            if held.any():
                note["on_held_out_states"] = float(said[held].double().mean())
        if held.any():
            note["held_out_distance"] = float(gaussian_distance(states[held, 0, 0], states[~held, 0, 0]).mean())
        note["rank"], note["truncation_error"] = [step.rank for step in maps], max(step.error for step in maps)
        asked = self.request.text if key == self.request.key else prompts[0]
        spread = key != self.request.key and min(wordings, len(prompts)) >= WORDINGS
        centre, radius = self.scope.ball(self.request, self._points(prompts), self._points([asked])[0], spread, note)
        return Steering(
            edit=self.request.id, key=key, gate=self.gate, centre=centre, radius=float(radius),
            target_ids=tuple(answer), maps=tuple(maps), site=self.config.layer, ending=ending,
        )  # fmt: skip

    def _map(self, source: Tensor, target: Tensor) -> LinearMap:
        config = self.config
        if config.map == "uniform":
            fitted = mean_shift(source, target)
        else:
            fitted = gaussian_transport(source, target, reg=config.reg, relative=config.reg_relative)
        if config.strength != 1.0:
            fitted = replace(fitted, m_t=fitted.m_s + config.strength * (fitted.m_t - fitted.m_s))
        if config.tolerance and fitted.rank:
            fitted = fitted.truncate(source, tolerance=config.tolerance)
        return fitted.to(torch.float16 if config.half else torch.float32)
