"""`errata trace`: where does this model keep a fact?"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from itertools import product
from math import isnan
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
    bar,
    emit,
    is_atlas,
    load,
    notice,
    out,
    row,
    table,
    writable,
)
from errata.errors import ConfigError, RequestError

ATLAS_FACTS = 200
NOISE_TEXTS = 1000


class Kinds(StrEnum):
    """What is restored."""

    hidden = "hidden"
    mlp = "mlp"
    attention = "attention"
    all = "all"


class Severed(StrEnum):
    """What is kept corrupted at the restored token."""

    mlp = "mlp"
    attention = "attention"
    both = "both"


class Known(StrEnum):
    """When a model counts as knowing a fact."""

    first_token = "first_token"
    whole = "whole"
    any = "any"


def trace(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help='A prompt whose answer comes next, such as "The Space Needle is in".')
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", "-s", help="The subject, as the prompt spells it.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts", help="Averages over facts instead: JSONL or a JSON array of {prompt, subject, attribute?}."
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, help=f"At most so many facts (default: all of FILE, {ATLAS_FACTS} of Atlas's dev facts)."
        ),
    ] = None,
    kind: Annotated[Kinds, typer.Option("--kind", help="What is restored.")] = Kinds.hidden,
    window: Annotated[
        int | None, typer.Option(min=1, help="Layers restored at once, mlp and attention (default: 10 of 48, scaled).")
    ] = None,
    sever: Annotated[
        list[Severed] | None,
        typer.Option(help="Trace hidden states also with these kept corrupted at the restored token; repeatable."),
    ] = None,
    noise: Annotated[
        str, typer.Option(help="s3 (3 standard deviations of the subjects' embeddings), 0.1, u0.1, m or t4.")
    ] = "s3",
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Texts, one a line, on which the rules m and t are measured.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Noise instead of the embedding, not on top of it.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws per cell.")] = 10,
    answer: Annotated[str | None, typer.Option(help="Follow this answer (default: the model's own).")] = None,
    correct: Annotated[Known, typer.Option(help="Which facts with an attribute count as known.")] = Known.first_token,
    overlapping: Annotated[
        bool, typer.Option("--overlapping", help="A token may have two classes, as in the published averages.")
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="Keep each fact's trace here (JSONL); the same command goes on from it."),
    ] = None,
    out_path: Annotated[Path | None, typer.Option("--out", "-o", help="The figure: *.png, *.pdf or *.svg.")] = None,
    seed: Seed = 1,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Trace one fact through a model (tokens by layers), or average over many (token classes by layers).

    The subject's embeddings are corrupted; each cell is how far restoring one state, or the MLPs or attentions of a window
    of layers, brings the answer's probability back. Without PROMPT and --facts, Atlas is traced over its own dev facts.
    """
    from errata.locate.facts import KnownFact, read_facts
    from errata.locate.noise import noise_for, parse_rule

    if (prompt is None) != (subject is None):
        raise ConfigError("expected a prompt and its --subject, found only one of them; give both, or --facts")
    if prompt is not None and (facts or rows):
        raise ConfigError("expected one prompt or --facts (with --rows), found both; give one of them")
    if prompt is None and answer is not None:
        raise ConfigError("--answer belongs to one prompt; facts have their attribute")
    configs = _configs(kind, sever or [], window=window, samples=samples, replace=replace, seed=seed)
    law, _ = parse_rule(noise)
    _check_out(out_path)
    if rows:
        writable(rows)
    if prompt is not None:
        asked = [KnownFact(prompt, subject or "")]
    elif facts:
        asked = read_facts(facts)[:n]
    else:
        asked = atlas_facts(model, n or ATLAS_FACTS, seed)
    measured = _texts(texts, model) if law in ("moments", "student") else []
    loaded, tokenizer = load(model, dtype, device_map, threads)
    subjects = _atlas_subjects() if prompt is not None and is_atlas(model) else [fact.subject for fact in asked]
    drawn = noise_for(loaded, tokenizer, noise, subjects=subjects, texts=measured)
    about = {"model": model, "noise": drawn.json(), "replace": replace, "samples": samples, "seed": seed}
    started = time.perf_counter()
    if prompt is not None:
        value = about | _one(loaded, tokenizer, asked[0], drawn, configs, answer, out_path, json_output)
    else:
        kept = _kept(rows, loaded, tokenizer, drawn, correct)
        value = about | _many(
            loaded, tokenizer, asked, drawn, configs, kept, correct, overlapping, out_path, json_output
        )
    value |= {"seconds": round(time.perf_counter() - started, 3), "out": str(out_path) if out_path else None}
    if json_output:
        emit(value)
    elif out_path:
        out().print(f"figure: {out_path}", markup=False, soft_wrap=True)


def _configs(kind: Kinds, severed: Sequence[Severed], **fields: Any) -> list[Any]:
    from errata.locate.tracing import TracingConfig

    kinds = ["hidden", "mlp", "attention"] if kind is Kinds.all else [kind.value]
    if severed and "hidden" not in kinds:
        raise ConfigError(f"--sever is for hidden states, and --kind is {kind.value}; leave one of them out")
    both = {Severed.both: ("mlp", "attention")}
    plain: list[Any] = [TracingConfig(kind=k, **fields) for k in kinds]  # type: ignore[arg-type]
    return plain + [TracingConfig(sever=both.get(s, (s.value,)), **fields) for s in dict.fromkeys(severed)]  # type: ignore[arg-type]


def _check_out(path: Path | None) -> None:
    if path:
        from errata.locate.figures import format_of

        format_of(writable(path))


def _texts(path: Path | None, model: str) -> list[str]:
    """What the rules m and t are measured on: the file's lines, for Atlas by default its own unrelated texts."""
    if path:
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"expected UTF-8 texts, one a line, in {path}: {error}") from None
    if not is_atlas(model):
        raise ConfigError("the noise rules m and t are measured on texts; give --texts FILE, one text a line")
    from errata.atlas.probes import unrelated_texts
    from errata.atlas.world import load_world

    return unrelated_texts(load_world(), NOISE_TEXTS)


# -- Atlas's facts -------------------------------------------------------------------------------------------------------


def _atlas_subjects() -> list[str]:
    from errata.atlas.world import load_world

    return [fact.subject for fact in load_world().facts if fact.split == "dev"]


def atlas_facts(model: str, n: int, seed: int) -> list[Any]:
    """`n` dev facts in their first phrasing, spread evenly over the relations."""
    if not is_atlas(model):
        raise ConfigError(
            f"expected a prompt with --subject, or --facts: {model!r} has no facts of its own as Atlas has"
        )
    from errata.atlas.cases import known_facts

    return list(known_facts(n=n, seed=seed, split="dev"))


# -- one fact ------------------------------------------------------------------------------------------------------------


def _one(
    model: Any, tokenizer: Any, fact: Any, noise: Any, configs: Sequence[Any], answer: str | None, path: Path | None,
    silent: bool,
) -> dict[str, Any]:  # fmt: skip
    from errata.locate.tracing import trace as run

    traces = []
    with bar("tracing", len(configs)) as progress:
        for done, config in enumerate(configs, 1):
            traces.append(run(model, tokenizer, fact, noise, config, answer=answer))
            progress(done)
    if path:
        from errata.locate.figures import heat_map, save_figure

        save_figure(heat_map(traces), path)
    first = traces[0]
    if first.total_effect <= 0:
        notice(
            "the noise takes nothing from the answer's probability, so no effect can be traced; try a stronger --noise"
        )
    if not silent:
        _print_one(traces)
    return {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "tokens": list(first.tokens),
        "subject_tokens": [first.first, first.last],
        "answer": first.answer,
        "clean": first.clean,
        "corrupted": first.corrupted,
        "total_effect": first.total_effect,
        "traces": [
            {
                "kind": t.kind,
                "window": t.window,
                "sever": list(t.sever),
                "restored": t.restored.tolist(),
                "indirect_effects": t.indirect_effects.tolist(),
            }
            for t in traces
        ],
    }


def _print_one(traces: Sequence[Any]) -> None:
    from errata.locate.figures import labels

    first = traces[0]
    columns = [_name(t.kind, t.sever) for t in traces]
    made = table(None, "token", *columns, right=columns)
    for i, label in enumerate(labels(first)):
        cells = []
        for t in traces:
            best = int(t.indirect_effects[i].argmax())
            cells.append(f"{float(t.indirect_effects[i, best]):+.3f} at layer {best}" if i >= t.first else "")
        row(made, label, *cells)
    out().print(made)
    out().print(
        f"p({first.answer.strip()}): {first.clean:.3f} clean, {first.corrupted:.3f} corrupted (*), "
        f"total effect {first.total_effect:.3f}; the table has each token's largest indirect effect",
        markup=False,
        soft_wrap=True,
    )


def _name(kind: str, sever: Sequence[str]) -> str:
    return kind + (f", {' and '.join(sever)} severed" if sever else "")


# -- many facts ----------------------------------------------------------------------------------------------------------


def _many(
    model: Any, tokenizer: Any, facts: Sequence[Any], noise: Any, configs: Sequence[Any], kept: Any,
    correct: Known, overlapping: bool, path: Path | None, silent: bool,
) -> dict[str, Any]:  # fmt: skip
    from errata.locate.averages import average
    from errata.locate.tracing import Dropped, trace_facts

    outcomes: list[list[Any]] = [[] for _ in configs]
    if len(kept):
        notice(f"going on after {len(kept)} of {len(facts) * len(configs)} traces in the file of rows")
    try:
        with bar("tracing", len(facts) * len(configs)) as progress:
            for number, (fact, (i, config)) in enumerate(product(facts, enumerate(configs)), 1):
                found = kept.get(config, fact)
                if found is None:
                    [found] = trace_facts(model, tokenizer, [fact], noise, config, correct=correct.value)
                    kept.add(config, fact, found)
                outcomes[i].append(found)
                progress(number)
    finally:
        kept.keep()
    dropped = [o for o in outcomes[0] if isinstance(o, Dropped)]
    if len(dropped) == len(facts):
        why = dropped[0]
        raise RequestError(
            f"none of the {len(facts)} facts can be traced; the first, {why.fact.prompt!r}: {why.reason}"
        )
    if dropped:
        notice(f"{len(dropped)} of {len(facts)} facts dropped, such as {dropped[0].fact.prompt!r}: {dropped[0].reason}")
    averages = [
        average([o for o in found if not isinstance(o, Dropped)], overlapping=overlapping) for found in outcomes
    ]
    if path:
        from errata.locate.figures import average_figure, save_figure

        save_figure(average_figure(averages), path)
    if not silent:
        _print_many(averages)
    return {
        "n_facts": len(facts),
        "n_traced": len(facts) - len(dropped),
        "correct": correct.value,
        "overlapping": overlapping,
        "dropped": [asdict(d.fact) | {"reason": d.reason} for d in dropped],
        "averages": [a.json() for a in averages],
    }


def _kept(path: Path | None, model: Any, tokenizer: Any, noise: Any, correct: Known) -> Any:
    """What the file of rows has, for this model, noise and rule."""
    from errata.locate.rows import TraceRows
    from errata.model.fingerprint import base_of

    base = base_of(model, tokenizer) | {"dtype": str(model.dtype)} if path else {}
    return TraceRows(path, {"base": base, "noise": noise.json(), "correct": correct.value})


def _print_many(averages: Sequence[Any]) -> None:
    from errata.locate.averages import CLASSES

    columns = [_name(a.kind, a.sever) for a in averages]
    made = table(
        "Average indirect effect where it is largest, with its 95 % band", "token", "facts", *columns, right=columns
    )
    for name in CLASSES:
        effects = [a.effects.get(name) for a in averages]
        row(made, name, effects[0].n if effects[0] else 0, *map(_best, effects))
    out().print(made)
    a = averages[0]
    total = _banded(float(a.total_effect.mean), float(a.total_effect.half))
    text = (
        f"{a.n} facts: p {float(a.clean.mean):.3f} clean, {float(a.corrupted.mean):.3f} corrupted, total effect {total}"
    )
    out().print(text, markup=False, soft_wrap=True)


def _best(effect: Any) -> str:
    """A class's largest effect over the layers."""
    if effect is None:
        return "-"
    layer = int(effect.mean.argmax())
    return f"{_banded(float(effect.mean[layer]), float(effect.half[layer]))}, layer {layer}"


def _banded(value: float, half: float) -> str:
    return f"{value:+.3f}" + ("" if isnan(half) else f" ± {half:.3f}")
