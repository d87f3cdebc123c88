"""What a fit returns: an immutable value that is attached to a model, taken off again, saved, joined and revised.

One safetensors file: tensors named `parts.<i>.<field>` and `gates.<digest>.<field>`, everything else a JSON header in the
metadata. No pickle, no class path, no code. `to_bytes` and `from_bytes` are the only pair that reads and writes it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from errata.codebook import CodebookEntry, Routed
from errata.context import Context, ContextTable
from errata.counterfactual import Counterfactual, Expert
from errata.dense import Dense
from errata.dense_table import DenseTable
from errata.edit import EditRequest
from errata.errors import PatchFormatError, RequestError, UnsupportedPatchError
from errata.files import write_atomically
from errata.low_rank import LowRank
from errata.low_rank_table import LowRankTable, refuse_present
from errata.model.attached import CONTEXT, STEERED, asked, scoped, unmerged
from errata.model.fingerprint import check_base
from errata.output_table import OutputPart, OutputTable
from errata.scope.gate import Gate
from errata.steering.parts import Decision, Steering, together
from errata.steering.table import SteeringTable

FORMAT_VERSION = 1
# Readers of older files: MIGRATIONS[v] turns a header of version v into one of v + 1. Append only.
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = ()
Part = Steering | Counterfactual | LowRank | Context | CodebookEntry | Routed | Dense
KINDS: dict[str, Any] = {
    part.kind: part for part in (Steering, Counterfactual, LowRank, Context, CodebookEntry, Routed, Dense)
}


@dataclass(frozen=True, eq=False)
class Patch:
    """Fitted edits. `requests[i]` is what was asked; `parts` realise them; `report` has one entry per request id.

    config: JSON values, tuples as lists; base: what it was fitted on (family, sizes, hashes of tokenizer and touched weights).
    """

    method: str
    config: dict[str, Any]
    requests: tuple[EditRequest, ...]
    base: dict[str, Any]
    parts: tuple[Part, ...]
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _as_json(self.config))  # a patch just fitted joins with one that was saved

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of the edits, in order."""
        return tuple(request.id for request in self.requests)

    @cached_property
    def id(self) -> str:
        """SHA-256 (16 hex digits) of the file without the report: equal edits have equal ids."""
        return hashlib.sha256(replace(self, report={}).to_bytes()).hexdigest()[:16]

    @property
    def steering(self) -> tuple[Steering | Counterfactual, ...]:
        """The parts that act in a scope on the way through the model, steering and counterfactual ones, in order."""
        return tuple(part for part in self.parts if isinstance(part, Steering | Counterfactual))

    @property
    def low_rank(self) -> tuple[LowRank, ...]:
        """The low-rank parts, in order."""
        return tuple(part for part in self.parts if isinstance(part, LowRank))

    @property
    def context(self) -> tuple[Context, ...]:
        """The context parts, in order."""
        return tuple(part for part in self.parts if isinstance(part, Context))

    @property
    def outputs(self) -> tuple[OutputPart, ...]:
        """The parts that replace a linear map's output, codebook entries and routed adapters, in order."""
        return tuple(part for part in self.parts if isinstance(part, CodebookEntry | Routed))

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The dense parts, in order."""
        return tuple(part for part in self.parts if isinstance(part, Dense))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.id)

    def __len__(self) -> int:
        return len(self.requests)

    # -- values from values ------------------------------------------------------------------------------------------

    def only(self, edit: str) -> "Patch":
        """The patch of one of the edits. Raises RequestError if there is no such edit.

        It is what a fit of that edit by itself would have made only where edits are fitted independently. Raises
        UnsupportedPatchError for one of many that were trained into one part together.
        """
        at = self._index(edit)
        kept = (_only(part, edit) for part in self.parts)
        return replace(
            self,
            requests=(self.requests[at],),
            parts=tuple(part for part in kept if part is not None),
            report={k: v for k, v in self.report.items() if k == edit},
        )

    def without(self, edit: str) -> "Patch":
        """The patch without one edit: its own parts and its columns of low-rank parts go, every other stays as it is.

        What a joint write solved for all its edits is not solved again; of a codebook, what its other edits make of it is left.
        Raises RequestError if there is no such edit, UnsupportedPatchError for one of many that were trained into one part together.
        """
        self._index(edit)
        kept = (_without(part, edit) for part in self.parts)
        return replace(
            self,
            requests=tuple(r for i, r in zip(self.ids, self.requests, strict=True) if i != edit),
            parts=tuple(part for part in kept if part is not None),
            report={k: v for k, v in self.report.items() if k != edit},
        )

    def revise(self, edit: str, new: "Patch") -> "Patch":
        """The patch with one edit replaced: `without(edit) + new`, bit for bit."""
        return self.without(edit) + new

    def __add__(self, other: "Patch") -> "Patch":
        """Both patches' edits in one. Raises RequestError for different methods, bases, or an edit that both hold."""
        if not isinstance(other, Patch):
            return NotImplemented
        if self.base != other.base:
            raise RequestError("cannot join patches that were fitted on different models; fit both on the same one")
        if self.method != other.method or self.config != other.config:
            raise RequestError(
                f"cannot join a {self.method} patch with a {other.method} patch of another configuration; attach both instead"
            )
        if twice := set(self.ids) & set(other.ids):
            raise RequestError(f"both patches hold the edit {sorted(twice)[0]}; remove it from one of them")
        return replace(
            self,
            requests=self.requests + other.requests,
            parts=self.parts + other.parts,
            report=self.report | other.report,
        )

    def _index(self, edit: str) -> int:
        if edit not in self.ids:
            raise RequestError(
                f"expected the id of one of the patch's {len(self)} edits, found {edit!r}; `errata show` lists them"
            )
        return self.ids.index(edit)

    # -- attaching ---------------------------------------------------------------------------------------------------

    def attach(self, model: Any, tokenizer: Any) -> "Handle":
        """Make the edits act on the model; no weight changes. The handle is a context manager; `detach` undoes it exactly.

        Raises BaseMismatchError if the patch was fitted on another model or tokenizer, RequestError if one of its weight
        edits is in the model already, UnsupportedPatchError for a second edit whose context stands before every prompt.
        """
        refuse_present(model, _edits(self.low_rank))
        check_fits([self], model, tokenizer)
        return Handle(self, model, tokenizer)

    # -- the file ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"parts.{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}
        for gate in self._gates().values():
            named |= {f"gates.{gate.digest}.{name}": t for name, t in gate.tensors().items()}
        for expert in self._experts().values():
            named |= {f"experts.{expert.digest}.{name}": t for name, t in expert.tensors().items()}
        return {name: t.detach().cpu().contiguous() for name, t in named.items()}

    def _gates(self) -> dict[str, Gate]:
        gates = [*(part.gate for part in self.steering), *(part.gate for part in self.context)]
        return {gate.digest: gate for gate in gates if gate is not None}

    def _experts(self) -> dict[str, Expert]:
        return {part.expert.digest: part.expert for part in self.parts if isinstance(part, Counterfactual)}

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        experts = self._experts()
        return {
            "format": "errata.patch",
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "config": self.config,
            "base": self.base,
            "requests": [json.loads(r.to_json()) for r in self.requests],
            "parts": [part.header() for part in self.parts],
            "gates": {digest: gate.header() for digest, gate in self._gates().items()},
            "report": self.report,
            **({"experts": {digest: one.header() for digest, one in experts.items()}} if experts else {}),
        }

    def to_bytes(self) -> bytes:
        """The patch as one safetensors file."""
        tensors = self._tensors()
        header = self.header() | {"content": _digest(tensors)}
        text = json.dumps(header, sort_keys=True, ensure_ascii=False)
        seal = hashlib.sha256(text.encode()).hexdigest()
        return _sorted(save_tensors(tensors, metadata={"errata": text, "sha256": seal}))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the patch") -> "Patch":
        """Read what `to_bytes` wrote. Raises PatchFormatError, naming what is wrong and where."""
        header, tensors = _unpack(data, name)
        while header["format_version"] < FORMAT_VERSION:
            header = MIGRATIONS[header["format_version"]](header)
        try:
            gates = {d: Gate.of(h, _under(tensors, f"gates.{d}.")) for d, h in header["gates"].items()}
            experts = header.get("experts", {})
            shared = gates | {d: Expert.of(h, _under(tensors, f"experts.{d}.")) for d, h in experts.items()}
            parts = tuple(
                KINDS[h["kind"]].of(h, _under(tensors, f"parts.{i}."), shared) for i, h in enumerate(header["parts"])
            )
            return cls(
                method=header["method"],
                config=header["config"],
                requests=tuple(EditRequest(**r) for r in header["requests"]),
                base=header["base"],
                parts=parts,
                report=header["report"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PatchFormatError(
                f"{name} is not a valid patch: {type(error).__name__}: {error}; it may come from another version"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_atomically(path, self.to_bytes())


def load_patch(path: str | Path) -> Patch:
    """Read a patch file. Raises PatchFormatError if it is missing, truncated, altered or something else."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PatchFormatError(f"cannot read the patch {path}: {error.strerror or error}") from None
    return Patch.from_bytes(data, str(path))


def _sorted(data: bytes) -> bytes:
    """The safetensors file with its header's keys in order: the library writes metadata in a random one."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _unpack(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, UnicodeDecodeError, AttributeError) as error:
        raise PatchFormatError(
            f"{name} is not a readable safetensors file (truncated or damaged): {error}; copy it again"
        ) from None
    text = metadata.get("errata", "")
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != "errata.patch":
        raise PatchFormatError(
            f"{name} is a safetensors file but not an errata patch; pass a file that `errata fit` wrote"
        )
    version = header.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise PatchFormatError(f"{name} has format version {version!r}, which never was; fetch or fit it again")
    if version > FORMAT_VERSION:
        raise PatchFormatError(
            f"{name} has format version {version}, this errata reads up to {FORMAT_VERSION}; update errata"
        )
    sealed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == metadata.get("sha256")
    if not sealed or header.get("content") != _digest(tensors):
        raise PatchFormatError(
            f"{name} has been altered since it was written (its checksums do not match); fetch or fit it again"
        )
    return header, tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        sha.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists."""
    if isinstance(value, dict):
        return {name: _as_json(own) for name, own in value.items()}
    return [_as_json(own) for own in value] if isinstance(value, tuple | list) else value


def _only(part: Part, edit: str) -> Part | None:
    if isinstance(part, LowRank):
        return part.only(edit)
    return part if _is_about(part, edit) else None


def _without(part: Part, edit: str) -> Part | None:
    if isinstance(part, LowRank):
        return part.without(edit)
    return None if _is_about(part, edit) else part


def _is_about(part: Steering | Counterfactual | Context | CodebookEntry | Routed | Dense, edit: str) -> bool:
    """Whether a part is an edit's. Raises UnsupportedPatchError if it is others' as well."""
    if not isinstance(part, (Dense, Routed)):
        return part.edit == edit
    if edit in part.edits and len(part.edits) > 1:
        raise UnsupportedPatchError(
            f"the edit {edit} was trained together with {len(part.edits) - 1} others into one {part.kind} part and cannot be taken "
            "out alone; fit the others again without it"
        )
    return edit in part.edits


def _edits(parts: Sequence[LowRank]) -> set[str]:
    return {edit for part in parts for edit in part.edits}


def check_fits(patches: Sequence[Patch], model: Any, tokenizer: Any) -> None:
    """Raise BaseMismatchError if a patch was fitted on another model or tokenizer; merged updates are left out of account."""
    with unmerged(model):
        for base in {json.dumps(patch.base, sort_keys=True): patch.base for patch in patches}.values():
            check_base(base, model, tokenizer)


class Handle:
    """One attachment of one patch. `with patch.attach(...)` or `handle.detach()`; detaching twice is harmless.

    conflicts: pairs (edit of this patch, earlier edit) for equal subject and relation. The later of two steering edits
    overrides the earlier; two weight edits both act.
    """

    def __init__(self, patch: Patch, model: Any, tokenizer: Any):
        self.patch, self.model = patch, model
        weight_edits = _edits(patch.low_rank)
        keys = {i: r.key for i, r in zip(patch.ids, patch.requests, strict=True) if i in weight_edits}
        self._low_rank, self._context = LowRankTable.on(model), ContextTable.on(model, tokenizer)
        self._outputs, self._dense = OutputTable.on(model), DenseTable.on(model)
        self._steering: SteeringTable | None = None
        self.conflicts: list[tuple[str, str]] = []
        try:
            if patch.low_rank:
                self.conflicts += self._low_rank.add(self, patch.low_rank, keys)
            if patch.context:
                self.conflicts += self._context.add(self, patch.context)
            about = {r.id: r.key for r in patch.requests}
            if patch.outputs:
                self.conflicts += self._outputs.add(self, patch.outputs, about)
            if patch.dense:
                self.conflicts += self._dense.add(self, patch.dense, about)
            self._steering = SteeringTable.on(model, tokenizer)
            self.conflicts = self._steering.add(self, patch.steering) + self.conflicts
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take this patch off; every other attachment stays."""
        for table in (self._low_rank, self._outputs, self._dense, self._context, self._steering):
            if table is not None:
                table.remove(self)

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """What the loaded edits, all patches together, say about each prompt; low-rank edits have no scope.

        Where prompts are both steered and given contexts, of the two decisions the one that is deeper in its scope.
        """
        return decide(self.model, prompts) or [Decision(None, None, float("inf"), float("nan")) for _ in prompts]

    @contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Teacher forcing: inside, each row is a prompt of so many real tokens and a completion."""
        assert self._steering is not None
        with self._steering.prompts(lengths), self._outputs.prompts(lengths):
            yield


def decide(model: Any, prompts: Sequence[str]) -> list[Decision] | None:
    """What the edits on a model say about each prompt: the deeper decision of steering and contexts; None if nothing has a scope."""
    return together(
        table.decide(asked(model, prompts)) if (table := scoped(model, STEERED)) is not None else None,
        table.decide(prompts) if (table := scoped(model, CONTEXT)) is not None else None,
    )


@contextmanager
def attach_rows(model: Any, tokenizer: Any, patches: Sequence[Patch | None], *, check: bool = True) -> Iterator[None]:
    """Inside, every batch has len(patches) rows, and row i is edited by patches[i] only (None: by none).

    At the gates only a row's own edits compete, beside what is attached to the whole model, which acts on every row as well.
    One patch may stand in several rows: where generation repeats rows (beams, num_return_sequences), list each patch as
    often, one after another. A batch of another size is an error. check: compare the patches with the model; leave it out
    where that was done. Raises as `Patch.attach` does.
    """
    for i, patch in enumerate(patches, 1):
        if patch is not None and patch.dense:
            raise UnsupportedPatchError(
                f"expected patches that act row by row, found a {patch.method} patch with dense parts for row {i}; its weights are "
                "those of the whole batch: attach it to the whole model"
            )
    found = [patch for patch in patches if patch is not None]
    refuse_present(model, {edit for patch in found for edit in _edits(patch.low_rank)})
    if check:
        check_fits(found, model, tokenizer)
    first: dict[int, int] = {}
    owners = [first.setdefault(id(patch), row) for row, patch in enumerate(patches)]
    with ExitStack() as stack:
        stack.enter_context(LowRankTable.on(model).rows([p.low_rank if p is not None else () for p in patches]))
        if any(p.outputs for p in found):
            stack.enter_context(OutputTable.on(model).rows([p.outputs if p is not None else () for p in patches]))
        steering = [p.steering if p is not None else () for p in patches]
        stack.enter_context(SteeringTable.on(model, tokenizer).rows(steering, owners))
        if any(p.context for p in found):
            contexts = [p.context if p is not None else () for p in patches]
            stack.enter_context(ContextTable.on(model, tokenizer).rows(contexts))
        yield
