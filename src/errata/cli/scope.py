"""`errata calibrate`: choose a gate and its radius on data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    DeviceMap,
    Dtype,
    Json,
    Model,
    Seed,
    Threads,
    emit,
    err,
    is_atlas,
    load,
    out,
    percent,
    row,
    table,
    writable,
)
from errata.edit import EditRequest, read_requests
from errata.errors import ConfigError

OTHER_TEXTS = 1_000_000  # added to the seed: `verify` judges locality on texts that no gate was calibrated on


def calibrate(
    model: Model,
    out_path: Annotated[Path, typer.Option("--out", "-o", help="The gate file to write; use it by --set gate=FILE.")],
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="Facts with fit_prompts, at least 12 (atlas has its own dev facts)."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=12, help="Use so many of Atlas's dev facts (default: all).")
    ] = None,
    target: Annotated[
        float, typer.Option("--false-positive-rate", min=0.0, max=1.0, help="Share of hard negatives let in.")
    ] = 0.01,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="Calibrate a sentence encoder of this name instead of the model's activations."),
    ] = None,
    unrelated: Annotated[int, typer.Option(min=0, help="Unrelated texts that must all stay outside.")] = 500,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Try gates on held-out prompts and write the one that lets most of them in at the allowed false-positive rate.

    Named errata-scope.safetensors in a model's directory, the file becomes that model's default gate.
    """
    from errata.atlas.probes import context_pieces, scope_examples, unrelated_texts
    from errata.atlas.world import load_world
    from errata.scope import calibrate as calibration
    from errata.scope.gate import save_gate

    if requests is None and not is_atlas(model):
        raise ConfigError(f"Atlas's dev facts calibrate Atlas only, and the model is {model!r}; give --requests")
    writable(out_path)
    examples = (
        [example_of(r) for r in read_requests(requests)] if requests else scope_examples(load_world(), "dev", n, seed)
    )
    texts = unrelated_texts(load_world(), unrelated, seed + OTHER_TEXTS) if unrelated else []
    contexts = (
        context_pieces(load_world(), "fit", seed=seed) if is_atlas(model) else {"filler": [f"{t} " for t in texts]}
    )
    loaded, tokenizer = load(model, dtype, device_map, threads)
    with err().status("calibrating") as status:
        outcomes = calibration.calibrate(
            loaded,
            tokenizer,
            examples,
            texts,
            contexts=None if encoder else contexts,
            candidates=calibration.encoder_candidates(encoder) if encoder else None,
            target_false_positive_rate=target,
            seed=seed,
            progress=lambda text: status.update(f"calibrating: {text}"),
        )
    save_gate(outcomes[0].gate, out_path, loaded, tokenizer)
    candidates = [_candidate(outcome) for outcome in outcomes]
    best = candidates[0]
    why = (
        f"of {len(candidates)} gates the one that lets most held-out prompts in ({percent(best['in_scope_rate'])}) "
        f"at a false-positive rate of at most {target:.2%}"
    )
    if json_output:
        counts = {"n_examples": len(examples), "target_false_positive_rate": target, "seed": seed}
        emit({"model": model, "out": str(out_path), **counts, "chosen": best, "why": why, "candidates": candidates})
        return
    numbers = ("in scope", "false positives", "unrelated", "radius")
    made = table(
        "Gates, best first",
        "encoder" if encoder else "layers",
        "pooling",
        "distance",
        "projected",
        *numbers,
        right=numbers,
    )
    for c in candidates:
        layers = c["encoder"] or ", ".join(map(str, c["layers"]))
        projected = "yes" if c["projected"] else "no"
        rates = [percent(c[f"{name}_rate"]) for name in ("in_scope", "false_positive", "unrelated")]
        row(made, layers, c["pooling"], c["distance"], projected, *rates, f"{c['radius']:.4g}")
    out().print(made)
    out().print(f"chosen: {why}; written to {out_path}", markup=False, soft_wrap=True)


def example_of(request: EditRequest) -> Any:
    """A request's prompts for calibration: every third `fit_prompt` is held out; what judges the edit is not touched."""
    from errata.scope.calibrate import ScopeExample

    prompts = list(dict.fromkeys((request.text, *request.fit_prompts)))
    return ScopeExample(
        fit=tuple(p for i, p in enumerate(prompts) if i % 3 != 2),
        held_out=tuple(p for i, p in enumerate(prompts) if i % 3 == 2),
        answer=request.target_true or request.target_new,
    )


def _candidate(outcome: Any) -> dict[str, Any]:
    gate = outcome.gate
    return {
        "layers": list(gate.layers),
        "encoder": gate.encoder,
        "pooling": gate.pooling,
        "distance": gate.distance,
        "projected": gate.projection is not None,
        "radius": gate.radius,
        "in_scope_rate": outcome.in_scope_rate,
        "false_positive_rate": outcome.false_positive_rate,
        "unrelated_rate": outcome.unrelated_rate,
        "n_in_scope": outcome.n_in_scope,
        "n_out_of_scope": outcome.n_out_of_scope,
        "n_unrelated": outcome.n_unrelated,
        "radius_at_false_positive_rate": outcome.radii,
    }
