"""What presets share: the methods under their labels, where cases come from, and how figures are drawn of rows."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

from errata.bench.cases import Case, Probe
from errata.bench.methods import MODEL, is_atlas
from errata.bench.preset import Context, Method
from errata.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from errata.bench.data.records import Problem
    from errata.bench.figures import Point, Series
    from errata.bench.intervals import Rate
    from errata.bench.queries import Metric
    from errata.bench.tables import Table

T = TypeVar("T")
UNEDITED = "unedited"

FEW = 30  # of Atlas's cases, for methods that stand beside ours for comparison and cost several times as much
MORE = 50
# SAKE with all edits loaded and the gate deciding among them; `alone`: the papers' protocol, each edit by itself.
SAKE = Method("sake", "sake", "all", MODEL)
SAKE_ALONE = Method("sake-alone", "sake", "single", MODEL)
SAKE_OPEN = Method(
    "sake-open", "sake", "single", changes={"radius": 1e6, "reach": None}, most=MORE
)  # for protocols that look through it
# The paper's and the code's plain settings. Their gate is a sentence encoder that a hub has to provide; these stand behind the
# model's own gate instead, and notes under the tables say so.
OWN_GATE: Mapping[str, Any] = {"gate": "auto", "radius": None}
# On CounterFact, where nothing follows from an edit, the two differ by the encoder's threshold alone: one fit.
SAKE_PUBLISHED = Method("sake-published", "sake", "single", "paper-gpt2-xl-counterfact", OWN_GATE, most=FEW)
SAKE_PAPER_POPULAR = Method("sake-paper", "sake", "single", "paper-gpt2-xl-popular", OWN_GATE, most=FEW)
SAKE_CODE_POPULAR = Method("sake-code", "sake", "single", "code-popular", OWN_GATE, most=FEW)
UNIFORM = Method("uniform", "uniform", "single", MODEL)
ACTADD = Method("actadd", "actadd", "single")
ICL = Method("icl", "icl", "single")
# "model": as it was chosen for the model, where it was. Published settings of weight editors stand beside them.
ROME = Method("rome", "rome", "single", MODEL)
ROME_PUBLISHED = Method("rome-published", "rome", "single", "published", most=FEW)
MEMIT = Method("memit", "memit", "all", MODEL)
COMPMEMIT = Method("compmemit", "compmemit", "all", MODEL)
GATE_NOTE = (
    "sake-published has the plain settings of the paper and of the released code behind this model's own gate: theirs is a "
    "sentence encoder, which a hub has to provide. Without implications they differ by its threshold alone (6.75 and 6.5)."
)
PROTOCOL_NOTE = (
    "sake: all edits loaded, and the gate decides among them. memit, compmemit: all edits in one write. Others: each edit "
    "alone. Settings that cost several times as much get the first of Atlas's edits only; their cells say how many."
)

DRAWDOWN_NOTE = "drawdown: nats per token that unrelated running texts lose in probability, less is better."


def draw(
    context: Context,
    n: int,
    *,
    atlas: str = "atlas-counterfact",
    published: str = "counterfact",
    published_n: int | None = None,
    old_objects: bool = True,
    references: bool = False,
    **atlas_options: str,
) -> list[Case]:
    """The context's cases: of the data set that it names, else Atlas's for Atlas, and the paper's for any other model.

    The number is the context's, else `n` for Atlas's data and `published_n` for others (None: all that there are).
    old_objects: whether the model's own answer stands in where an edit names no old object. references: whether cases need texts
    for consistency, which are read of a large file (Atlas's have them anyway). atlas_options: of Atlas's data set
    alone; the context's own options go before them. What is left out of the data is added to the context.
    """
    from errata.bench.data.registry import load_cases
    from errata.bench.makers import with_old_objects

    name = context.data or (atlas if is_atlas(context.model_name) else published)
    number = context.n if context.n is not None else n if name.startswith("atlas") else published_n
    options: dict[str, Any] = {**(atlas_options if name == atlas else {}), **context.data_options}
    left_out: list[Problem] = []
    common: dict[str, Any] = {"seed": context.seed, "split": context.split, "left_out": left_out}
    cases = load_cases(name, n=number, references=references, **common, **options)
    tell(context, name, left_out)
    return with_old_objects(context.model, context.tokenizer, cases) if old_objects else cases


def tell(context: Context, name: str, left_out: Iterable["Problem"]) -> None:
    """Add what was left out of a data set to the context."""
    context.left_out.update({replace(problem, path=name).where: problem.message for problem in left_out})


def only_bad(context: Context) -> dict[str, Any]:
    """The context's data options, for what reads records itself and has `bad` alone. Raises ConfigError for any other."""
    if others := [name for name in context.data_options if name != "bad"]:
        raise ConfigError(f"this preset's data have no option {others[0]!r}; they have: bad")
    return dict(context.data_options)


def spans(items: Sequence[Any], size: int) -> dict[str, Sequence[Any]]:
    """Runs of items, by names for parts of a run: "0000", "0010", ..."""
    return {f"{start:04}": items[start : start + size] for start in range(0, len(items), size)}


def only(cases: Iterable[Case], *kinds: str, most: Mapping[str, int] | None = None) -> list[Case]:
    """The cases with probes of these kinds alone; `most`: at most so many of a kind in a case."""
    found = []
    for case in cases:
        count: dict[str, int] = {}
        kept: list[Probe] = []
        for probe in case.probes:
            count[probe.kind] = count.get(probe.kind, 0) + 1
            if probe.kind in kinds and count[probe.kind] <= (most or {}).get(probe.kind, count[probe.kind]):
                kept.append(probe)
        found.append(replace(case, probes=tuple(kept)))
    return found


def unrelated(context: Context) -> list[Probe]:
    """Running texts that state no fact of any data set; none for a model that does not go on with a text."""
    from errata.bench.makers import stock_texts
    from errata.model.anatomy import anatomy

    if anatomy(context.model).role != "decoder":
        return []
    return [Probe("unrelated", text) for text in stock_texts()]


def in_turn(probes: Sequence[Probe], place: int, each: int) -> list[Probe]:
    """`each` of the probes for the case at this place, those behind what the case before it has, round and round."""
    return [probes[(place * each + i) % len(probes)] for i in range(min(each, len(probes)))]


def kept(function: Callable[..., T]) -> Callable[..., T]:
    """The function of a run's rows, whose last value is kept while these very rows are there: tables and figures ask for the same."""
    last: list[tuple[ref[Any], tuple[Any, ...], T]] = []

    @wraps(function)
    def found(rows: "DataFrame", *rest: Any) -> T:
        if not (last and last[0][0]() is rows and last[0][1] == rest):
            last[:] = [(ref(rows), rest, function(rows, *rest))]
        return last[0][2]

    return found


def labels(rows: "DataFrame") -> list[str]:
    """The run's methods, the unedited model first, in the order of the run."""
    found = list(dict.fromkeys(rows["method"]))
    return sorted(found, key=lambda name: name != UNEDITED)


def point(x: float, rate: "Rate") -> "Point":
    """A rate as a point of a curve."""
    from errata.bench.figures import Point

    return Point(x, rate.value, rate.low, rate.high)


def by_length(
    rows: "DataFrame", metric: "str | Metric", method: str, tag: str, style: str = "", label: str = ""
) -> "Series":
    """A metric of one method over a tag whose values are numbers."""
    from errata.bench.figures import Series
    from errata.bench.metrics import by_tag

    found = by_tag(rows, metric, method, tag)
    points = sorted((float(value), rate) for value, rate in found.items())
    return Series(label or method, tuple(point(x, rate) for x, rate in points), style or method)


def tagged(rows: "DataFrame", **tags: str) -> "DataFrame":
    """The rows whose tags have these values; a probe without such a tag is left out."""
    return rows[[all(found.get(name) == value for name, value in tags.items()) for found in rows["tags"]]]


def tagged_or_untagged(rows: "DataFrame", **tags: str) -> "DataFrame":
    """The rows whose tags have these values, and those without such tags."""
    return rows[[all(found.get(name, value) == value for name, value in tags.items()) for found in rows["tags"]]]


def gated(rows: "DataFrame") -> list[str]:
    """The methods that have gates."""
    return [label for label in labels(rows) if rows.loc[rows["method"] == label, "gate"].notna().any()]


def tag_values(rows: "DataFrame", tag: str) -> list[str]:
    """The values of a tag, in the order of the rows."""
    return list(dict.fromkeys(found[tag] for found in rows["tags"] if tag in found))


def cost_table(run: Path) -> "Table":
    """Seconds and bytes of an edit, and tokens per second with the edits in."""
    from errata.bench.rows import read_fits
    from errata.bench.tables import speed_table

    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return speed_table(read_fits(run), summary)


def picture(run: Path, name: str, figure: "Figure") -> Path:
    """The figure as a PNG file of the run."""
    from errata.locate.figures import save_figure

    path = run / "figures" / f"{name}.png"
    save_figure(figure, path)
    return path


def rates(
    rows: "DataFrame", metrics: Mapping[str, str], methods: Sequence[str] | None = None
) -> dict[str, dict[str, "Rate"]]:
    """method -> column -> figure, without those that there are none of."""
    from errata.bench.metrics import score

    found: dict[str, dict[str, Rate]] = {}
    for method in methods or labels(rows):
        own = {column: score(rows, metric, method) for column, metric in metrics.items()}
        found[method] = {column: rate for column, rate in own.items() if rate is not None}
    return found


def dot_figure(rows: "DataFrame", run: Path, name: str, metrics: Mapping[str, str]) -> Path:
    """A table's shares as dots with their intervals."""
    from errata.bench.figures import dots

    found = rates(rows, metrics)
    values = {m: {c: (r.value, r.low, r.high) for c, r in own.items()} for m, own in found.items() if own}
    columns = [c for c in metrics if any(c in own for own in values.values())]
    return picture(run, name, dots(values, columns))
