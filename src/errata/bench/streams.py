"""The streaming protocol: items come one by one, and the model is edited only where it errs (Hartvigsen et al. 2023, section 4).

After every so many edits three things are asked: what the model was made for (TRR, test retention: answers that are right,
not merely kept), all edits so far on their own prompts (ERR, edit retention), and other wordings of these, which no method has
seen. Of two items that contradict each other the later holds: the earlier one is asked no more, and both reports say so.

Differs from the released code by default: an item is in error if greedy decoding does not say its whole target (there, for
questions, the test compares a length with the batch's size and is always true; methods labelled "published" edit every
item); answers are compared as bags of words without the end token (`f1`; `f1_set` is the released F1).
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.codebook import CodebookEntry
from errata.edit import EditRequest
from errata.editor import Editor
from errata.editors._items import ALREADY, COVERED, contradictions, items_of, says
from errata.errors import EditError
from errata.low_rank import LowRank
from errata.merge import merge
from errata.model.attached import MERGED
from errata.model.fingerprint import base_of
from errata.patch import Patch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from errata.bench.intervals import Rate
    from errata.bench.tables import Table

FAILED = "failed"
NO_EDIT = (ALREADY, COVERED, FAILED)  # outcomes of items that are no edits
NEW_KEYS = ("add", "split")  # outcomes that add a key to a codebook
Errors = dict[str, str]  # item: why


# -- the stream ------------------------------------------------------------------------------------------------------------


def edited(patch: Patch | None) -> list[str]:
    """Ids of the items that were edited, in order: a stream's patch also names what the model had right and what failed."""
    if patch is None:
        return []
    return [i for i in patch.ids if patch.report.get(i, {}).get("outcome") not in NO_EDIT]


def failures(patch: Patch, before: Patch | None = None) -> Errors:
    """{item: why it could not be fitted} of the items that a stream has seen since `before`."""
    seen = set(before.ids) if before is not None else set()
    lost = {i: own for i in patch.ids if i not in seen and (own := patch.report.get(i, {})).get("outcome") == FAILED}
    return {i: own.get("error", "no patch was made") for i, own in lost.items()}


def standing(patch: Patch) -> list[str]:
    """The edits that no later edit contradicts; a later item that was no edit overrules none."""
    made = edited(patch)
    clashes = contradictions([r for r in patch.requests if r.id in set(made)])
    return [i for i in made if "overruled" not in clashes.get(i, {})]


def follow(
    editor: Editor[Any],
    model: Any,
    tokenizer: Any,
    items: Sequence[EditRequest],
    edits: int,
    before: Patch | None = None,
    seed: int = 0,
) -> tuple[Patch | None, Errors]:
    """(the patch of a stream that has gone on until it holds `edits` edits or is at its end, what could not be fitted).

    before: the patch as it stood, whose requests are the items that were seen. Methods that take streams are given no more
    items at once than edits are left, so that they never go past the number; others are fitted one by one, each on the model
    with the edits before merged. The model is left as found.
    """
    seen = set(before.ids) if before is not None else set()
    left, errors = [item for item in items if item.id not in seen], Errors()
    step = _streamed if editor.streams else _one_by_one
    patch = before
    while left and (room := edits - len(edited(patch))) > 0:
        now, left = left[:room], left[room:]
        started = time.perf_counter()
        patch, new, failed = step(editor, model, tokenizer, now, patch, seed)
        errors |= failed
        for item in now:
            if item.id in failed:
                why = {
                    "outcome": FAILED,
                    "error": failed[item.id],
                }  # here too, for whoever takes the patch from the cache
                patch = _joined(patch, Patch(editor.method, {}, (item,), {}, (), {item.id: why}))
        if patch is not None and new:
            seconds = (time.perf_counter() - started) / len(new)
            timed = {i: {**patch.report[i], "seconds_fit": round(seconds, 6)} for i in new}
            patch = replace(patch, report={**patch.report, **timed})
    if patch is not None:
        clashes = contradictions([r for r in patch.requests if r.id in set(edited(patch))])
        report = {i: {**own, **clashes.get(i, {})} for i, own in patch.report.items()}
        patch = replace(patch, report=report)
    return patch, errors


Step = tuple[Patch | None, list[str], Errors]


def _streamed(
    editor: Editor[Any], model: Any, tokenizer: Any, items: Sequence[EditRequest], patch: Patch | None, seed: int
) -> Step:
    """Items for a method that takes streams, which tests for itself what the model says; only edits are its past."""
    fit: Any = editor.fit
    try:
        found = fit(
            model, tokenizer, items, seed=seed, onto=_past(patch) if patch is not None and edited(patch) else None
        )
    except Exception as error:  # whatever a method raises is an item's failure, not the run's
        if len(items) == 1:
            return patch, [], {items[0].id: _words(error)}
        new, failed = list[str](), Errors()
        for item in items:
            patch, own, errors = _streamed(editor, model, tokenizer, [item], patch, seed)
            new, failed = [*new, *own], failed | errors
        return patch, new, failed
    new = [r.id for r in items if found.report[r.id].get("outcome") not in NO_EDIT]
    return _seen(found, patch, items), new, {}


def _past(patch: Patch) -> Patch:
    """The patch with its edits alone."""
    held = set(edited(patch))
    return replace(
        patch,
        requests=tuple(r for r in patch.requests if r.id in held),
        report={i: own for i, own in patch.report.items() if i in held},
    )


def _seen(found: Patch, before: Patch | None, items: Sequence[EditRequest]) -> Patch:
    """A patch that was fitted on top of `before`'s edits, with all items that were seen as its requests."""
    if before is None:
        return found
    return replace(found, requests=(*before.requests, *items), report={**before.report, **found.report})


def _one_by_one(
    editor: Editor[Any], model: Any, tokenizer: Any, items: Sequence[EditRequest], patch: Patch | None, seed: int
) -> Step:
    """Items for any other method: what the model with the edits so far gets wrong is fitted on it."""
    new, failed = list[str](), Errors()
    with ExitStack() as stack:

        def renew(held: Patch | None) -> None:
            # One patch of all edits in place of the last costs less than one more on top of it.
            stack.close()
            if held is not None and held.parts:
                stack.enter_context(put_in(held, model, tokenizer))

        renew(patch)
        for item in items:
            try:
                if says(model, items_of(tokenizer, [item]))[0]:
                    found = Patch(editor.method, {}, (item,), {}, (), {item.id: {"outcome": ALREADY}})
                else:
                    found = editor.fit(model, tokenizer, [item], seed=seed)
                    if patch is None or not patch.parts:
                        found = _of_the_original(found, model, tokenizer)
                    renew(_joined(patch, found))
                    new.append(item.id)
            except Exception as error:  # as above
                failed[item.id] = _words(error)
                renew(patch)
                continue
            patch = _joined(patch, found)
    return patch, new, failed


def _of_the_original(patch: Patch, model: Any, tokenizer: Any) -> Patch:
    """The patch with the model as its base that the stream began with, without what is merged into it."""
    merged = vars(model).get(MERGED)
    with merged.undone() if merged is not None else nullcontext():
        return replace(patch, base=base_of(model, tokenizer, patch.base.get("weights") or {}))


def put_in(patch: Patch, model: Any, tokenizer: Any) -> Any:
    """A block in which the model has the edits of a stream: low-rank ones merged, any others attached."""
    if all(isinstance(part, LowRank) for part in patch.parts):
        return merge(patch, model, tokenizer)
    return patch.attach(model, tokenizer)


def _joined(patch: Patch | None, found: Patch) -> Patch:
    """One patch of both; its base is the model that the stream began with."""
    if patch is None:
        return found
    if not patch.parts and found.parts:
        base, config = found.base, found.config
    else:
        base, config = patch.base, patch.config
    return replace(
        patch,
        config=config,
        base=base,
        requests=(*patch.requests, *found.requests),
        parts=(*patch.parts, *found.parts),
        report={**patch.report, **found.report},
    )


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EditError) else f"{type(error).__name__}: {text}"


def entries(
    method: str, cases: Sequence[Case], patch: Patch | None, new: Sequence[str], errors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of `errata.bench.rows.FITS`, without run and model: of the edits that were made and of those that failed."""
    names = {case.request.id: case.id for case in cases}
    found = []
    total = sum(t.numel() * t.element_size() for p in patch.parts for t in p.tensors().values()) if patch else 0
    count = max(1, len(edited(patch)))
    for edit in new:
        assert patch is not None
        own = [part for part in patch.parts if isinstance(part, CodebookEntry) and part.edit == edit]
        size = sum(t.numel() * t.element_size() for p in own for t in p.tensors().values()) if own else total // count
        report = dict(patch.report[edit])
        found.append(
            {"method": method, "case": names[edit], "edit": edit, "seconds": report.pop("seconds_fit", None)}
            | {"nbytes": size, "error": "", "report": json.dumps(report, ensure_ascii=False, default=str)}
        )
    return found + [
        {"method": method, "case": names[edit], "edit": edit, "seconds": None, "nbytes": None}
        | {"error": why, "report": "{}"}
        for edit, why in errors.items()
    ]


# -- what is shown of it ---------------------------------------------------------------------------------------------------


def looks(rows: "DataFrame", method: str) -> list[int]:
    """After how many edits a method was asked, ascending."""
    return sorted({int(edits) for edits in rows.loc[rows["method"] == method, "edits"]})


def figures_at(rows: "DataFrame", method: str, edits: int | None, protocol: str) -> dict[str, "Rate"]:
    """TRR, ERR, their mean and the other wordings of a method at one look; of the unedited model TRR alone."""
    from errata.bench.metrics import score

    plain = method == "unedited"
    wanted = {"TRR": "upstream"} | ({} if plain else {"ERR": "efficacy", "rephrasings": "generalization"})
    found = {c: score(rows, f"{name}.{protocol}", method, edits=edits) for c, name in wanted.items()}
    rates = {column: rate for column, rate in found.items() if rate is not None}
    if "TRR" in rates and "ERR" in rates:
        rates["avg"] = _mean(rates["TRR"], rates["ERR"])
    return rates


def _mean(a: "Rate", b: "Rate") -> "Rate":
    """The mean of two rates over different texts, with the interval of independent errors."""
    from errata.bench.intervals import Rate

    value = (a.value + b.value) / 2
    down, up = (
        math.hypot(x, y) / 2 for x, y in ((a.value - a.low, b.value - b.low), (a.high - a.value, b.high - b.value))
    )
    return Rate(value, value - down, value + up, b.n, "the mean of TRR and ERR", "of independent errors")


def stream_table(
    rows: "DataFrame", run: Path, preset: str, protocol: str, title: str, labels: Mapping[str, str], *, faulty: str = "",
    about: str = "",
) -> "Table":  # fmt: skip
    """A row for each method at the end of its stream; a dash for those that could not be run, with the reason below.

    protocol: ending of the metrics ("generate", "f1"); faulty: that of the released code's, shown beside for ERR. labels: our
    label -> the paper's name. about: what else is to be said of the protocol.
    """
    from errata.bench.metrics import score
    from errata.bench.published import PUBLISHED, SOURCES
    from errata.bench.rows import read_fits
    from errata.bench.tables import Table

    fits = read_fits(run)
    columns = ["TRR", "ERR", "avg", "edits", "rephrasings", "keys per edit"]
    extra = [f"ERR ({faulty}, released)"] if faulty else []
    lines: list[list[Any]] = []
    methods = list(dict.fromkeys(rows["method"]))
    reasons = left_out(run)
    for method in sorted(methods, key=lambda name: name != "unedited"):
        last = (looks(rows, method) or [0])[-1]
        found: dict[str, Any] = dict(figures_at(rows, method, None if method == "unedited" else last, protocol))
        if method != "unedited":
            made = fits[(fits["method"] == method) & (fits["error"].fillna("") == "")]
            found |= {"edits": len(made), "keys per edit": keys_per_edit(made["report"])}
            if faulty:
                found[extra[0]] = score(rows, f"efficacy.{faulty}", method, edits=last)
        lines.append([method, *(found.get(column) for column in [*columns, *extra])])
    lines += [[label, *[None] * len([*columns, *extra])] for label in reasons]
    names = {theirs: ours for ours, theirs in labels.items()}
    published = {
        model: {names.get(name, name): values for name, values in numbers.items()}
        for model, numbers in PUBLISHED.get(preset, {}).items()
    }
    note = [
        "TRR: what the model was made for, right (not merely kept), at the end of the stream. ERR: all edits so far, on their own "
        "prompts. avg: their mean. rephrasings: other wordings of these edits, which no method has seen.",
        about,
        f"Published: {SOURCES[preset]}; as fractions." if preset in SOURCES else "",
        *(f"{label}: not applicable: {why}." for label, why in reasons.items()),
    ]
    return Table(title, ["method", *columns, *extra], lines, "\n".join(line for line in note if line), published)


def keys_per_edit(reports: Any) -> float | None:
    """Keys that a codebook has for each edit, from the reports of fits; None for methods without a codebook."""
    known = [report for report in map(json.loads, reports) if report.get("outcome") is not None]
    keys = sum((report["outcome"] in NEW_KEYS) + len(report.get("again", ())) for report in known)
    return round(keys / len(known), 3) if known else None


def left_out(run: Path) -> dict[str, str]:
    """Methods of the preset that could not be run on the model, and why."""
    path = run / "run.json"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get("left_out", {}) if path.is_file() else {}
    return found


def stream_figure(rows: "DataFrame", protocol: str) -> "Figure | None":
    """TRR, ERR and other wordings by the number of edits, a line for each method; None without a second look."""
    from errata.bench.figures import Point, Series, curves

    panels: dict[str, list[Series]] = {}
    for method in [m for m in dict.fromkeys(rows["method"]) if m != "unedited"]:
        points: dict[str, list[Point]] = {}
        for edits in looks(rows, method):
            for column, rate in figures_at(rows, method, edits, protocol).items():
                points.setdefault(column, []).append(Point(edits, rate.value, rate.low, rate.high))
        for column in ("TRR", "ERR", "rephrasings"):
            if column in points:
                panels.setdefault(column, []).append(Series(method, tuple(points[column]), method))
    return curves(panels, "edits", "per cent") if panels else None
