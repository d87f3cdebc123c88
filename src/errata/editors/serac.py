"""SERAC: edits are kept as texts; a scope classifier finds the one that is meant, a small model answers by it (Mitchell et al. 2022).

beta = max_e g(z_e, x) with g = exp(-scale |phi(z) - phi(x)|^2); where it exceeds 1/2 the counterfactual model h answers, fed with
the edit's text and the prompt, elsewhere the edited model does. That is a ball around phi(z_e), so a scope is a gate with a learned
projection, and competes with those of all other edits. g is trained with binary cross-entropy on pairs of edits and prompts, hard
negatives among them, h with the likelihood of the new object behind an edit's text and a wording of its prompt. An edit adds its
text and phi(z_e), nothing else. Emits a counterfactual part for each; patches hold h once.

Differs from the published code by default (preset "published" restores this much): routing is hard; g and h are trained with labels,
not through the mixture; wordings of the prompt are trained on, and records with others' objects. Under every preset phi is a linear
map of the edited model's own states and not a DistilBERT, and reads the edit's prompt without its answer (the code drops the last
word of both); h has as many blocks as `layers` says, begun from the edited model's (the code takes a small pretrained model).
"""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.counterfactual import Counterfactual, Expert, blank, mixed, read
from errata.edit import EditRequest
from errata.editor import Progress, quiet
from errata.editors._items import with_contradictions
from errata.editors._learned import Batches, LearnedConfig, LearnedEditor, Learner
from errata.errors import ConfigError
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.labels import label_id
from errata.model.room import room
from errata.model.states import input_device
from errata.model.tokens import continuation_ids, pad, token_ids
from errata.patch import Patch
from errata.scope.features import features
from errata.scope.gate import Gate
from errata.training import TrainingItem


@dataclass(frozen=True)
class SERACConfig(LearnedConfig):
    """Settings of SERAC.

    layers: blocks of the counterfactual model, which is as wide as the edited one; start: those are a "copy" of as many of its
    blocks, evenly chosen, or "fresh". reads: the block whose states phi projects, None for near 0.6 of the depth; width: of phi;
    scale: in g; gate_lr: of phi; decay: whether the learning rates fall linearly, to 0 behind the last step. supervised: labels
    for g and h, or (published) the likelihood through the mixture, weighed
    `edit`, and the divergence from the edited model on what must stay, weighed `locality`. negatives: near prompts of other
    facts, for each item; wordings: of each item that are trained on besides its prompt; shuffled: share of
    the records whose object is another item's, so that h learns to read. In a fit: mix, "hard" or "soft" (published); threshold: of
    beta.
    """

    layers: int = 2
    start: Literal["copy", "fresh"] = "copy"
    reads: int | None = None
    width: int = 64
    scale: float = 1.0
    gate_lr: float = 3e-3
    decay: bool = True
    supervised: bool = True
    edit: float = 0.1
    locality: float = 1.0
    negatives: int = 8
    wordings: int = 6
    shuffled: float = 0.5
    lr: float = 1e-3
    batch: int = 16
    mix: Literal["hard", "soft"] = "hard"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("copy", "fresh") or self.mix not in ("hard", "soft"):
            raise ConfigError(
                f"expected start 'copy' or 'fresh' and mix 'hard' or 'soft', found {self.start!r} and {self.mix!r}"
            )
        if min(self.layers, self.width) < 1 or min(self.wordings, self.negatives, self.edit, self.locality) < 0:
            raise ConfigError(
                f"expected layers and width of at least 1, and wordings, negatives, edit and locality of at least 0, found {self}"
            )
        if min(self.scale, self.gate_lr) <= 0 or not 0 < self.threshold < 1 or not 0 <= self.shuffled <= 1:
            raise ConfigError(
                f"expected scale and gate_lr above 0, a threshold inside (0, 1) and shuffled from 0 to 1, found {self}"
            )


DIRECTIONS = 4  # of the states, for each of phi's
PAIRS = 8  # items that g sees for each that h does
FAINT = 1e-3  # beta below which a soft mixture is not made
TRIED = 16  # items among which another fact's prompt is looked for


class SERAC(LearnedEditor[SERACConfig]):
    """Semi-parametric editing with a retrieval-augmented counterfactual model."""

    method = "serac"
    summary = "edits kept as texts, a scope classifier and a small model that answers by them (Mitchell et al. 2022)"
    place = "external memory"
    how = "direct"
    scoped = True
    supports = ("decoder", "classifier")
    fit_only = ("artefact", "mix", "threshold")
    reads_rewrites = True  # an edit's text is a cloze and its object, more often than a question
    Config = SERACConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {
            "supervised": False,
            "mix": "soft",
            "lr": 1e-5,
            "gate_lr": 1e-5,
            "decay": False,
            "steps": 10_000,
            "batch": 10,
            "wordings": 0,
            "shuffled": 0.0,
        }
    }

    def learner(
        self, model: Any, tokenizer: Any, items: Sequence[TrainingItem], held_out: Sequence[TrainingItem], seed: int
    ) -> "SERACLearner":
        """phi and h, at their beginning."""
        self.check_model(model)
        return SERACLearner(self.config, model, tokenizer, items, held_out, seed)

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Keep each request as a text with its scope. Raises RequestError, ConfigError if SERAC was not trained for this model."""
        self.check(requests, model, tokenizer)
        config, _, tensors = self.trained(model, tokenizer)
        role = anatomy(model).role
        radius = math.sqrt(-math.log(FAINT if config.mix == "soft" else config.threshold))
        projection = tensors["basis"] @ tensors["weight"] * config.scale**0.5
        gate = Gate((_reads(model, config),), mean=tensors["mean"], projection=projection, radius=radius)
        parts, report = list[Counterfactual](), dict[str, dict[str, Any]]()
        with quiet(model):
            h = blank(_config(model, config.layers), role)
            h.load_state_dict({n.removeprefix("h."): t for n, t in tensors.items() if n.startswith("h.")})
            expert = Expert.from_model(h, "classifier" if role == "classifier" else "decoder")
            h = expert.model(torch.device("cpu"))  # as it will answer, in half precision
            for number, request in enumerate(requests, 1):
                texts = [request.text, *request.fit_prompts]
                points = gate.points(_features(model, tokenizer, texts, config))
                record = tuple(record_ids(tokenizer, request.text, request.target_new))
                target = _target(model, tokenizer, request.text, request.target_new)
                with torch.no_grad():
                    said = _says(h, record, token_ids(tokenizer, [request.text])[0], target)
                part = Counterfactual(
                    request.id, request.key, gate, points[0], radius, tuple(target), record, expert, config.mix
                )
                parts.append(part)
                inside = gate.distances(points, points[:1])[:, 0] <= radius
                report[request.id] = {"converged": said, "wordings_in_scope": round(float(inside.float().mean()), 4)}
                if progress is not None:
                    progress(number, len(requests))
        about, report = self.recorded(model, tokenizer), with_contradictions(report, requests)
        return Patch(self.method, about, tuple(requests), base_of(model, tokenizer), tuple(parts), report)


Row = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The ids of an edit's record, of a prompt, and of what is to be said to it."""

# -- what an edit and a prompt are --------------------------------------------------------------------------------------------


def record_ids(tokenizer: Any, prompt: str, target: str) -> list[int]:
    """An edit as h reads it: the prompt with its answer, on a line of its own; `counterfactual.fitting` cuts a long one."""
    return token_ids(tokenizer, [f"{prompt} {target}\n"])[0]


def _target(model: Any, tokenizer: Any, prompt: str, target: str) -> list[int]:
    """The ids that answer a prompt: of the new object behind it, or of the label."""
    if anatomy(model).role == "classifier":
        return [label_id(model, target)]
    return continuation_ids(tokenizer, prompt, target)


def _reads(model: Any, config: SERACConfig) -> int:
    n = anatomy(model).n_layers
    return config.reads % n if config.reads is not None else min(round(0.6 * n), n - 1)


def _features(model: Any, tokenizer: Any, texts: Sequence[str], config: SERACConfig) -> Tensor:
    """(n, d) states that phi projects: at the last token, of a classifier at the first."""
    token = 0 if anatomy(model).role == "classifier" else -1
    return features(model, tokenizer, texts, [_reads(model, config)], "last", token=token)


def _config(model: Any, layers: int) -> Any:
    """The counterfactual model's config: the edited one's, with fewer blocks."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _begun(model: Any, config: SERACConfig) -> Any:
    """The counterfactual model before it is trained."""
    parts, made = anatomy(model), blank(_config(model, config.layers), anatomy(model).role)
    if config.start == "fresh":
        return made.train(False)
    own, theirs = anatomy(made).blocks, dict(model.named_parameters())
    share = (parts.n_layers - 1) / max(1, len(own) - 1)
    chosen = {block: parts.blocks[round(i * share)] for i, block in enumerate(own)}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            block = next((b for b in own if name.startswith(f"{b}.")), None)
            source = theirs.get(name if block is None else chosen[block] + name[len(block) :])
            if source is not None and source.shape == parameter.shape:
                parameter.copy_(source)
    return made


def _losses(h: Any, rows: Sequence[Row]) -> Tensor:
    """(n,) nats: the mean over each target's tokens, for (record, prompt, target) as ids."""
    classifies = "Classification" in type(h).__name__
    fed = [(record, [*ids, *([] if classifies else target[:-1])]) for record, ids, target in rows]
    found = []
    for logits, (_, _, target) in zip(read(h, fed), rows, strict=True):
        wanted = torch.tensor(target, device=logits.device)
        found.append(nn.functional.cross_entropy(logits[-len(target) :].float(), wanted))
    return torch.stack(found)


def _says(h: Any, record: Sequence[int], ids: Sequence[int], target: Sequence[int]) -> bool:
    classifies = "Classification" in type(h).__name__
    [logits] = read(h, [(record, [*ids, *([] if classifies else target[:-1])])])
    return bool(logits[-len(target) :].argmax(-1).tolist() == list(target))


# -- training ------------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """phi(x) = weight^T basis^T (x - mean), with weight (K, width) trained in the whitened coordinates of basis (d, K); and h."""

    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, config: SERACConfig, h: nn.Module):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        width = min(config.width, basis.shape[1])  # at first two texts are 4 apart, squared, on average
        self.weight = nn.Parameter(torch.eye(basis.shape[1], width) * (2 / config.scale / width) ** 0.5)
        self.h = h

    def log_beta(self, z: Tensor, x: Tensor, scale: float) -> Tensor:
        """log g (n,) for whitened states z and x (n, K)."""
        return -scale * ((z - x) @ self.weight).square().sum(-1)


class SERACLearner(Learner):
    """g and h while they are trained. The edited model's states of all texts are read once."""

    def __init__(
        self,
        config: SERACConfig,
        model: Any,
        tokenizer: Any,
        items: Sequence[TrainingItem],
        held_out: Sequence[TrainingItem],
        seed: int,
    ):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.items, self.n = [*items, *held_out], len(items)
        if len(items) < 2:
            raise ConfigError(f"expected at least 2 training items, found {len(items)}")
        self.batches = Batches(self.n, config.batch, seed)
        self.pairs = Batches(self.n, config.batch * PAIRS, seed + 1)
        judged = max(1, config.wordings)  # items held out are judged by a wording that none is trained on
        counts = [config.wordings if i < self.n else judged for i in range(len(self.items))]
        self.wordings = [(i.prompt, *i.rephrases[:count]) for i, count in zip(self.items, counts, strict=True)]
        texts = [text for own, item in zip(self.wordings, self.items, strict=True) for text in (*own, *_stays(item))]
        self.index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        states = _features(model, tokenizer, list(self.index), config)
        trained = [*zip(self.wordings, self.items, strict=True)][: self.n]
        known = {self.index[text] for own, item in trained for text in (*own, *_stays(item))}
        mean, basis = _whitened(states[sorted(known)], config.width * DIRECTIONS)
        self.states = (states - mean) @ basis
        self.fact = self._facts()
        self.module: Pair = Pair(mean, basis, config, _begun(model, config).to(input_device(model)))
        self.module.requires_grad_(True)
        self.optimisers = {
            "gate": torch.optim.Adam([self.module.weight], config.gate_lr),
            "h": torch.optim.Adam(self.module.h.parameters(), config.lr),
        }
        self.near = self._neighbours()
        self._ids: dict[str, list[int]] = {}

    def step(self, number: int) -> float:
        """One batch through h, and many times as many items through g, whose inputs are known."""
        config, rng, chosen = self.config, self.batches.draws(number), self.batches.at(number)
        rows, wordings = list[Row](), list[str]()
        for i in chosen:
            item, wording = self.items[i], rng.choice(self.wordings[i])
            target = self.items[rng.choice(chosen)].target_new if rng.random() < config.shuffled else item.target_new
            rows.append(self._row(item.prompt, target, wording))
            wordings.append(wording)
        if config.supervised:
            loss = _losses(self.module.h, rows).mean()
            loss = loss + self.scope_loss(number).to(loss.device)
        else:
            loss = self._mixed(chosen, wordings, rows, [self._kept(i, rng) for i in chosen])
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 100.0)
        for name, optimiser in self.optimisers.items():
            optimiser.param_groups[0]["lr"] = self.rate(name, number)
            optimiser.step()
        return float(loss.detach())

    def rate(self, name: str, number: int) -> float:
        """The learning rate of g ("gate") or h in a step."""
        full = self.config.gate_lr if name == "gate" else self.config.lr
        return full * max(0.0, 1 - number / self.config.steps) if self.config.decay else full

    def scope_loss(self, number: int) -> Tensor:
        """Binary cross-entropy of g in a step: wordings in scope, and out of it as much for near texts as for any others'."""
        rng, chosen = self.batches.draws(number), self.pairs.at(number)
        own = torch.tensor([self.index[self.items[i].prompt] for i in chosen])
        wording = torch.tensor([self.index[rng.choice(self.wordings[i])] for i in chosen])
        facts = torch.tensor([self.fact[i] for i in chosen])
        near = [
            (self.index[self.items[i].prompt], other)
            for i in chosen
            for other in (
                *rng.sample(self.near[i], min(self.config.negatives, len(self.near[i]))),
                *(self.index[text] for text in _stays(self.items[i])),
            )
        ]
        z, x = ((self.states[side] @ self.module.weight) for side in (own, wording))
        apart = -self.config.scale * (z[:, None] - x[None]).square().sum(-1)
        outside = [apart[facts[:, None] != facts[None]], self._log_beta(near)]
        wrong = [-torch.log(-torch.expm1(log.clamp(max=-1e-6))).mean() for log in outside if len(log)]
        return -apart.diagonal().mean() + torch.stack(wrong).mean() if wrong else -apart.diagonal().mean()

    def _kept(self, i: int, rng: random.Random) -> list[str]:
        """One prompt that item i's edit must leave alone: of its own, of another fact where it names none and there is one."""
        if own := _stays(self.items[i]):
            return own[:1]
        tried = rng.sample(range(self.n), min(self.n, TRIED))
        return [self.items[j].prompt for j in tried if self.fact[j] != self.fact[i]][:1]

    def _mixed(
        self, chosen: Sequence[int], wordings: Sequence[str], rows: Sequence[Row], stays: Sequence[Sequence[str]]
    ) -> Tensor:
        """Published: the new object's likelihood through (1 - beta) p_f + beta p_h, and KL(p_f || mixture) where it must stay."""
        asked = [(self.index[self.items[i].prompt], self.index[w]) for i, w in zip(chosen, wordings, strict=True)]
        beta = self._log_beta(asked).exp()
        total = torch.zeros(())
        for b, row, (f, h) in zip(beta, rows, self._both(rows), strict=True):
            log = mixed(f, h, b.expand(len(f)))
            wanted = torch.tensor(row[2], device=log.device)
            total = total + self.config.edit * nn.functional.nll_loss(log, wanted).cpu() / len(rows)
        kept = [(self.items[i], text) for i, own in zip(chosen, stays, strict=True) for text in own]
        if not kept:
            return total
        apart = self._log_beta([(self.index[item.prompt], self.index[text]) for item, text in kept]).exp()
        beside = [(record_ids(self.tokenizer, k.prompt, k.target_new), self._tokens(text), [0]) for k, text in kept]
        for b, (f, h) in zip(apart, self._both(beside), strict=True):
            log = mixed(f, h, b.expand(len(f)))
            far = nn.functional.kl_div(log, f.float().log_softmax(-1), log_target=True, reduction="batchmean")
            total = total + self.config.locality * far.cpu() / len(kept)
        return total

    def validate(self) -> dict[str, float]:
        """Of held-out items: how many wordings are inside, how many texts outside are, and how many answers h gives right."""
        inside, outside, right, asked = list[float](), list[float](), 0, 0
        with torch.no_grad():
            for i in range(self.n, len(self.items)):
                item, own = self.items[i], self.index[self.items[i].prompt]
                for text in self.wordings[i][1:]:
                    inside.append(float(self._log_beta([(own, self.index[text])])[0]))
                    record, ids, target = self._row(item.prompt, item.target_new, text)
                    right, asked = right + _says(self.module.h, record, ids, target), asked + 1
                away = [*self.near[i], *(self.index[text] for text in _stays(item))]
                outside += self._log_beta([(own, other) for other in away]).tolist() if away else []
        open_at = math.log(self.config.threshold)
        return {
            "in_scope": _share([x > open_at for x in inside]),
            "out_of_scope": _share([x > open_at for x in outside]),
            "answers": round(right / max(1, asked), 4),
        }

    # -- pieces ------------------------------------------------------------------------------------------------------------

    def _tokens(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = token_ids(self.tokenizer, [text])[0]
        return self._ids[text]

    def _row(self, prompt: str, target: str, wording: str) -> Row:
        """(record, wording, target) as ids."""
        record = record_ids(self.tokenizer, prompt, target)
        return record, self._tokens(wording), _target(self.model, self.tokenizer, wording, target)

    def _log_beta(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """(n,) log g of pairs of texts' numbers, on the CPU."""
        if not pairs:
            return torch.empty(0)
        z, x = (self.states[list(side)] for side in zip(*pairs, strict=True))
        return self.module.log_beta(z, x, self.config.scale)

    def _both(self, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """For each row the logits (len(target), V or labels) of the edited model, without gradients, and of h, for its target."""
        classifies, limit = anatomy(self.model).role == "classifier", room(self.model)
        fed = [[*ids, *([] if classifies else target[:-1])][-limit if limit else 0 :] for _, ids, target in rows]
        with torch.no_grad():
            logits = self.model(**pad(fed, 0, input_device(self.model)).inputs(self.model)).logits
        theirs = read(self.module.h, [(row[0], own) for row, own in zip(rows, fed, strict=True)])
        found = []
        for i, (own, other, (_, _, target)) in enumerate(zip(fed, theirs, rows, strict=True)):
            base = logits[i : i + 1] if classifies else logits[i, len(own) - len(target) : len(own)]
            found.append((base, other[-len(target) :]))
        return found

    def _facts(self) -> list[int]:
        """A number for each item, equal for those that share a text: they are about one fact."""
        first: dict[str, int] = {}
        root = list(range(len(self.items)))

        def find(i: int) -> int:
            while root[i] != i:
                root[i] = root[root[i]]
                i = root[i]
            return i

        for i, item in enumerate(self.items):
            for text in (item.prompt, *item.rephrases):
                root[find(i)] = find(first.setdefault(text, i))
        return [find(i) for i in range(len(self.items))]

    def _neighbours(self) -> list[list[int]]:
        """For each item the texts that are nearest to its prompt among other facts' prompts: hard negatives.

        Those of items that are trained on are of such items as well.
        """
        prompts = torch.tensor([self.index[item.prompt] for item in self.items])
        points = self.states[prompts] @ self.module.weight.detach()
        facts, found = torch.tensor(self.fact), []
        for i in range(len(self.items)):
            away = facts == facts[i]
            if i < self.n:
                away = away | (torch.arange(len(facts)) >= self.n)
            far = (points - points[i]).square().sum(-1).masked_fill(away, torch.inf)
            nearest = far.topk(min(4 * max(1, self.config.negatives), len(far)), largest=False)
            near = prompts[nearest.indices[nearest.values.isfinite()]]
            found.append(list(dict.fromkeys(near.tolist())))
        return found


def _stays(item: TrainingItem) -> list[str]:
    return [prompt for prompt, _ in item.locality]


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def _whitened(states: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The mean (d,), and a basis (d, K) of at most so many directions of the states (n, d), the widest, with unit variance in each."""
    mean = states.mean(0)
    _, sizes, directions = torch.linalg.svd((states - mean).double(), full_matrices=False)
    K = min(most, len(sizes))
    spread = sizes[:K].clamp(min=0.01 * float(sizes[0])) / max(1, len(states) - 1) ** 0.5
    return mean, (directions[:K].T / spread).float()
