"""`errata verify`: did the correction take, and did nothing else move?"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    CHECK_FAILED,
    ConfigFile,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Preset,
    Seed,
    Settings,
    Threads,
    bar,
    emit,
    err,
    is_atlas,
    load,
    notice,
    notice_conflicts,
    one_of,
    out,
    percent,
    row,
    table,
    writable,
)
from errata.cli.fit import make_editor, with_judges
from errata.edit import read_requests
from errata.errors import ConfigError
from errata.files import write_atomically

METRICS = ("efficacy", "generalization", "specificity", "locality")
Minimum = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Exit with 1 below this fraction.")]


def verify(
    model: Model,
    patch: Annotated[Path | None, typer.Option("--patch", "-p", help="The patch to verify.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Fit with this method, then verify.")] = None,
    requests: Annotated[
        Path | None, typer.Option("--requests", help="What to fit; with --patch, the file that holds its probes.")
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Random counterfactual edits of Atlas, without --requests.")
    ] = 300,
    seed: Seed = 0,
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    single: Annotated[
        bool,
        typer.Option("--single", help="Judge each edit alone on the model (edits of weights, fitted independently)."),
    ] = False,
    unrelated: Annotated[int, typer.Option(min=0, help="Unrelated texts for locality.")] = 2000,
    texts: Annotated[Path | None, typer.Option("--texts", help="Your own unrelated texts, one a line.")] = None,
    sealed: Annotated[bool, typer.Option("--sealed", help="Judge by Atlas's sealed set (final figures only).")] = False,
    rows: Annotated[Path | None, typer.Option("--rows", help="Write every probe that went wrong, as JSONL.")] = None,
    min_efficacy: Minimum = None,
    min_generalization: Minimum = None,
    min_specificity: Minimum = None,
    min_locality: Minimum = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Ask the probes of a patch, or of a fresh fit, with all edits loaded at once.

    Probes are those that the requests carry (paraphrase_prompts, neighborhood_prompts); for Atlas's own facts missing ones
    are made. A figure without probes is null, with the reason. With --single no two edits are on the model together: each row
    of a batch has an edit of its own.
    """
    one_of({"--patch": patch, "--method": method})
    edits, plan = _edits(model, patch, method, requests, n, seed, preset, settings, config)
    if single:
        _refuse_joint(edits)
    unrelated_texts = [] if single else _texts(texts, unrelated, seed, sealed)
    if rows:
        writable(rows)
    overridden = [] if single else notice_conflicts(edits.requests if patch else plan)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    seconds = None
    if method:
        edits.check(plan, loaded, tokenizer)
        started = time.perf_counter()
        with bar(f"fitting with {method}", len(plan)) as progress:
            edits = edits.fit(loaded, tokenizer, plan, seed=seed, progress=lambda done, _: progress(done))
        seconds = round((time.perf_counter() - started) / len(edits), 4)
    judged = _judged(
        model, edits, with_judges(edits.requests, plan) if patch and plan else edits.requests, seed, sealed
    )
    asked = _ask_singly(loaded, tokenizer, edits, judged) if single else None
    found = asked or _ask(loaded, tokenizer, edits, unrelated_texts, judged)
    failures = found.pop("failures")
    if rows:
        lines = (json.dumps(failure, ensure_ascii=False) for failure in failures)
        write_atomically(rows, "".join(f"{line}\n" for line in lines))
    minima = dict(zip(METRICS, (min_efficacy, min_generalization, min_specificity, min_locality), strict=True))
    below = [m for m, least in minima.items() if least is not None and (found[m]["value"] or 0.0) < least]
    environment = found.pop("environment") | {"model": model}
    value = {
        **found,
        "seconds_fit_per_edit": seconds,
        "n_failures": len(failures),
        "conflicts": overridden,
        "below_minimum": below,
        "method": edits.method,
        "config": edits.config,
        "patch": edits.id,
        "seed": seed,
        "sealed": sealed,
        "single": single,
        **environment,
    }
    if json_output:
        emit(value)
    else:
        _print(value, failures)
    reasons = [f"{m} is {percent(found[m]['value'])}, below {percent(minima[m])}" for m in below]
    if not found["restored"]:
        reasons.append("after detaching, the logits are not what they were")
    if reasons:
        notice(f"check failed: {', '.join(reasons)}")
        raise typer.Exit(CHECK_FAILED)


def _edits(
    model: str, patch: Path | None, method: str | None, requests: Path | None, n: int, seed: int, preset: str | None,
    settings: list[str] | None, config: Path | None,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """(the patch, or the editor that will make it; the requests to fit, or those that carry the patch's probes)."""
    from errata.patch import load_patch

    asked = read_requests(requests) if requests else []
    if patch:
        if preset or settings or config:
            raise ConfigError("--preset, --config and --set belong to a fit; a patch has its configuration already")
        return load_patch(patch), asked
    editor = make_editor(method or "", preset, settings, config)
    if not requests:
        if not is_atlas(model):
            raise ConfigError(
                f"Atlas's counterfactual edits are for Atlas only, and the model is {model!r}; give --requests"
            )
        from errata.atlas.requests import counterfactual_requests
        from errata.atlas.world import load_world

        asked = counterfactual_requests(load_world(), n, seed=seed)
    editor.check(asked)
    return editor, asked


def _judged(model: str, patch: Any, requests: Any, seed: int, sealed: bool) -> Any:
    """The patch's requests with their probes, for Atlas's facts also those that the requests lack."""
    if not is_atlas(model):
        return requests
    from errata.atlas.probes import with_probes
    from errata.atlas.world import load_world

    return with_probes(load_world(), list(requests), seed, sealed)


def _texts(path: Path | None, n: int, seed: int, sealed: bool) -> list[str]:
    if path:
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"expected UTF-8 texts, one a line, in {path}: {error}") from None
    if not n:
        return []
    from errata.atlas.probes import unrelated_texts
    from errata.atlas.world import load_world

    return unrelated_texts(load_world(), n, seed, sealed)


def _ask(model: Any, tokenizer: Any, patch: Any, texts: list[str], requests: Any) -> dict[str, Any]:
    from errata.bench.verify import verify as measure

    with err().status("verifying") as status:
        return measure(model, tokenizer, patch, texts, requests=requests, progress=lambda text: status.update(text))


def _refuse_joint(edits: Any) -> None:
    """Refuse to take apart what was written together. edits: an editor or a patch."""
    from errata.editor import Editor
    from errata.editors import get_editor

    joint = edits.joint if isinstance(edits, Editor) else get_editor(edits.method).wrote_jointly(edits.config)
    if getattr(edits, "steering", ()) or joint:
        raise ConfigError(
            f"--single judges edits that were fitted independently, by their weights, and {edits.method} edits "
            f"{'are written together' if joint else 'act by their scope'}; leave it out"
        )


def _ask_singly(model: Any, tokenizer: Any, patch: Any, requests: Any) -> dict[str, Any]:
    """The figures of `errata.bench.verify`, as far as single edits have them."""
    from errata.bench.metrics import PROTOCOL_SPECIFICITY
    from errata.bench.probes import probes_of
    from errata.bench.singles import Metric, Question, alone, judge_singles
    from errata.bench.verify import environment, logit_digests

    metrics: dict[str, Metric] = {
        "efficacy": "efficacy",
        "generalization": "generalization",
        "specificity": "other_subjects",
    }
    probes = list(dict.fromkeys(probes_of(requests)))
    questions = [Question(p.case, metrics[p.kind], p.prompt, p.expected) for p in probes]
    witnesses, started = [p.prompt for p in probes[:8]], time.perf_counter()
    before = logit_digests(model, tokenizer, witnesses)
    with err().status("asking each edit alone"):
        rates = judge_singles(model, tokenizer, alone(patch), questions)
    figures: dict[str, Any] = {
        kind: rates[metric].json() if metric in rates else _nothing(f"the requests carry no {kind} probes")
        for kind, metric in metrics.items()
    }
    if figures["specificity"]["value"] is not None:
        figures["specificity"]["protocol"] = f"{PROTOCOL_SPECIFICITY}; each edit alone"
    return {
        "n_edits": len(patch),
        **figures,
        "locality": _nothing("unrelated texts are asked with all edits at once only"),
        "by_relation": {},
        "failures": [],
        "restored": before == logit_digests(model, tokenizer, witnesses),
        "seconds_verify": round(time.perf_counter() - started, 2),
        "environment": environment(model),
    }


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "n": 0, "protocol": None, "reason": reason}


def _print(value: dict[str, Any], failures: list[dict[str, Any]]) -> None:
    made = table(None, "", "value", "95 %", "n", "how", right=("value", "n"))
    for metric in METRICS:
        f = value[metric]
        interval = "" if f["value"] is None else f"{percent(f['low'])} to {percent(f['high'])}"
        row(made, metric, percent(f["value"]), interval, f["n"] or "", f["protocol"] or f["reason"])
    out().print(made)
    if len(value["by_relation"]) > 1:
        numbers = ("edits", *METRICS[:3])
        by = table("By relation", "relation", *numbers, right=numbers)
        for name, figures in value["by_relation"].items():
            row(by, name, figures["n_edits"], *(percent(figures[m]) for m in METRICS[:3]))
        out().print(by)
    if failures:
        some = table(
            f"{min(10, len(failures))} of {len(failures)} that went wrong", "what", "prompt", "expected", "got"
        )
        for f in failures[:10]:
            row(some, f["kind"], f["prompt"], f["expected"], f["got"])
        out().print(some)
    pace = f", {value['seconds_fit_per_edit']:.2f} s per fit" if value["seconds_fit_per_edit"] is not None else ""
    together = "one at a time" if value["single"] else "at once"
    after = "restored bit for bit" if value["restored"] else "NOT restored"
    where = f"{value['model']}, {value['dtype']}, {value['threads']} threads, seed {value['seed']}"
    out().print(
        f"{value['n_edits']} edits {together} by {value['method']}{pace}; {where}; detached: {after}",
        soft_wrap=True,
    )
