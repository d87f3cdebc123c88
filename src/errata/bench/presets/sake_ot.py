"""Transport against the mere shift of means behind one gate; and can a probe tell mapped states from true ones?

Source: Scialanga et al. 2025, section 4.4.2 and the argument for optimal transport: a map that only shifts the mean leaves the
spread of the source. For each edit half of its prompts fit both maps; the states of the other half are mapped, and a logistic
regression, cross-validated over prompts, is asked to tell them from the same prompts' true target states. 50 % is chance.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.presets import _common as common
from errata.bench.presets.sake_counterfact import OURS
from errata.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pandas import DataFrame
    from torch import Tensor

    from errata.bench.tables import Table

N, PUBLISHED_N = 40, 2000
METHODS = (
    Method("transport", "sake", "single", common.MODEL),
    Method("shift", "uniform", "single", common.MODEL),
)
PROBED = {"unmapped": "the source's states", "shift": "shifted by the means' difference", "transport": "transported"}
PROMPTS, FOLDS = 60, 5
SPAN = 8  # edits of a part


def cases(context: Context) -> Sequence[Case]:
    """CounterFact's edits with paraphrases and neighbours."""
    return common.only(common.draw(context, N, published_n=PUBLISHED_N), "edit", "paraphrase", "neighborhood")


def probe_states(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """For each edit how well the probe tells each kind of states from true target states, a few edits at a time; of all
    `states.json`.
    """
    spans = common.spans([case for case in cases if case.request.target_true], SPAN)

    def part(span: str) -> dict[str, Any]:
        return {c.id: accuracies(context.model, context.tokenizer, c, context.seed) for c in spans[span]}

    def combine(made: Mapping[str, Any], run: Path) -> None:
        found = {case: own for values in made.values() for case, own in values.items()}
        write_atomically(run / "states.json", json.dumps(found, indent=1) + "\n")

    return Extra({f"states-{span}": partial(part, span) for span in spans}, combine)


def accuracies(model: Any, tokenizer: Any, case: Case, seed: int) -> dict[str, float]:
    """Cross-validated accuracy of the probe by kind of states, for one edit."""
    import torch

    from errata.maths.transport import gaussian_transport, mean_shift
    from errata.model.states import states_at
    from errata.model.tokens import token_ids
    from errata.prompts import contexts

    request = case.request
    given = list(dict.fromkeys((*request.fit_prompts, request.text)))
    prompts = contexts.lead_ins(given, PROMPTS, seed)
    wanted = [contexts.instead(p, request.target_true or "", request.target_new) for p in prompts]

    def states(texts: list[str]) -> "Tensor":
        rows = token_ids(tokenizer, texts)
        return torch.cat(states_at(model, rows, [[len(row) - 1] for row in rows], ["final"])["final"])

    source, target = states(prompts), states(wanted)
    fit, held = slice(0, None, 2), slice(1, None, 2)
    maps = {
        "transport": gaussian_transport(source[fit], target[fit], reg=0.2, relative=True),
        "shift": mean_shift(source[fit], target[fit]),
    }
    mapped = {"unmapped": source[held]} | {name: made(source[held]) for name, made in maps.items()}
    true = target[held].double().numpy()
    return {name: told_apart(mapped[name].double().numpy(), true) for name in PROBED}


def told_apart(mapped: "NDArray[Any]", true: "NDArray[Any]") -> float:
    """Share of held-out states (n, d) that a logistic regression puts on the right side; a prompt's two states share a fold."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = len(true)
    x, y, prompt = np.concatenate([mapped, true]), np.repeat([0, 1], n), np.tile(np.arange(n), 2)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return float(cross_val_score(probe, x, y, groups=prompt, cv=GroupKFold(min(FOLDS, n))).mean())


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """What the edits say with either map, the paired difference, and the probe."""
    from errata.bench.metrics import rate
    from errata.bench.tables import Table, difference_table, metric_table

    found = [metric_table(rows, "Transport and shift of the mean, one gate", OURS)]
    if {"transport", "shift"} <= set(rows["method"]):
        found.append(difference_table(rows, "Transport minus shift, paired over edits", OURS, [("transport", "shift")]))
    path = run / "states.json"
    if path.is_file():
        by_edit = json.loads(path.read_text(encoding="utf-8")).values()
        protocol = "share of held-out states that a cross-validated logistic regression tells from true target states"
        lines = [[name, words, rate([e[name] for e in by_edit], protocol)] for name, words in PROBED.items()]
        note = "50 % is chance: the mapped states pass for true ones. Half of each edit's prompts fit the maps, the others are judged."
        found.append(
            Table(
                "Can a probe tell mapped from true target states?",
                ["states", "what they are", "told apart"],
                lines,
                note,
            )
        )
    return [*found, common.cost_table(run)]


PRESET = Preset(
    "sake-ot",
    "Optimal transport against uniform steering",
    "Scialanga et al. 2025, uniform against transport",
    cases,
    METHODS,
    tables,
    n=N,
    published_n=PUBLISHED_N,
    extra=probe_states,
)
