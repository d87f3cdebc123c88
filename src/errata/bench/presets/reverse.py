"""Reversed relations: after (s, r, o*), does the model complete (inverse of r, o*) with s? Unsolved in SAKE's paper.

Two arms on the same edits: fitted as ever, and with the inverse, in other words, among the implications of the fit.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata.bench.cases import Case
from errata.bench.makers import reverses, with_inverses, with_probes
from errata.bench.preset import Context, Method, Preset
from errata.bench.presets import _common as common

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, OVER = 30, 6
METRICS = {
    "reversed": "reverse.generate",
    "efficacy": "efficacy.generate",
    "other objects' inverses kept": "specificity.generate",
}
ARMS = {"plain": "fitted as ever", "inverses": "the inverse among the implications of the fit"}


def cases(context: Context) -> Sequence[Case]:
    """Atlas's edits of relations that have an inverse wording, each in both arms (tag "arm")."""
    wanted = context.n if context.n is not None else N
    # A quarter of Atlas's relations have one; CounterFact's draw has none, as it wants objects that several subjects share.
    drawn = common.draw(replace(context, n=OVER * wanted), N, atlas="atlas-ripple")
    found: list[Case] = []
    for case in drawn:
        probes = reverses(case, seed=context.seed)
        if probes and len(found) < 2 * wanted:
            asked = with_probes(case, probes, keep=("edit",))
            found += [
                replace(arm, id=f"{case.id}-{name}", tags={**case.tags, "arm": name})
                for name, arm in (("plain", asked), ("inverses", with_inverses(asked)))
            ]
    return found[::2] + found[1::2]  # arm by arm


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A table for each arm."""
    from errata.bench.tables import metric_table

    held = (
        "Where the new object belongs to somebody in Atlas already, its old subject has to give way. ROME and ICL read no "
        "implications; of Atlas's own cases they are given the first arm's."
    )
    found = [
        metric_table(common.tagged_or_untagged(rows, arm=arm), f"Reversed relations, {words}", METRICS, note=held)
        for arm, words in ARMS.items()
    ]
    return [*found, common.cost_table(run)]


PRESET = Preset(
    "reverse",
    "Reversed relations",
    "ours",
    cases,
    (
        Method("sake", "sake", "single", common.MODEL),
        replace(common.ROME, most=N),
        replace(common.ICL, most=N),
    ),
    tables,
    n=N,
    roles=("decoder", "encoder-decoder"),
)
