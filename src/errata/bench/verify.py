"""Verify a patch: efficacy, generalization, specificity and locality, each with its interval and protocol."""

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import errata
from errata.bench.ask import ask
from errata.bench.metrics import (
    PROTOCOL_EFFICACY,
    PROTOCOL_GENERALIZATION,
    PROTOCOL_LOCALITY,
    PROTOCOL_SPECIFICITY,
    Rate,
    by_case,
    rate,
)
from errata.bench.probes import METRICS, probes_of
from errata.model.attached import asked
from errata.model.generate import cut
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
    questions = list(probes_of(requests if requests is not None else patch.requests))
    chat = bool(patch.config.get("chat"))
    wrap = wrapper(tokenizer, chat)
    unrelated = [wrap(text) for text in unrelated]
    witnesses = [wrap(q.probe.prompt) for q in questions[:8]]
    how = ", in the chat template" if chat else ""
    started = time.perf_counter()
    progress("asking the unedited model")
    neighbours = [q for q in questions if q.probe.kind == "neighborhood"]
    answers = ask(model, tokenizer, neighbours, wrap=wrap, figures=False)
    before = {(q.case, q.index): row["generated"] for q, row in zip(neighbours, answers, strict=True)}
    plain = logit_digests(model, tokenizer, unrelated)
    witness = logit_digests(model, tokenizer, witnesses)
    with patch.attach(model, tokenizer):
        progress("asking the edited model")
        rows = ask(model, tokenizer, questions, unedited=before, wrap=wrap, figures=False)
        same = [a == b for a, b in zip(plain, logit_digests(model, tokenizer, unrelated), strict=True)]
    restored = all(a == b for a, b in zip(witness, logit_digests(model, tokenizer, witnesses), strict=True))
    return {
        "n_edits": len(patch),
        **{metric: _figure(rows, metric, text + how) for metric, text in PROTOCOLS.items()},
        "locality": or_reason(
            rate(map(float, same), PROTOCOL_LOCALITY + how), "no unrelated texts were given", **EMPTY
        ),
        "by_relation": _by_relation(patch, rows),
        "failures": [
            {
                "kind": METRICS[row["kind"]],
                "edit": row["edit"],
                "prompt": row["prompt"],
                "expected": row["expected"][0] if row["expected"] else cut(row["unedited"]),
                "got": cut(row["generated"]),
            }
            for row in rows
            if not row["passed"]
        ],
        "restored": restored,
        "seconds_verify": round(time.perf_counter() - started, 2),
        "environment": environment(model),
    }


def environment(model: Any) -> dict[str, Any]:
    """What a figure was measured on; of a model's directory the last name only."""
    name = str(getattr(model.config, "_name_or_path", ""))
    return {
        "model": Path(name).name if Path(name).is_dir() else name,
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


EMPTY: dict[str, Any] = {"low": None, "high": None, "n": 0, "protocol": None}


def or_reason(figure: Rate | None, reason: str, **empty: Any) -> dict[str, Any]:
    """A figure as JSON values; where there is none, no value, what is `empty`, and why."""
    return figure.json() if figure else {"value": None, **empty, "reason": reason}


def _figure(rows: Sequence[dict[str, Any]], metric: str, protocol: str) -> dict[str, Any]:
    asked = [row for row in rows if METRICS[row["kind"]] == metric]
    figure = rate(by_case((row["case"] for row in asked), (row["passed"] for row in asked)).values(), protocol)
    found = or_reason(figure, f"the requests carry no {metric} probes", **EMPTY)
    return found | {"n_probes": len(asked)} if asked else found


def _by_relation(patch: Patch, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    relation = {r.id: r.relation or "(none)" for r in patch.requests}
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(set(relation.values())):
        found: dict[str, Any] = {"n_edits": sum(r == name for r in relation.values())}
        for kind, metric in METRICS.items():
            passed = [row["passed"] for row in rows if row["kind"] == kind and relation[row["case"]] == name]
            found[metric] = sum(passed) / len(passed) if passed else None
        table[name] = found
    return table


def logit_digests(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32) -> list[bytes]:
    """A digest of the logits at every position of each text, in fixed batches."""
    found: list[bytes] = []
    device = next(model.parameters()).device
    texts = asked(model, texts)
    ids = token_ids(tokenizer, texts)
    check_room(model, ids, texts)
    for start in range(0, len(texts), batch):
        rows = pad(ids[start : start + batch], pad_id(tokenizer), device, side="right")
        with torch.no_grad():
            logits = model(input_ids=rows.ids, attention_mask=rows.mask.long(), use_cache=False).logits
        for row, n in zip(logits.cpu(), rows.lengths.tolist(), strict=True):
            found.append(hashlib.sha256(row[:n].contiguous().view(torch.uint8).numpy().tobytes()).digest())
    return found
