"""ROME's causal tracing: average indirect effects of hidden states, MLPs and attentions (Meng et al. 2022, section 2)."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.presets import _common as common
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 50, 1000
KINDS = ("hidden", "mlp", "attention")
SPAN = 10  # facts of a part


def cases(context: Context) -> Sequence[Case]:
    """None: nothing is edited."""
    return ()


def traces(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """The facts traced, a kind and a few facts at a time; of all `trace.json` (averages with their bands) and two figures."""
    from errata.bench.data.records import Problem
    from errata.bench.data.registry import load_facts
    from errata.locate.averages import average
    from errata.locate.figures import average_figure, heat_map, save_figure
    from errata.locate.noise import noise_for
    from errata.locate.tracing import Trace, TracingConfig, trace_facts

    own = common.is_atlas(context.model_name)
    name = context.data or ("atlas-known" if own else "known-1000")
    number = context.n if context.n is not None else N if name.startswith("atlas") else PUBLISHED_N
    left_out: list[Problem] = []
    options = common.only_bad(context)
    facts = load_facts(name, n=number, seed=context.seed, split=context.split, left_out=left_out, **options)
    common.tell(context, name, left_out)
    noise = noise_for(context.model, context.tokenizer, "s3", subjects=[fact.subject for fact in facts])
    spans = common.spans(facts, SPAN)

    def part(kind: Any, span: str) -> list[Any]:
        """Traces in order, None for a fact that the model does not know."""
        found = trace_facts(context.model, context.tokenizer, spans[span], noise, TracingConfig(kind=kind))
        return [trace.json() if isinstance(trace, Trace) else None for trace in found]

    def combine(made: Mapping[str, Any], run: Path) -> None:
        of_kind = {kind: [one for span in spans for one in made[f"{kind}-{span}"]] for kind in KINDS}
        kept = {kind: [Trace.of(one) for one in own if one is not None] for kind, own in of_kind.items()}
        averages = [average(own) for own in kept.values()]
        about = {
            "facts": len(facts),
            "dropped": of_kind[KINDS[-1]].count(None),
            "noise": noise.json(),
            "averages": [a.json() for a in averages],
        }
        save_figure(average_figure(averages), run / "figures" / "rome-trace.png")
        save_figure(heat_map([own[0] for own in kept.values()]), run / "figures" / "rome-trace-one.png")
        write_atomically(run / "trace.json", json.dumps(about, indent=1) + "\n")

    return Extra({f"{kind}-{span}": partial(part, kind, span) for kind in KINDS for span in spans}, combine)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """Total effect, and for each kind the peak of the average indirect effect and the last subject token's own."""
    from errata.bench.intervals import Rate
    from errata.bench.published import PUBLISHED, SOURCES
    from errata.bench.tables import Table

    about = _about(run)
    if not about:
        return []
    effects = []
    # The papers' peaks are those of the early site; at the last token of the last layer everything comes back by itself.
    at_subject = {f"{kind}, peak": f"{kind}, last subject token" for kind in ("hidden state", "MLP")}
    published = {
        model: {at_subject.get(label, label): values for label, values in own.items()}
        for model, own in PUBLISHED["rome-trace"].items()
    }

    def rate(mean: dict[str, Any], at: int | None, what: str) -> Rate:
        value, low, high = (mean[k] if at is None else mean[k][at] for k in ("mean", "low", "high"))
        return Rate(value, low, high, mean["n"], what, "1.96 standard errors over facts", unit="difference")

    words = "probability that putting one state (or a window of outputs) back gives; mean over facts"
    names = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
    for one in about["averages"]:
        peak, own = one["peak"], one["indirect_effects"]
        effects.append(
            [
                f"{names[one['kind']]}, peak",
                peak["class"],
                peak["layer"],
                rate(own[peak["class"]], peak["layer"], words),
            ]
        )
        last = own["last subject"]
        layer = max(range(len(last["mean"])), key=lambda i: last["mean"][i])
        effects.append([f"{names[one['kind']]}, last subject token", "last subject", layer, rate(last, layer, words)])
    total = about["averages"][0]["total_effect"]
    effects.append(
        ["total effect", "", None, rate(total, None, "clean minus corrupted probability of the answer's first token")]
    )
    note = (
        f"{about['averages'][0]['n']} of {about['facts']} facts that the model knows; noise of three standard deviations of the "
        f"subjects' embeddings.\nPublished: {SOURCES['rome-trace']}."
    )
    return [
        Table("Average indirect effects", ["what is put back", "at token", "layer", "AIE"], effects, note, published)
    ]


def figures(rows: "DataFrame", run: Path) -> Sequence[tuple[Path, str]]:
    """The averages, and one fact's heat maps."""
    about = _about(run)
    found = [
        ("rome-trace", "Average indirect effects by class of token and layer, with 95 % bands."),
        (
            "rome-trace-one",
            "One fact: probability of its answer with one cell put back; stars mark the corrupted subject.",
        ),
    ]
    return [(run / "figures" / f"{name}.png", caption) for name, caption in found if about]


def _about(run: Path) -> dict[str, Any]:
    path = run / "trace.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


PRESET = Preset(
    "rome-trace",
    "ROME's causal tracing",
    "Meng et al. 2022, figures of average indirect effects",
    cases,
    (),
    tables,
    n=N,
    published_n=PUBLISHED_N,
    extra=traces,
    figures=figures,
)
