"""Queries: which rows a metric judges, and what becomes of them: tests of several probes, conditions, cases.

All metrics share what stands here; `errata.bench.metrics` lists them and gives them their intervals. Also transformations of rows
that answer "what if": another threshold, another gate.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from errata.bench import judges
from errata.bench.intervals import Array, Unit
from errata.bench.preset import STAGED
from errata.bench.rows import ANSWER, PROBE, UNEDITED
from errata.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Judge = Callable[["DataFrame"], Array]
TEST = ["case", "kind", "test"]  # what a test of a case is known by


@dataclass(frozen=True)
class Metric:
    """What is judged, on which rows.

    kinds: of the probes. conditions: which of a test's conditions must hold on the unedited model, by `asks`; alias: a
    condition that asks the test's own question, whose answer is new, is replaced by the question whether the unedited model gives
    the old object, the first alternative. succeeded: what the edit's own prompt must pass, else the case
    is left out. first: a test is its first probe alone. still_open: without tests that the unedited model passes. pooled: mean over
    probes of all cases, not over cases. terms: names of metrics whose harmonic mean it is. ungated: whether
    it needs the answers of an always open gate; own_gate: whether it tests each edit's gate against its own centre alone, whatever
    the gate decided among all edits (`own_gate`). paper: whose protocol, empty for ours.
    """

    name: str
    protocol: str
    kinds: tuple[str, ...] = ()
    judge: Judge = judges.whole
    conditions: Literal["all", "first", "none"] = "all"
    asks: Judge = judges.whole
    alias: bool = False
    succeeded: Judge | None = None
    first: bool = False
    still_open: bool = False
    pooled: bool = False
    terms: tuple[str, ...] = ()
    ungated: bool = False
    own_gate: bool = False
    paper: str = ""
    unit: Unit = "fraction"
    better: Literal["higher", "lower"] = "higher"

    def outcomes(self, rows: "DataFrame") -> "DataFrame":
        """One line for each test that counts: case, value and tags. rows: from `select`. Probes without a test's name, and
        those that `joined` does not join, are tests of their own; a probe of no case, of the whole run, is a case of its own.
        """
        rows = own_gate(rows) if self.own_gate else rows
        tests = self._tests(rows)
        if self.conditions != "none":
            tests = tests[_looked_up(tests, self._held(rows), True)]
        if self.still_open:
            before = self._tests(rows.assign(generated=rows["unedited"]))
            tests = tests[(before["value"].reindex(tests.index) != 1).to_numpy()]
        if self.succeeded is not None:
            own = rows[rows["kind"] == "edit"]
            if own.empty:
                raise RecordError(
                    f"{self.name} needs rows of kind 'edit' to know which edits succeeded; ask these too."
                )
            passed = own.loc[self.succeeded(own) == 1, "case"]
            tests = tests[tests["case"].isin(passed)]
        alone = tests["kind"] + " " + tests["probe"].astype(str)
        return tests.assign(case=tests["case"].where(tests["case"] != "", alone))[["case", "value", "tags"]]

    def per_case(self, rows: "DataFrame") -> "Series":
        """Mean outcome of each case, by the case's name. rows: from `select`. Raises ConfigError for a mean of metrics."""
        if self.terms:
            raise ConfigError(f"{self.name} is a mean of means, {', '.join(self.terms)}; ask for these case by case.")
        return self.outcomes(rows).groupby("case")["value"].mean()

    def _tests(self, rows: "DataFrame") -> "DataFrame":
        """Tests with their values, each in the line of its first probe."""
        asked = rows[rows["kind"].isin(self.kinds) & ~rows["condition"].astype(bool)]
        asked = asked.assign(value=self.judge(asked)).dropna(subset=["value"]).sort_values(PROBE, kind="stable")
        asked = asked.assign(test=asked["test"].fillna(""))
        keys = [asked[name] for name in TEST] + [asked["probe"].where(asked["test"] == "", -1)]
        grouped = asked["value"].groupby(keys, sort=False)
        low, high, chosen = grouped.transform("min"), grouped.transform("max"), grouped.cumcount() == 0
        value = asked["value"] if self.first else high.where(asked["joined"] == "or", low)
        return asked.assign(value=value)[chosen.to_numpy()]

    def _held(self, rows: "DataFrame") -> "Series":
        """Whether the conditions of each test that has any hold on the unedited model, by TEST."""
        import pandas as pd

        asked = rows[rows["kind"].isin(self.kinds)].assign(test=lambda own: own["test"].fillna(""))
        found = asked[asked["condition"].astype(bool)].sort_values(PROBE, kind="stable")
        held = found.assign(value=self.asks(found) == 1)
        if self.alias:
            tests = asked[~asked["condition"].astype(bool) & asked["alternatives"].map(bool).astype(bool)]
            questions = set(zip(*(tests[name] for name in (*TEST, "prompt")), strict=True))
            own = [key in questions for key in zip(*(held[name] for name in (*TEST, "prompt")), strict=True)]
            old = tests.assign(generated=tests["unedited"], expected=tests["alternatives"].map(lambda names: names[:1]))
            held = pd.concat([held[~np.array(own, dtype=bool)], tests.assign(value=judges.whole(old) == 1)])
        held = held.groupby(TEST, sort=False)["value"]
        return held.first() if self.conditions == "first" else held.min()


@dataclass(frozen=True)
class PassRate(Metric):
    """The share of tests with conditions whose conditions hold on the unedited model."""

    def outcomes(self, rows: "DataFrame") -> "DataFrame":
        """One line for each test that has conditions."""
        tests, held = self._tests(rows), self._held(rows)
        has = _looked_up(tests, held.map(lambda _: True), False)
        return tests.assign(value=_looked_up(tests, held, False).astype(float))[has][["case", "value", "tags"]]


def select(rows: "DataFrame", method: str, *, edits: int | None = None, ungated: str | None = None) -> "DataFrame":
    """The rows of one method, as metrics take them.

    Beside each row stands what the unedited model did with the same probe, as `base_...`. Conditions are the unedited model's own
    rows. edits: the checkpoint of a sequential method or the look at a stream, by default its last. ungated: another label, of the
    same method with a gate that is always open; its likeliest token joins as `ungated_first_token`.
    Raises RecordError for a method or checkpoint without rows, and where the unedited model was asked something else.
    """
    own = rows[rows["method"] == method]
    if own.empty:
        raise RecordError(f"no rows of method {method!r}; there are {', '.join(sorted(set(rows['method'])))}.")
    staged = own["setting"].isin(STAGED)
    stages = sorted(set(own.loc[staged, "edits"]))
    if stages:
        stage = stages[-1] if edits is None else edits
        if stage not in stages:
            raise RecordError(f"no rows of {method!r} after {edits} edits; there are {', '.join(map(str, stages))}.")
        own = own[~staged | (own["edits"] == stage)]
    plain = rows[rows["method"] == UNEDITED].drop_duplicates(PROBE)
    asked = own[~own["condition"].astype(bool)]
    asked = _beside(asked, plain, "base_", ("prompt", *ANSWER))
    elsewhere = asked[asked["base_prompt"].notna() & (asked["base_prompt"] != asked["prompt"])]
    if len(elsewhere):
        line = elsewhere.iloc[0]
        raise RecordError(
            f"probe {line['probe']} of case {line['case']!r} is {line['prompt']!r} for {method} and {line['base_prompt']!r} "
            "for the unedited model; these rows are of two runs, choose one."
        )
    asked = asked.assign(unedited=asked["unedited"].where(asked["unedited"].notna(), asked["base_generated"]))
    if ungated is not None:
        asked = _beside(asked, select(rows, ungated, edits=edits), "ungated_", ("first_token",))
    conditions = plain[plain["condition"].astype(bool) & plain["case"].isin(set(own["case"]))]
    if conditions.empty:
        conditions = own[own["condition"].astype(bool)]
        conditions = conditions.assign(generated=conditions["unedited"], first_token=None)
    else:
        conditions = conditions.assign(unedited=conditions["generated"])
    if conditions.empty:
        return asked
    import pandas as pd

    return pd.concat([asked, conditions.reindex(columns=asked.columns)], ignore_index=True)


def at_threshold(rows: "DataFrame", unedited: "DataFrame", t: float) -> "DataFrame":
    """What a gate with threshold t would have given: rows of a method whose gate was always open, with the unedited model's
    answers wherever the distance is above t. The gate is then closed, as the column says.

    Raises RecordError for a row without a distance, or without a row of the unedited model for the same probe.
    """
    import pandas as pd

    if rows["distance"].isna().any():
        line = rows[rows["distance"].isna()].iloc[0]
        raise RecordError(f"probe {line['probe']} of case {line['case']!r} has no distance; sweep a method with gates.")
    shut = (rows["distance"] > t).to_numpy()
    plain = unedited.drop_duplicates(PROBE).set_index(PROBE)[list(ANSWER)]
    place = plain.index.get_indexer(pd.MultiIndex.from_frame(rows[PROBE]))
    if (place[shut] < 0).any():
        line = rows[shut & (place < 0)].iloc[0]
        raise RecordError(f"the unedited model was not asked probe {line['probe']} of case {line['case']!r}; ask it.")
    found = rows.copy()
    for name in ANSWER:
        found[name] = rows[name].where(~shut, pd.Series(plain[name].to_numpy()[place], index=rows.index))
    return found.assign(gate=rows["gate"].where(~shut, ""))


def own_gate(rows: "DataFrame", radius: float | Mapping[str, float] | None = None) -> "DataFrame":
    """The gate as SAKE's code tests it: against the edit's own centre alone, open if its distance is at most the radius.

    Interference among edits is not seen. radius: one for all, or by the edit's id; None: that of each edit's own scope, as
    `errata.bench.rows.results` has it. Answers stay as they are: of the published protocols only those that look at the gate
    change. What has no distance or no radius keeps its gate.
    """
    import pandas as pd

    if radius is None:
        limit = rows["radius"] if "radius" in rows else pd.Series(np.nan, rows.index)
    else:
        limit = rows["edit"].map(dict(radius) if isinstance(radius, Mapping) else lambda _: radius)
    gate = np.where(rows["own_distance"] <= limit, rows["edit"], "")
    return rows.assign(gate=np.where(rows["own_distance"].isna() | limit.isna(), rows["gate"], gate))


def _beside(rows: "DataFrame", others: "DataFrame", prefix: str, names: Iterable[str]) -> "DataFrame":
    wanted = {name: f"{prefix}{name}" for name in names}
    return rows.merge(others[[*PROBE, *wanted]].rename(columns=wanted), how="left", on=PROBE)


def _looked_up(tests: "DataFrame", held: "Series", default: bool) -> Any:
    known = dict(held.items())
    return np.array([known.get(key, default) for key in zip(*(tests[n] for n in TEST), strict=True)], dtype=bool)
