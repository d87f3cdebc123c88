"""`errata tune`: layers and strengths for a model that no paper edits, chosen by tracing and a dev set."""

import json
import random
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    DeviceMap,
    Dtype,
    Json,
    Model,
    Seed,
    Settings,
    Threads,
    atlas_requests,
    bar,
    emit,
    load,
    notice,
    out,
    percent,
    row,
    table,
    writable,
)
from errata.cli.fit import make_editor
from errata.edit import EditRequest, read_requests
from errata.errors import ConfigError, UnstableWriteError
from errata.files import write_atomically

EDITS = 40
EPS = (
    0.002  # of a norm-constrained fine-tuning that names none: the published bound of the smallest model, to begin with
)
PARAPHRASES = 4  # of Atlas's, asked per edit: enough to rank trials
# Multiples of the defaults that are tried.
FACTORS: dict[str, dict[str, Any]] = {
    "rome": {"clamp": (0.5, 2.0), "norm": (0.1, 10.0), "kl": (0.25, 4.0)},
    "memit": {"s0": (0.1, 0.3, 3.0, 10.0), "clamp": (0.5, 2.0), "norm": (0.1, 10.0)},
    "ft": {"eps": (2.0, 4.0, 8.0), "lr": (2.0, 4.0), "steps": (2,)},
}


class Tuned(StrEnum):
    """Methods whose layers and strengths can be chosen."""

    rome = "rome"
    memit = "memit"
    ft = "ft"


def tune(
    model: Model,
    method: Annotated[Tuned, typer.Option("--method", help="What is tuned.")] = Tuned.rome,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="Dev edits that carry probes (default for Atlas: edits of its dev facts)."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="At most so many of them.")] = EDITS,
    settings: Settings = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write what was chosen, for `errata fit --config`.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Choose a method's layers and strengths for a model, and say why.

    The facts of the dev edits are traced: where restoring MLPs at the subject's last token brings the old answer back. Layers
    around that peak, then one strength after another, are tried on the edits and compared by the harmonic mean of efficacy,
    generalization and neighbours: edits of ROME and of fine-tuning one at a time, MEMIT's all at once. Options given with --set
    hold in every trial (norm=linf eps=0.002: fine-tuning within a norm, from that bound on). Use edits that you will not
    report figures on.
    """
    from errata.locate.choice import around, choose, layers_near, peak_of, spans_near, trials_in

    given = _named(settings)
    if method is Tuned.ft and "norm=linf" in (settings or ()) and "eps" not in given:
        settings = [*(settings or ()), f"eps={EPS}"]
    fixed = make_editor(method.value, None, settings)
    asked = _dev_edits(model, requests, n, seed)
    fixed.check(asked)
    if out_path:
        writable(out_path)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    fixed.check(asked, loaded, tokenizer)
    started = time.perf_counter()
    peak, n_layers = peak_of(_traced(loaded, tokenizer, asked, seed)), _depth(loaded)
    if method is Tuned.rome:
        layers: list[dict[str, Any]] = [{"layer": layer} for layer in layers_near(peak.layer, n_layers)]
    elif method is Tuned.ft:
        layers = [{"layers": (layer,)} for layer in layers_near(peak.layer, n_layers)]
    else:
        layers = [{"layers": span} for span in spans_near(peak.layer, n_layers)]
    factors = {name: by for name, by in FACTORS[method.value].items() if name not in given and "lam" not in given}
    defaults = {name: getattr(fixed.config, name) for name in factors}
    strengths = around(defaults, factors)
    judge = _judge(loaded, tokenizer, fixed, asked, seed)
    with bar(f"trying {method.value}", trials_in(layers, strengths)) as progress:
        choice = choose(layers, strengths, defaults, judge, done=progress)
    options = {name: _plain(getattr(fixed.config, name)) for name in _named(settings)}
    options |= {name: _plain(value) for name, value in choice.best.options.items()}
    reasons = [
        f"layer {peak.layer}: restoring the MLPs of {peak.window} layers around it at the subject's last token brings back most, "
        f"{peak.effect:+.3f} ± {peak.half:.3f} of the old answer's probability ({peak.n} facts)",
        *choice.reasons,
    ]
    value = {
        "method": method.value,
        "options": options,
        "model": model,
        "reasons": reasons,
        "judged": _figures(choice.best.judged),
        "traced": {"peak": peak.layer, "window": peak.window, "n": peak.n, "effects": list(peak.effects)},
        "trials": [
            {"varied": t.varied, "options": {k: _plain(v) for k, v in t.options.items()}, **_figures(t.judged)}
            for t in choice.trials
        ],
        "n_edits": len(asked),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "out": str(out_path) if out_path else None,
    }
    if out_path:
        write_atomically(out_path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    if json_output:
        emit(value)
        return
    _print(value, choice)


def _named(settings: Sequence[str] | None) -> dict[str, None]:
    """Names that NAME=VALUE settings give, in order."""
    return {pair.partition("=")[0].strip(): None for pair in settings or ()}


def _print(value: dict[str, Any], choice: Any) -> None:
    numbers = ("efficacy", "generalization", "neighbours", "S")
    made = table(f"{value['method']}, {value['n_edits']} dev edits", "varied", "options", *numbers, right=numbers)
    for trial in choice.trials:
        said = ", ".join(f"{name}={_short(v)}" for name, v in trial.options.items())
        j = trial.judged
        cells = (percent(j.efficacy), percent(j.generalization), percent(j.neighbours), f"{j.score:.3f}")
        row(made, trial.varied, said + (" (chosen)" if trial is choice.best else ""), *cells)
        if j.note:
            notice(f"{said}: {j.note}")
    out().print(made)
    for reason in value["reasons"]:
        out().print(f"- {reason}", markup=False, soft_wrap=True)
    sets = " ".join(f"--set {name}={_short(v)}" for name, v in value["options"].items())
    how = f"--config {value['out']}" if value["out"] else sets
    out().print(f"errata fit REQUESTS --method {value['method']} {how} ...", markup=False, soft_wrap=True)


def _short(value: Any) -> str:
    return json.dumps(list(value)).replace(" ", "") if isinstance(value, (list, tuple)) else f"{value}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _figures(judged: Any) -> dict[str, Any]:
    figures = {name: getattr(judged, name) for name in ("efficacy", "generalization", "neighbours")}
    return figures | {"S": round(judged.score, 4), **({"note": judged.note} if judged.note else {})}


# -- what is tried on what -----------------------------------------------------------------------------------------------


def _dev_edits(model: str, path: Path | None, n: int, seed: int) -> list[EditRequest]:
    if path:
        found = read_requests(path)[:n]
        for kind in ("paraphrase_prompts", "neighborhood_prompts"):
            if not any(getattr(request, kind) for request in found):
                notice(f"no request in {path} has {kind}, so the choice cannot mind them; add some")
        return found
    rng = random.Random(seed)
    return [
        request.model_copy(
            update={
                "paraphrase_prompts": tuple(
                    rng.sample(request.paraphrase_prompts, min(PARAPHRASES, len(request.paraphrase_prompts)))
                )
            }
        )
        for request in atlas_requests(model, n, seed, "dev", probes=True)
    ]


def _depth(model: Any) -> int:
    from errata.model.anatomy import anatomy

    return anatomy(model).n_layers


def _traced(model: Any, tokenizer: Any, requests: Sequence[EditRequest], seed: int) -> Any:
    """Average effects of MLPs over the facts that the requests edit and the model knows."""
    from errata.locate.averages import average
    from errata.locate.facts import KnownFact
    from errata.locate.noise import noise_for
    from errata.locate.tracing import Dropped, TracingConfig, trace_facts

    facts = [KnownFact(r.text, r.subject or "", r.target_true) for r in requests]
    noise = noise_for(model, tokenizer, "s3", subjects=[fact.subject for fact in facts], texts=[])
    found: list[Any] = []
    with bar("tracing", len(facts)) as progress:
        for number, fact in enumerate(facts, 1):
            found += trace_facts(model, tokenizer, [fact], noise, TracingConfig(kind="mlp", seed=seed + 1))
            progress(number)
    traced = [outcome for outcome in found if not isinstance(outcome, Dropped)]
    if not traced:
        raise ConfigError(
            f"the model knows none of the {len(facts)} facts that the requests edit, so there is nothing to trace (the first: "
            f"{found[0].reason}); give edits of facts that it knows, with their target_true"
        )
    return average(traced)


def _judge(model: Any, tokenizer: Any, editor: Any, requests: Sequence[EditRequest], seed: int) -> Any:
    """A function from options to how the edits fare with them."""
    from errata.bench.trials import ask_unedited, averaged, judge
    from errata.locate.choice import Judged

    asked = ask_unedited(model, tokenizer, requests)

    def tried(options: dict[str, Any]) -> Judged:
        made = type(editor)(editor.config, **options)
        try:
            if editor.method == "ft":  # each edit with weights of its own
                each = [(r, made.fit(model, tokenizer, [r], seed=seed)) for r in requests]
                found = averaged(judge(model, tokenizer, p, asked.of(r.id), single=False) for r, p in each)
            else:
                patch = made.fit(model, tokenizer, requests, seed=seed)
                found = judge(model, tokenizer, patch, asked, single=not editor.joint)
        except UnstableWriteError as error:
            return Judged(0.0, None, None, len(requests), str(error))
        return Judged(found["efficacy"] or 0.0, found["generalization"], found["specificity"], len(requests))

    return tried
