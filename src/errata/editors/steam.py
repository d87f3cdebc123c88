"""STEAM: ROME or MEMIT with one more term, which pulls the edited fact to where the model keeps its object (Jeong et al. 2025).

Locating and editing by token likelihood alone writes a fact that the model says but does not hold as its own knowledge:
its residual stream runs apart from that of true facts with the same object. STEAM changes the value search only,

    L(delta) = L_NLL + L_KL + lambda * L_LA,    L_LA = mean over prompts and layers of 1 - cos(h(delta), anchor),

where the anchor of a layer is the mean state of reference triples with the new object (latent positioning, `locate.anchors`)
and h the residual stream of the rewriting prompts at the same position. Key, closed-form write and spreading over layers are
the base's, and so are the parts that it emits. With lambda 0 the patch is the base's, bit for bit.

References come as data: `STEAM(references=[...])`, or a JSONL file. The triple that is edited is no reference, and on MEMIT,
whose edits are written together, none of the batch's is.
Without any for an object, contexts that state the edited fact stand in; where the model follows none, the edit is not
aligned, and its report says so.

The paper leaves open what is fixed here on Atlas's dev edits (`benchmarks/steam.py`): lambda, the layers, the position.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from errata.edit import EditRequest
from errata.editor import Editor, Progress, quiet
from errata.editors import get_editor
from errata.editors._models import steam_presets
from errata.editors._value_search import Alignment, Term
from errata.editors._weights import WeightEditor
from errata.errors import ConfigError
from errata.locate.anchors import Anchor, Read, Reference, Strata, Wanted, anchors_for, read_references
from errata.model.anatomy import anatomy
from errata.patch import Patch
from errata.prompts import contexts


@dataclass(frozen=True)
class STEAMConfig:
    """Settings of STEAM; any other option is one of the base editor's.

    base: the editor whose value search is aligned; settings: its options. weight: lambda, 0 for the base itself; aligned: the
    first and the last aligned layer, negative from the end, None for three eighths of the depth up to the last but one; a
    layer below the edited one does not move and is left out. distance: "cosine", or "mse" (activation units squared).
    schedule, warmup: of lambda, see `Alignment`; counts: whether the term is part of the loss that stops a search (then all
    steps are taken, as a rule).
    read: where states are read, the prompt's last token or the subject's. references: a JSONL file of {subject, relation,
    object, prompt}; count, strata, least: how many references make an anchor and which, see `anchors_for`.
    """

    base: Literal["rome", "memit"] = "rome"
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 20.0
    aligned: tuple[int, int] | None = None
    distance: Literal["cosine", "mse"] = "cosine"
    schedule: Literal["constant", "warmup", "balanced"] = "constant"
    warmup: int = 5
    counts: bool = True
    read: Read = "prompt_last"
    references: str | None = None
    count: int = 16
    strata: Strata = "balanced"
    least: int = 4

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "base": ("rome", "memit"),
            "distance": ("cosine", "mse"),
            "schedule": ("constant", "warmup", "balanced"),
            "read": ("prompt_last", "subject_last"),
            "strata": ("balanced", "matched"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"expected {name} to be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if not self.weight >= 0 or self.warmup < 1 or self.count < 1 or not 0 <= self.least <= self.count:
            raise ConfigError(
                f"expected weight of at least 0, warmup and count of at least 1 and least from 0 to count, found "
                f"weight={self.weight}, warmup={self.warmup}, count={self.count}, least={self.least}"
            )


class STEAM(Editor[STEAMConfig]):
    """Semantic-level alignment on top of ROME or MEMIT."""

    method = "steam"
    summary = "ROME or MEMIT, pulled to where the model keeps the new object (Jeong et al. 2025)"
    place = "local modification"
    how = "optimised"
    needs_subject = True
    Config = STEAMConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = steam_presets()

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """As the base writes."""
        return self.wrote_jointly({"base": self.config.base})

    @property
    def batch(self) -> int:  # type: ignore[override]
        """As the base fits best."""
        return int(get_editor(self.config.base).batch)

    @classmethod
    def wrote_jointly(cls, config: Mapping[str, Any]) -> bool:
        """As the base that the configuration names."""
        return bool(get_editor(config["base"]).joint)

    def __init__(
        self, config: STEAMConfig | None = None, *, references: Iterable[Reference] | str | None = None, **changes: Any
    ):
        own = {f.name for f in fields(STEAMConfig)}
        settings = {name: changes.pop(name) for name in list(changes) if name not in own}
        if isinstance(references, str):
            changes["references"], references = references, None
        super().__init__(config, **changes)
        self._references = None if references is None else tuple(references)
        self.config = replace(self.config, settings={**self.config.settings, **settings})
        known = {f.name for f in fields(get_editor(self.config.base).Config)}
        for name in self.config.settings:
            if name not in known:
                near = get_close_matches(name, own | known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(own | known))}"
                raise ConfigError(f"steam on {self.config.base} has no option {name!r}{hint}")
        self._base()  # what the base refuses is refused here

    def reads(self, model: Any) -> dict[str, Any]:
        """As the base."""
        return self._base().reads(model)

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Latent positioning on the unedited model, then the base's fit under the aligned objective. Raises as the base."""
        self.check(requests, model, tokenizer)
        found: dict[str, Anchor] = {}
        layers: tuple[int, ...] = ()
        if self.config.weight:
            layers = self.aligned_layers(model)
            with quiet(model):
                made = self._anchors(model, tokenizer, requests, layers, seed)
            found = {request.id: anchor for request, anchor in zip(requests, made, strict=True)}
        base = self._base(layers, found)
        patch = base.fit(model, tokenizer, requests, seed=seed, progress=progress)
        config = asdict(replace(self.config, settings={})) | {"settings": base.config.json()}
        notes = {
            edit: {"aligned": anchor.states is not None, "anchor": {"layers": list(layers)} | anchor.note()}
            for edit, anchor in found.items()
        }
        report = {edit: entry | notes.get(edit, {"aligned": False}) for edit, entry in patch.report.items()}
        return replace(patch, method=self.method, config=config, report=report)

    def aligned_layers(self, model: Any) -> tuple[int, ...]:
        """The aligned layers, counted from 0. Raises AnatomyError out of range, ConfigError for none."""
        parts = anatomy(model)
        lowest = parts.n_layers * 3 // 8
        first, last = self.config.aligned or (lowest, max(lowest, parts.n_layers - 2))
        start, stop = (parts.blocks.index(parts.site(layer)) for layer in (first, last))
        if start > stop:
            raise ConfigError(f"expected layers from a first to a last one, found {self.config.aligned}")
        return tuple(range(start, stop + 1))

    def _anchors(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], layers: Sequence[int], seed: int
    ) -> list[Anchor]:
        """One anchor per request, from the references that are still true beside what is written with it."""
        config, references = self.config, self._references
        if references is None:
            references = tuple(read_references(config.references)) if config.references else ()
        facts = [(request.subject or "", request.relation) for request in requests]
        wanted = [
            Wanted(
                request.target_new,
                request.relation,
                _forced(request, config.least),
                tuple(facts) if self.joint else (own,),
            )
            for request, own in zip(requests, facts, strict=True)
        ]
        how = {name: getattr(config, name) for name in ("count", "strata", "read", "least")}
        return anchors_for(model, tokenizer, wanted, references, layers, seed=seed, **how)

    def _base(self, layers: Sequence[int] = (), anchors: Mapping[str, Anchor] | None = None) -> WeightEditor[Any]:
        """The base editor with its options, whose objective has the alignment in it if there is an anchor at all."""
        editor: Any = get_editor(self.config.base)
        config = self.config
        if not any(anchor.states is not None for anchor in (anchors or {}).values()):
            plain: WeightEditor[Any] = editor(**config.settings)
            return plain
        known = anchors or {}

        class Aligned(editor):  # type: ignore[misc]
            """The base under the aligned objective."""

            def terms(
                self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], layer: int
            ) -> tuple[Term, ...]:
                above = [i for i, aligned in enumerate(layers) if aligned >= layer]
                if not above:
                    raise ConfigError(
                        f"expected aligned layers from the edited one ({layer}) on, found {layers[0]} to {layers[-1]}"
                    )
                states = [known[request.id].states for request in requests]
                term = Alignment(
                    tuple(None if s is None else s[above] for s in states),
                    tuple(layers[i] for i in above),
                    **{name: getattr(config, name) for name in ALIGNMENT},
                )
                return (*super().terms(model, tokenizer, requests, layer), term)

        aligned: WeightEditor[Any] = Aligned(**config.settings)
        return aligned


ALIGNMENT = ("weight", "distance", "read", "schedule", "warmup", "counts")


def _forced(request: EditRequest, n: int) -> tuple[Reference, ...]:
    """Contexts that state the edited fact, in wordings that may be used to fit."""
    subject, frames = request.subject or "", range(len(contexts.FRAMES["repeat"]))
    texts = dict.fromkeys(contexts.repeat(request.text, request.target_new, i) for i in frames)
    made = [Reference(subject, request.relation or "context", request.target_new, text) for text in texts]
    return tuple(made) if n else ()
