"""Uniform steering: SAKE with the shift between the means alone, h' = h + c (m_t - m_s) (Scialanga et al. 2025, 4.4.2).

What SAKE's transport adds is read off the difference: texts, states, scope and steps are SAKE's, and so are the presets and c,
its `strength` (the paper's, and the presets': 1).
"""

from dataclasses import dataclass
from typing import Literal

from errata.editors.sake import SAKE, SAKEConfig


@dataclass(frozen=True)
class UniformConfig(SAKEConfig):
    """SAKE's settings; the map is the shift of the mean."""

    map: Literal["transport", "uniform"] = "uniform"


class Uniform(SAKE):
    """Steering by the difference of means behind SAKE's scope test."""

    method = "uniform"
    summary = "shift of the last hidden state by the difference of means, behind SAKE's scope test"
    place = "external memory"
    how = "direct"
    scoped = True
    Config = UniformConfig
    presets = {name: {**settings, "map": "uniform"} for name, settings in SAKE.presets.items()}
