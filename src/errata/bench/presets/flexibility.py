"""Taking edits back: what the inverse edit leaves behind, and what detaching does (`errata.bench.flexibility`)."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cases import Case
from errata.bench.makers import stock_texts
from errata.bench.preset import Context, Extra, Method, Preset
from errata.bench.presets import _common as common
from errata.bench.store import file_names
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

N, PUBLISHED_N = 30, 100
UNRELATED = 100
STATES = {"edited": "edited", "inverse": "inverse edit on top", "detached": "detached"}
METHODS = (common.ROME, common.MEMIT)
COLUMNS = {
    "old answers": "old_answers.generate",
    "old answers, paraphrased": "old_answers_paraphrased.generate",
    "facts changed": "facts_changed.generate",
    "KL, nats": "kl.prob",
    "logits moved": "distance.logits",
}


def cases(context: Context) -> Sequence[Case]:
    """None of the runner's: each method is measured here, on its own model with all edits merged."""
    return ()


def taken_back(context: Context, cases: Sequence[Case], methods: Sequence[Method]) -> Extra:
    """Figures of each state, method by method; of all `flexibility.json`."""
    from errata.bench.data.registry import first_of_each_fact
    from errata.bench.flexibility import flexibility
    from errata.bench.worker import editor_of

    requests = []
    cases, clashes = first_of_each_fact(common.draw(context, N, published_n=PUBLISHED_N))
    context.left_out.update(clashes)
    for case in cases:
        asked = {
            kind: tuple(p.prompt for p in case.probes if p.kind == kind) for kind in ("paraphrase", "neighborhood")
        }
        update = {"paraphrase_prompts": asked["paraphrase"][:2], "neighborhood_prompts": asked["neighborhood"][:5]}
        requests.append(case.request.model_copy(update=update))
    names = file_names([method.label for method in methods])

    def part(method: Method) -> dict[str, Any]:
        texts = stock_texts()[:UNRELATED]
        return flexibility(context.model, context.tokenizer, editor_of(method), requests, texts, seed=context.seed)

    def combine(made: Mapping[str, Any], run: Path) -> None:
        found = {label: made[name] for label, name in names.items()}
        write_atomically(run / "flexibility.json", json.dumps(found, indent=1) + "\n")

    return Extra({names[method.label]: partial(part, method) for method in methods}, combine)


def tables(rows: "DataFrame", run: Path) -> Sequence["Table"]:
    """A line for each method and state."""
    from errata.bench.intervals import Rate
    from errata.bench.tables import Table

    path = run / "flexibility.json"
    if not path.is_file():
        return []
    lines: list[list[Any]] = []
    for method, found in json.loads(path.read_text(encoding="utf-8")).items():
        for state, words in STATES.items():
            cells: list[Any] = []
            for name in COLUMNS.values():
                value = found[state][name]
                if isinstance(value, dict):
                    value = Rate(**value) if value.get("value") is not None else None
                cells.append(value)
            restored = ("bit for bit" if found["restored"] else "not restored") if state == "detached" else None
            lines.append([f"{method}, {words}", *cells, restored])
    note = (
        "All edits in the model together. Unrelated texts, edit prompts and neighbours count in the last two columns."
    )
    return [Table("What is left of edits that are taken back", ["method, state", *COLUMNS, "restored"], lines, note)]


PRESET = Preset(
    "flexibility",
    "Taking edits back",
    "ours, after a limitation that Scialanga et al. 2025 name",
    cases,
    METHODS,
    tables,
    n=N,
    published_n=PUBLISHED_N,
    extra=taken_back,
)
