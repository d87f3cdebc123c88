"""What corrupts a subject: the noise rules of causal tracing, measured on a model once and drawn anew for every prompt.

Source: Meng et al. 2022 (ROME), section 2 and appendix B. Differs: an integer is a noise level like any number; the
Student-t noise is centred at the embeddings' mean before it is scaled, so that its mean is theirs.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import ConfigError
from errata.model.anatomy import anatomy
from errata.model.hooks import first_tensor
from errata.model.states import input_device
from errata.model.tokens import token_ids

Law = Literal["normal", "uniform", "moments", "student"]
_BY_LETTER: dict[str, Law] = {"s": "normal", "u": "uniform", "m": "moments", "t": "student"}
_TEXTS = 64  # texts embedded at a time


@dataclass(frozen=True, eq=False)
class Noise:
    """A noise rule with what was measured for it; `noise_for` makes one.

    rule: as it was asked for. scale: factor of the standard normal or uniform numbers, embedding units; 1 for a law with
    moments. freedom: degrees of freedom of the Student-t. mean (d,), root (d, d), symmetric: of the embeddings.
    """

    rule: str
    law: Law
    scale: float = 1.0
    freedom: float | None = None
    mean: NDArray[np.float64] | None = field(default=None, repr=False)
    root: NDArray[np.float64] | None = field(default=None, repr=False)

    def draw(self, shape: tuple[int, int, int], seed: int = 1) -> NDArray[np.float64]:
        """(samples, tokens, d) float64, always the same for one shape and seed.

        Drawn by numpy's RandomState(seed), whose stream is frozen, as the published traces are (with seed 1); the
        chi-square numbers of the Student-t by RandomState(seed + 1).
        """
        random = np.random.RandomState(seed)
        if self.law == "uniform":
            return np.asarray(self.scale * random.uniform(-1.0, 1.0, shape))
        normal = random.standard_normal(shape)
        if self.mean is None or self.root is None:
            return np.asarray(self.scale * normal)
        spread = normal @ self.root
        if self.freedom is not None:
            chi = np.random.RandomState(seed + 1).chisquare(self.freedom, (*shape[:2], 1))
            spread = spread * np.sqrt((self.freedom - 2) / chi)
        return np.asarray(self.mean + spread)

    def json(self) -> dict[str, Any]:
        """Rule and scale as JSON values; for a law with moments their SHA-256 (16 hex digits) instead of a scale."""
        if self.mean is None or self.root is None:
            return {"rule": self.rule, "scale": self.scale}
        digest = hashlib.sha256(self.mean.tobytes() + self.root.tobytes()).hexdigest()
        return {"rule": self.rule, "moments": digest[:16]}


def parse_rule(rule: str | float) -> tuple[Law, float]:
    """(law, number) of a noise rule.

    "s3": Gaussian, 3 x the standard deviation of all embedding entries of the subjects; 0.1: Gaussian of that level;
    "u0.1": uniform on (-0.1, 0.1); "m": Gaussian with the mean and covariance of embeddings of texts; "t4": Student-t of
    4 degrees of freedom (more than 2) with that mean and covariance. Raises ConfigError.
    """
    text = str(rule).strip()
    found = re.fullmatch(r"([sut]?)(\d+\.?\d*(?:e-?\d+)?|\.\d+)|m", text)
    number = float(found[2]) if found and found[2] else 0.0
    law = _BY_LETTER[text[0]] if found and text[0] in _BY_LETTER else "normal"
    if isinstance(rule, bool) or not found or not isfinite(number) or (law != "moments" and number <= 0):
        raise ConfigError(
            f"expected a noise rule (s3, 0.1, u0.1, m or t4, with a number above 0), found {rule!r}; "
            "s3 is 3 standard deviations of the subjects' embeddings."
        )
    if law == "student" and number <= 2:
        raise ConfigError(
            f"expected more than 2 degrees of freedom, found {rule!r}; with fewer there is no covariance."
        )
    return law, number


def noise_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: str | float = "s3",
    *,
    subjects: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Noise:
    """The noise of a rule (see `parse_rule`), measured on outputs of the model's token embedding.

    subjects: what "s" rules measure: each tokenised alone, without special tokens, repeats counted as often as they
    come. texts: what "m" and "t" rules measure. Raises ConfigError for a rule that is none, or without its data.
    """
    law, number = parse_rule(rule)
    name = str(rule).strip()
    if law == "uniform" or (law == "normal" and not name.startswith("s")):
        return Noise(name, law, number)
    data, what = (subjects, "subjects") if law == "normal" else (texts, "texts")
    if not data:
        raise ConfigError(f"expected {what} to measure the noise rule {name!r} on, found none; give {what}.")
    if law == "normal":
        entries = torch.cat([states.flatten() for states in _embeddings(model, tokenizer, data)])
        return Noise(name, law, number * float(entries.std()))
    mean, root = _moments(_embeddings(model, tokenizer, data))
    return Noise(name, law, freedom=number if law == "student" else None, mean=mean, root=root)


def _embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tensor]:
    """(tokens, d) float64 CPU, some texts at a time: what the token embedding gives for them, without position."""
    embed = model.get_submodule(anatomy(model).embed)
    for start in range(0, len(texts), _TEXTS):
        rows = token_ids(tokenizer, texts[start : start + _TEXTS], special=False)
        ids = torch.tensor([[token for row in rows for token in row]], device=input_device(model))
        with torch.no_grad():
            yield first_tensor(embed(ids))[0].double().cpu()


def _moments(chunks: Iterator[Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean (d,), symmetric square root of the covariance (d, d)), summed in float64 chunk by chunk."""
    n, total, products = 0, torch.zeros(()), torch.zeros(())
    for states in chunks:
        n, total, products = n + len(states), total + states.sum(0), products + states.T @ states
    if n < 2:
        raise ConfigError("expected texts of at least two tokens to measure the noise on, found one; give more texts.")
    mean = total / n
    covariance = (products - n * torch.outer(mean, mean)) / (n - 1)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return mean.numpy(), root.numpy()
