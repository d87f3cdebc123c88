"""ICL: the model is told, "Imagine that ..." before every prompt that concerns the edit (Cohen et al. 2023's baseline).

The context of an edit is the words "Imagine that", its new fact as a sentence and a line break. Emits one context part for
each edit; no weight and no state is touched.

Differs from the published baseline by default (the preset "paper" restores it): the context stands before prompts in the edit's
scope, by the gate that SAKE has, so that many edits can be attached at once and other prompts stay as they are; published,
it stands before every prompt put to a single edit.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors._items import with_contradictions
from errata.editors._scope import Scope, context_part, gate_named
from errata.errors import ConfigError
from errata.model.fingerprint import base_of
from errata.patch import Patch
from errata.prompts import contexts


@dataclass(frozen=True)
class ICLConfig:
    """Settings of ICL.

    gate: as SAKE's, or `none`: the context stands before every prompt, and only one edit is attached at a time or in a row.
    prompts: in-scope prompts that make the scope; radius: as SAKE's.
    """

    gate: str = "auto"
    prompts: int = 50
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.prompts < 1 or (self.radius or 0.0) < 0:
            raise ConfigError(
                f"expected at least one prompt and a radius of at least 0, found {self.prompts} and {self.radius}"
            )


class ICL(Editor[ICLConfig]):
    """Telling the model, behind a scope test."""

    method = "icl"
    summary = 'the new fact told before the prompt, "Imagine that ...", behind a scope test (Cohen et al. 2023)'
    place = "external memory"
    how = "direct"
    scoped = True
    supports = ("decoder", "encoder-decoder")
    Config = ICLConfig
    presets = {"paper": {"gate": "none"}}

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Write every request's context and place its scope. Raises RequestError for what cannot be fitted."""
        self.check(requests, model, tokenizer)
        config, parts, report = self.config, [], {}
        with quiet(model):
            gate = gate_named(config.gate, model, tokenizer) if config.gate != "none" else None
            scope = Scope(model, tokenizer, gate, config.radius) if gate else None
            for number, request in enumerate(requests, 1):
                text = contexts.imagined(f"{request.text} {request.target_new}")
                note: dict[str, Any] = {"context": text}
                parts.append(context_part(request, text, scope, config.prompts, seed, note))
                report[request.id] = note
                if progress:
                    progress(number, len(requests))
        report = with_contradictions(report, requests)
        return Patch(self.method, asdict(config), tuple(requests), base_of(model, tokenizer), tuple(parts), report)
