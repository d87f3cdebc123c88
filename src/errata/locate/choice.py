"""Layers and strengths for a model, from causal tracing and from trials on a dev set.

Source: Meng et al. 2022 put ROME where restoring MLPs at the subject's last token has its largest average indirect effect,
Meng et al. 2023 let MEMIT's layers end there. Where a fact is traced need not be where an edit works best (Hase et al.
2023), so the peak only says where to look: layers around it are tried, and a dev set judges. Trials are compared by ROME's
S, the harmonic mean of efficacy, generalization and neighbours; what is gained must exceed a margin, or the default (or the
layer nearest to the peak) stays, because small dev sets rank at random what is nearly equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.errors import RequestError
from errata.locate.averages import Averages

MARGIN = 0.01  # of S
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Peak:
    """Where MLPs at the subject's last token matter most: layer (the window's centre), its AIE and half its 95 % band.

    effects: the AIE by layer; window: layers restored at once; n: facts.
    """

    layer: int
    effect: float
    half: float
    effects: tuple[float, ...]
    window: int
    n: int


def peak_of(averages: Averages) -> Peak:
    """The peak of the averages of MLP traces. The last layer does not count: what it writes at a subject is never read again.

    Raises RequestError for traces of another kind, of subjects that are never traced, or of a model of one layer.
    """
    last = averages.effects.get("last subject")
    if averages.kind != "mlp" or last is None or averages.n_layers < 2:
        raise RequestError(
            f"expected MLP traces at the subject's last token in a model of two layers or more, found traces of "
            f"{averages.kind} in {averages.n_layers} layers; trace with kind 'mlp'."
        )
    layer = int(last.mean[:-1].argmax())
    effects = tuple(float(effect) for effect in last.mean)
    return Peak(layer, effects[layer], float(last.half[layer]), effects, averages.window, last.n)


def layers_near(peak: int, n_layers: int, reach: int | None = None) -> tuple[int, ...]:
    """Layers at most `reach` from the peak (default: an eighth of the depth, at least 2), the nearest first; never the last."""
    reach = max(2, round(n_layers / 8)) if reach is None else reach
    near = [layer for layer in range(n_layers - 1) if abs(layer - peak) <= reach]
    return tuple(sorted(near, key=lambda layer: (abs(layer - peak), layer)))


def spans_near(peak: int, n_layers: int) -> tuple[tuple[int, ...], ...]:
    """Runs of layers for MEMIT: a tenth of the depth (2 at least) that ends near the peak; at the peak, also one more or less."""
    own = max(2, round(n_layers / 10))
    ends = [(last, own) for last in layers_near(peak, n_layers)] + [(peak, own - 1), (peak, own + 1)]
    return tuple(dict.fromkeys(tuple(range(max(0, last + 1 - n), last + 1)) for last, n in ends))


@dataclass(frozen=True)
class Judged:
    """What a dev set says of one trial: shares in [0, 1], None where there are no probes; n: edits; note: what went wrong."""

    efficacy: float
    generalization: float | None
    neighbours: float | None
    n: int
    note: str = ""

    @property
    def score(self) -> float:
        """S, the harmonic mean of what was judged (Meng et al. 2022)."""
        known = [x for x in (self.efficacy, self.generalization, self.neighbours) if x is not None]
        return len(known) / sum(1 / x for x in known) if all(known) else 0.0


@dataclass(frozen=True)
class Trial:
    """What was varied ("layers" or an option's name), the options that were tried, and how they did."""

    varied: str
    options: Options
    judged: Judged


@dataclass(frozen=True)
class Choice:
    """The chosen options, all trials in order, and one reason per decision."""

    best: Trial
    trials: tuple[Trial, ...]
    reasons: tuple[str, ...]


def choose(
    layers: Sequence[Options],
    strengths: Mapping[str, Sequence[Any]],
    defaults: Options,
    judge: Callable[[Options], Judged],
    margin: float = MARGIN,
    done: Callable[[int], None] = lambda _: None,
) -> Choice:
    """The layers first, at the default strengths; then one strength after another, at the best of what came before.

    layers: options that name layers, the preferred first; strengths: values to try beside the default, by option;
    defaults: of those options. done is called with the number of trials made, of `trials_in(layers, strengths)`.
    """
    trials: list[Trial] = []

    def tried(varied: str, options: Options) -> Trial:
        trials.append(Trial(varied, options, judge(options)))
        done(len(trials))
        return trials[-1]

    first = [tried("layers", options) for options in layers]
    top = max(trial.judged.score for trial in first)
    best = next(trial for trial in first if trial.judged.score >= top - margin)
    reasons = [
        f"{_said(best.options)}: S {best.judged.score:.3f}, the nearest to the traced peak of those within {margin:g} of the "
        f"best ({top:.3f})"
    ]
    for name, values in strengths.items():
        others = [tried(name, {**best.options, name: value}) for value in values]
        rival = max(others, key=lambda trial: trial.judged.score)
        gain = rival.judged.score - best.judged.score
        if gain > margin:
            best = rival
            reasons.append(f"{name}={rival.options[name]:g}: S {rival.judged.score:.3f}, {gain:+.3f} over the default")
        else:
            said = f"{rival.options[name]:g} would give {gain:+.3f}"
            reasons.append(f"{name}={defaults[name]:g}: the default stays, {said}")
    return Choice(best, tuple(trials), tuple(reasons))


def trials_in(layers: Sequence[Options], strengths: Mapping[str, Sequence[Any]]) -> int:
    """How many trials `choose` makes."""
    return len(layers) + sum(map(len, strengths.values()))


def around(defaults: Options, factors: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Values to try, as multiples of the defaults; options that are off (None or 0) are left alone."""
    return {name: tuple(defaults[name] * f for f in by) for name, by in factors.items() if defaults.get(name)}


def _said(options: Options) -> str:
    return ", ".join(_pairs(options))


def _pairs(options: Options) -> Iterator[str]:
    for name, value in options.items():
        yield (
            f"{name} {value}" if not isinstance(value, tuple) else f"{name} {'-'.join(map(str, (value[0], value[-1])))}"
        )
