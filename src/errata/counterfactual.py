"""Counterfactual parts: an edit as a text in a memory, read by another model that answers in its scope (SERAC).

The other model, the expert, is small and of the edited model's family. It reads the edit's record and then the row, and its logits
stand in the place of the edited model's. A part is a value; when it acts is `errata.steering.table`, as for steering. The
parts of a patch share their expert as they share their gate: the file holds it once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from errata.errors import PatchFormatError
from errata.model.room import room
from errata.model.tokens import pad
from errata.scope.gate import Gate

LOGITS = "logits"  # the site of a counterfactual part: what the head puts out
_NOT_KEPT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "quantization_config")


@dataclass(frozen=True, eq=False)
class Expert:
    """A counterfactual model as a value. config: its Hugging Face config, JSON values; weights: its parameters by name.

    role: "decoder", whose logits (V,) stand at each position, or "classifier", whose logits (labels,) stand for the row.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    role: Literal["decoder", "classifier"]

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits over config and weights."""
        sha = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for name, tensor in sorted(self.weights.items()):
            sha.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def header(self) -> dict[str, Any]:
        """The expert's JSON part."""
        return {"config": self.config, "role": self.role}

    def tensors(self) -> dict[str, Tensor]:
        """The expert's tensors, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.weights.items()}

    @classmethod
    def of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Expert":
        """The expert of a header and its tensors."""
        return cls(dict(header["config"]), dict(tensors), header["role"])

    @classmethod
    def from_model(cls, model: Any, role: Literal["decoder", "classifier"]) -> "Expert":
        """The expert that a model is, its parameters in half precision; tied ones once."""
        kept = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in model.named_parameters()}
        plain = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_KEPT}
        return cls(json.loads(json.dumps(plain, default=str)), kept, role)

    def model(self, device: torch.device) -> Any:
        """The model, in evaluation mode and float32, requiring no gradients; the caller's random state stays.

        Raises PatchFormatError if the weights are not those of the config.
        """
        config = AutoConfig.for_model(**self.config)
        made = blank(config, self.role)
        own = dict(made.named_parameters())
        shapes = {name: tuple(t.shape) for name, t in own.items()}
        if shapes != {name: tuple(t.shape) for name, t in self.weights.items()}:
            raise PatchFormatError(
                f"expected the weights of a {config.model_type!r} model of {len(own)} parameters for the counterfactual model, found "
                f"{len(self.weights)} others; fetch or fit the patch again"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(self.weights[name])
        made.requires_grad_(False)
        return made.to(device)


def blank(config: Any, role: str) -> Any:
    """A random model of a config, in evaluation mode and float32; the caller's random state stays."""
    auto: Any = AutoModelForSequenceClassification if role == "classifier" else AutoModelForCausalLM
    with torch.random.fork_rng():
        return auto.from_config(config, dtype=torch.float32).eval()


def fitting(expert: Any, record: Sequence[int]) -> list[int]:
    """A record as an expert reads it: of one longer than half of its room the first token, where a head may read, and the end."""
    limit, own = room(expert), list(record)
    most = len(own) if limit is None else max(1, limit // 2)
    return own if len(own) <= most else [*own[:1], *own[len(own) - most + 1 :]]


def joined(expert: Any, record: Sequence[int], ids: Sequence[int]) -> list[int]:
    """What an expert reads: the record, as `fitting` has it, and then as much of the row's end as it has room for."""
    limit, own = room(expert), fitting(expert, record)
    return [*own, *(ids if limit is None else ids[-max(1, limit - len(own)) :])]


def read(expert: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """For each (record, ids) the expert's logits: (len(ids), V) of a decoder, (1, labels) of a classifier; differentiable.

    Where there is no room for all ids, the earliest are not read, and theirs are the first ones that are.
    """
    whole = [joined(expert, record, ids) for record, ids in rows]
    inputs = pad(whole, 0, next(expert.parameters()).device).inputs(expert)
    logits = expert(**inputs).logits
    found = []
    for i, (record, ids) in enumerate(rows):
        if logits.dim() == 2:
            found.append(logits[i : i + 1])
            continue
        own = logits[i, len(fitting(expert, record)) : len(whole[i])]
        missing = len(ids) - len(own)
        found.append(torch.cat([own[:1].expand(missing, -1), own]) if missing else own)
    return found


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """One edit of a memory. gate, centre (k,) and radius: its scope, as a steering part's.

    target_ids: the new object's tokens as they follow the prompt, or the label's id; record: the ids of the edit's text, which the
    expert reads before the row. mix: "hard", in its scope the expert alone is heard, or "soft" (published), both are, with
    beta = exp(-distance^2) for the expert.
    """

    edit: str
    key: str
    gate: Gate
    centre: Tensor
    radius: float
    target_ids: tuple[int, ...]
    record: tuple[int, ...]
    expert: Expert
    mix: Literal["hard", "soft"] = "hard"

    kind = "counterfactual"
    site = LOGITS
    maps: tuple[Any, ...] = ()

    @property
    def steps(self) -> int:
        """For how many tokens the edit is followed."""
        return len(self.target_ids)

    def header(self) -> dict[str, Any]:
        """The part's JSON header."""
        named = {name: getattr(self, name) for name in ("kind", "edit", "key", "radius", "mix")}
        ids = {"target_ids": list(self.target_ids), "record": list(self.record)}
        return named | ids | {"gate": self.gate.digest, "expert": self.expert.digest}

    def tensors(self) -> dict[str, Tensor]:
        """The part's tensors by field name."""
        return {"centre": self.centre}

    @classmethod
    def of(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], shared: Mapping[str, Any]
    ) -> "Counterfactual":
        """The part of a header, its tensors, and the gates and experts of its file."""
        return cls(
            header["edit"], header["key"], shared[header["gate"]], tensors["centre"], header["radius"],
            tuple(header["target_ids"]), tuple(header["record"]), shared[header["expert"]], header["mix"],
        )  # fmt: skip

    def answer(self, own: Tensor, theirs: Tensor, distance: Tensor) -> Tensor:
        """(n, V) logits in the place of the model's own (n, V): the expert's, or the log of the mixture. distance (n,)."""
        if self.mix == "hard":
            return theirs.to(own)
        return mixed(own, theirs, torch.exp(-distance.square())).to(own)


def mixed(own: Tensor, theirs: Tensor, beta: Tensor) -> Tensor:
    """log((1 - beta) p_f + beta p_h) of two rows of logits (n, V); beta (n,). Source: Mitchell et al. 2022 (SERAC)."""
    both = torch.stack([own.float().log_softmax(-1), theirs.to(own.device).float().log_softmax(-1)])
    weight = beta.to(own.device).float().clamp(1e-7, 1 - 1e-7)[:, None]
    return torch.logsumexp(both + torch.stack([torch.log1p(-weight), weight.log()]), 0)
