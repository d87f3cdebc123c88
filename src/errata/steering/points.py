"""Where the positions of a pass lie for a gate: points of its layers' states, or of the text up to them.

Which positions are asked: every real position of the forward pass for activation gates. Encoder gates embed text, so they
are asked where a next token is wanted: at each row's last position, and from the prompt's end on inside `prompts(lengths)`.
"""

from typing import Any

import torch
from torch import Tensor

from errata.scope.gate import Gate
from errata.steering.edits import Edits
from errata.steering.memory import Memory
from errata.steering.passes import Pass


class Points:
    """The points of positions for the gates of the loaded edits."""

    def __init__(self, edits: Edits, memory: Memory, tokenizer: Any):
        self._edits, self._memory, self._tokenizer = edits, memory, tokenizer
        self._encoders: dict[str, Any] = {}
        summed = [balls.gate for _, balls in edits.groups if balls.gate.pooling == "mean"]
        self._summed = {layer for gate in summed for layer in gate.layers}

    def of(self, current: Pass, gate: Gate) -> tuple[Tensor | None, Tensor]:
        """The gate's points (B, T, k) and which columns were asked (B, T)."""
        asked = current.mask[:, current.start :]
        if gate.encoder:
            return self._encoded(current, gate)
        if any(layer not in current.states for layer in gate.layers):
            return None, asked
        features = []
        for layer in gate.layers:
            states = current.states[layer].float()
            if gate.pooling == "mean":
                total = self._sum(current, layer)
                count = current.mask.cumsum(1)[:, current.start :].clamp(min=1)
                states = total / count[..., None].to(total.device)
            features.append(states)
        return gate.points(torch.cat([f.to(features[0].device) for f in features], -1)), asked

    def sums(self, current: Pass) -> dict[str | int, Tensor]:
        """Running sums (B, T, d) of the layers that a mean-pooling gate reads, the cached positions included."""
        return {layer: self._sum(current, layer) for layer in self._summed}

    def _sum(self, current: Pass, layer: str | int) -> Tensor:
        states = current.states[layer].float()
        total = (states * current.mask[:, current.start :, None].to(states)).cumsum(1)
        if not current.start:
            return total
        before = [self._memory.recall(current, row, current.start - 1).sums[layer] for row in range(len(total))]
        return total + torch.stack(before)[:, None].to(total)

    def _encoded(self, current: Pass, gate: Gate) -> tuple[Tensor, Tensor]:
        """Embed the text of each asked prefix."""
        rows, width = current.ids.shape[0], current.width
        asked = torch.zeros((rows, width), dtype=torch.bool, device=current.ids.device)
        places, texts = [], []
        for row in range(rows):
            real = current.real(row)
            first = len(real) - 1 if current.lengths is None else max(0, int(current.lengths[row]) - 1)
            said = current.ids[row][real].tolist()
            wanted = set(range(max(0, first), len(real)))
            for i in list(wanted):  # where an object that may be under way there would have begun
                steps = range(1, min(i, self._edits.longest) + 1)
                wanted |= {i - t for t in steps if self._edits.begins(row, tuple(said[i - t + 1 : i + 1]))}
            for column in real[sorted(wanted)].tolist():
                if column >= current.start:
                    places.append((row, column - current.start))
                    texts.append(str(self._tokenizer.decode(current.prefix(row, column), skip_special_tokens=True)))
        vectors = self._encoder(gate.encoder or "").encode(texts)
        points = torch.zeros((rows, width, vectors.shape[-1]))
        for (row, column), vector in zip(places, vectors, strict=True):
            points[row, column], asked[row, column] = vector, True
        return gate.points(points), asked

    def _encoder(self, name: str) -> Any:
        from errata.scope.encoder import load_encoder

        if name not in self._encoders:
            self._encoders[name] = load_encoder(name)
        return self._encoders[name]
