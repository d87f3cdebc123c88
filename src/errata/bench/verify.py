"""Verify a patch: efficacy, generalization, specificity and locality, each with its interval and protocol."""

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

import errata
from errata.bench.metrics import (
    PROTOCOL_EFFICACY,
    PROTOCOL_GENERALIZATION,
    PROTOCOL_LOCALITY,
    PROTOCOL_SPECIFICITY,
    by_case,
    rate,
)
from errata.bench.probes import Probe, answers, probes_of
from errata.model.generate import cut, says
from errata.model.room import check_room
from errata.model.tokens import pad, pad_id, token_ids, wrapper
from errata.patch import Patch

PROTOCOLS = {
    "efficacy": PROTOCOL_EFFICACY,
    "generalization": PROTOCOL_GENERALIZATION,
    "specificity": PROTOCOL_SPECIFICITY,
}


def verify(
    model: Any,
    tokenizer: Any,
    patch: Patch,
    unrelated: Sequence[str] = (),
    *,
    requests: Sequence[Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Attach the patch, all edits at once, and ask its probes (or those of `requests`, by id); detach afterwards.

    Probes and unrelated texts of a patch that was fitted with `chat` are asked as user turns of the chat template.
    Returns the figures as JSON values: each metric {value, low, high, n, protocol}, or {value: None, reason} where there is
    nothing to ask; `by_relation`, `failures` (the probes that went wrong) and `restored` (logits bit for bit after detaching).
    """
    probes = list(probes_of(requests if requests is not None else patch.requests))
    chat = bool(patch.config.get("chat"))
    wrap = wrapper(tokenizer, chat)
    unrelated = [wrap(text) for text in unrelated]
    witnesses = [wrap(p.prompt) for p in probes[:8]]
    how = ", in the chat template" if chat else ""
    started = time.perf_counter()
    progress("asking the unedited model")
    neighbours = [p for p in probes if p.kind == "specificity"]
    before = (
        dict(zip(neighbours, answers(model, tokenizer, neighbours, probes, wrap), strict=True)) if neighbours else {}
    )
    plain = logit_digests(model, tokenizer, unrelated)
    witness = logit_digests(model, tokenizer, witnesses)
    with patch.attach(model, tokenizer):
        progress("asking the edited model")
        after = dict(zip(probes, answers(model, tokenizer, probes, wrap=wrap), strict=True))
        same = [a == b for a, b in zip(plain, logit_digests(model, tokenizer, unrelated), strict=True)]
    restored = all(a == b for a, b in zip(witness, logit_digests(model, tokenizer, witnesses), strict=True))
    passed = {p: cut(after[p]) == cut(before[p]) if p.expected is None else says(after[p], p.expected) for p in probes}
    return {
        "n_edits": len(patch),
        **{kind: _figure(probes, passed, kind, text + how) for kind, text in PROTOCOLS.items()},
        "locality": _or_reason(rate(map(float, same), PROTOCOL_LOCALITY + how), "no unrelated texts were given"),
        "by_relation": _by_relation(patch, probes, passed),
        "failures": [
            {
                "kind": p.kind,
                "edit": p.case,
                "prompt": p.prompt,
                "expected": p.expected or cut(before[p]),
                "got": cut(after[p]),
            }
            for p in probes
            if not passed[p]
        ],
        "restored": restored,
        "seconds_verify": round(time.perf_counter() - started, 2),
        "environment": environment(model),
    }


def environment(model: Any) -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "model": getattr(model.config, "_name_or_path", ""),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "versions": {
            "errata": errata.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _figure(probes: Sequence[Probe], passed: dict[Probe, bool], kind: str, protocol: str) -> dict[str, Any]:
    asked = [p for p in probes if p.kind == kind]
    figure = rate(by_case((p.case for p in asked), (passed[p] for p in asked)).values(), protocol)
    found = _or_reason(figure, f"the requests carry no {kind} probes")
    return found | {"n_probes": len(asked)} if asked else found


def _or_reason(figure: Any, reason: str) -> dict[str, Any]:
    return (
        figure.json()
        if figure
        else {"value": None, "low": None, "high": None, "n": 0, "protocol": None, "reason": reason}
    )


def _by_relation(patch: Patch, probes: Sequence[Probe], passed: dict[Probe, bool]) -> dict[str, dict[str, Any]]:
    relation = {r.id: r.relation or "(none)" for r in patch.requests}
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(set(relation.values())):
        row: dict[str, Any] = {"n_edits": sum(r == name for r in relation.values())}
        for kind in PROTOCOLS:
            asked = [passed[p] for p in probes if p.kind == kind and relation[p.case] == name]
            row[kind] = sum(asked) / len(asked) if asked else None
        table[name] = row
    return table


def logit_digests(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32) -> list[bytes]:
    """A digest of the logits at every position of each text, in fixed batches."""
    found: list[bytes] = []
    device = next(model.parameters()).device
    ids = token_ids(tokenizer, texts)
    check_room(model, ids, texts)
    for start in range(0, len(texts), batch):
        rows = pad(ids[start : start + batch], pad_id(tokenizer), device, side="right")
        with torch.no_grad():
            logits = model(input_ids=rows.ids, attention_mask=rows.mask.long(), use_cache=False).logits
        for row, n in zip(logits.cpu(), rows.lengths.tolist(), strict=True):
            found.append(hashlib.sha256(row[:n].contiguous().view(torch.uint8).numpy().tobytes()).digest())
    return found
