"""A run as a report: one self-contained HTML page, and the same as Markdown with PNG files.

Tables and figures are the preset's; examples are drawn from the rows, so that every kind of success and failure can be read and
not only counted. Whatever comes from a model or a data set is escaped.
"""

import base64
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.glossary import TERMS, Term
from errata.bench.metrics import METRICS
from errata.bench.preset import get_preset
from errata.bench.rows import SCHEMA, UNEDITED, read_fits, results
from errata.bench.store import RunDirectory, other_sources
from errata.errors import ConfigError
from errata.files import write_atomically
from errata.model.generate import cut

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.tables import Table

HTML, MARKDOWN = "report.html", "report.md"
OVERVIEW = "README.md"  # of the reports of `all`, which hosts show with its folder
EACH = 2  # examples of each sort for each method
LONGEST = 240  # characters of a prompt; of a longer one its end is shown
SILENT = ("generation", "unrelated")  # kinds without an answer


@dataclass(frozen=True)
class Answer:
    """What some methods said alike. right: whether the probe passed."""

    methods: tuple[str, ...]
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One probe and every method's answer. sort: why it is shown."""

    sort: str
    kind: str
    case: str
    prompt: str
    expected: str
    answers: tuple[Answer, ...]


def write_report(
    run: str | Path, out: str | Path, rows: "DataFrame | None" = None, tables: "Sequence[Table] | None" = None
) -> Path:
    """Write report.html, report.md and the Markdown's figures into the folder `out`; returns the page's path.

    rows, tables: of `rows_of` and the preset, where they are made already.
    Raises ConfigError for a folder that is no run, RecordError for one without rows.
    """
    run, out = Path(run), Path(out)
    directory = RunDirectory(run)
    about, preset = directory.read(), get_preset(directory.read()["spec"]["preset"])
    rows = rows_of(run) if rows is None else rows
    pictures = [(path, caption) for path, caption in (preset.figures(rows, run) if preset.figures else ())]
    named = [(f"figures/{path.name}", path.read_bytes(), caption) for path, caption in pictures]
    values = {
        "preset": preset,
        "about": about,
        "spec": about["spec"],
        "facts": _facts(about, rows) + _left_out(run),
        "tables": list(preset.tables(rows, run) if tables is None else tables),
        "examples": examples(rows),
        "failures": failures(run),
        "glossary": glossary(rows),
        "configs": {
            label: json.dumps(m["config"], ensure_ascii=False) for label, m in about["spec"]["methods"].items()
        },
    }
    for name, data, _ in named:
        if (out / name).resolve() != (run / name).resolve():
            write_atomically(out / name, data)
    page = _template("report.html.j2").render(
        **values, figures=[(base64.b64encode(data).decode(), caption) for _, data, caption in named]
    )
    text = _template("report.md.j2").render(**values, figures=[(name, caption) for name, _, caption in named])
    write_atomically(out / HTML, page)
    write_atomically(out / MARKDOWN, re.sub(r"\n{3,}", "\n\n", text))
    return out / HTML


def write_reports(folder: str | Path, out: str | Path) -> Path:
    """Write the report of every finished run in `folder`, each into a folder of `out`, and an overview; returns its path.

    Raises ConfigError if no run in `folder` is finished.
    """
    folder, out = Path(folder), Path(out)
    runs = [run for run in sorted(folder.iterdir()) if (run / "run.json").is_file() and RunDirectory(run).finished()]
    if not runs:
        raise ConfigError(f"no run in {folder} is finished; `errata bench resume {folder}` goes on with them")
    for run in runs:
        write_report(run, out / run.name)
    return write_overview(runs, out)


def write_overview(runs: Sequence[Path], out: Path) -> Path:
    """Write the page that leads to the reports of these runs, which stand in folders of `out`; returns its path."""
    lines, models = [], set()
    for run in runs:
        about = RunDirectory(run).read()
        spec, preset = about["spec"], get_preset(about["spec"]["preset"])
        models.add(spec["model"])
        minutes = "in several starts" if about.get("resumed") else f"{_minutes(about):.1f}"
        lines.append(
            f"| [{preset.name}]({run.name}/{MARKDOWN}) | {_plain(preset.title)} | {_plain(preset.source)} | {spec['n'] or ''} | "
            f"{minutes} |"
        )
    head = ["| preset | what | source | cases | minutes |", "|---|---|---|---:|---:|"]
    text = "\n".join([f"# Benchmarks of {', '.join(sorted(models))}", "", *head, *lines, ""])
    write_atomically(out / OVERVIEW, text)
    return out / OVERVIEW


def _minutes(about: Mapping[str, Any]) -> float:
    return (datetime.fromisoformat(about["finished"]) - datetime.fromisoformat(about["started"])).total_seconds() / 60


def rows_of(run: str | Path) -> "DataFrame":
    """The rows of a run as metrics take them, methods in the order of the run, the unedited model first.

    Of a preset that asks nothing (it traces, or measures by itself) an empty table.
    """
    spec = RunDirectory(run).read()["spec"]
    if spec["n"] or any((Path(run) / "units").glob("*.parquet")):
        place = {label: i for i, label in enumerate([UNEDITED, *spec["methods"]])}
        found = results(run)
        # Plain objects: metrics cut a table into many small ones, and Arrow's strings take long to be taken apart.
        strings = {name: object for name, kind in found.dtypes.items() if str(kind) in ("str", "string", "category")}
        found = found.astype(strings)
        return found.iloc[found["method"].map(lambda label: place.get(label, len(place))).argsort(kind="stable")]
    import pandas as pd

    return pd.DataFrame({name: [] for name in SCHEMA.names})


def tables_of(run: str | Path) -> Sequence["Table"]:
    """The tables of a run, by its preset."""
    return get_preset(RunDirectory(run).read()["spec"]["preset"]).tables(rows_of(run), Path(run))


# -- examples --------------------------------------------------------------------------------------------------------------


def examples(rows: "DataFrame", each: int = EACH, seed: int = 0) -> list[Example]:
    """For each method a few probes that it passes and most others fail, and a few that it fails and most others pass.

    Of a sequential method the last checkpoint counts. Where a run has one method, simply some of either sort. The choice depends
    on the seed alone; kinds take turns.
    """
    found: list[Example] = []
    if rows.empty:
        return found
    asked = rows[~rows["condition"].astype(bool) & ~rows["kind"].isin(SILENT) & rows["passed"].notna()]
    asked = asked.sort_values("edits", kind="stable").drop_duplicates(["method", "case", "probe"], keep="last")
    methods = [m for m in dict.fromkeys(asked["method"]) if m != UNEDITED]
    probes = {key: dict(zip(own["method"], own.index, strict=True)) for key, own in asked.groupby(["case", "probe"])}
    passed = asked["passed"].astype(bool).to_dict()
    kind = asked["kind"].to_dict()
    shown: set[Any] = set()
    for method in methods:
        keys = [key for key, own in probes.items() if method in own]
        random.Random(f"{seed}|{method}").shuffle(keys)
        for wins in (True, False):
            scored = []
            for key in keys:
                own = probes[key]
                others = [passed[i] == wins for m, i in own.items() if m not in (method, UNEDITED)]
                if passed[own[method]] == wins and key not in shown:
                    scored.append((sum(others) / len(others) if others else 0.0, key))
            scored.sort(key=lambda pair: pair[0])
            for key in _by_turns(scored, lambda key: kind[next(iter(probes[key].values()))], each):
                shown.add(key)
                found.append(_example(asked, probes[key], f"{method} {'right' if wins else 'wrong'}"))
    return found


def _by_turns(scored: Sequence[tuple[float, Any]], kind: Any, n: int) -> list[Any]:
    """The first n keys, kinds that have not had a turn going first."""
    chosen: list[Any] = []
    seen: set[str] = set()
    for fresh in (True, False):
        for _, key in scored:
            if len(chosen) < n and key not in chosen and (not fresh or kind(key) not in seen):
                chosen.append(key)
                seen.add(kind(key))
    return chosen


def _example(rows: "DataFrame", own: Mapping[str, Any], sort: str) -> Example:
    first = rows.loc[next(iter(own.values()))]
    answers: dict[tuple[str, bool], list[str]] = {}
    for method in sorted(own, key=lambda name: name != UNEDITED):
        row = rows.loc[own[method]]
        answers.setdefault((_shown(cut(row["generated"] or "")), bool(row["passed"])), []).append(method)
    expected = ", or ".join(first["expected"]) or f"as before: {_shown(cut(first['unedited'] or ''))}"
    return Example(
        sort,
        str(first["kind"]).replace("_", " "),
        str(first["case"]),
        _shown(first["prompt"]),
        expected,
        tuple(Answer(tuple(methods), text, right) for (text, right), methods in answers.items()),
    )


def _shown(text: str) -> str:
    """A text in one line, of a long one its end."""
    line = " ".join(text.replace("\n", " ⏎ ").split())
    return line if len(line) <= LONGEST else f"… {line[-LONGEST:]}"


# -- the rest of the page --------------------------------------------------------------------------------------------------


def failures(run: str | Path) -> dict[str, list[tuple[str, int, str]]]:
    """method -> (reason, how many cases, the first ones' names) of fits that failed."""
    fits = read_fits(run)
    lost = fits[fits["error"].fillna("") != ""]
    return {
        str(method): [
            (str(reason), len(cases), ", ".join(map(str, cases[:8])) + (", …" if len(cases) > 8 else ""))
            for reason, cases in own.groupby("error", sort=False)["case"].agg(list).items()
        ]
        for method, own in lost.groupby("method", sort=False)
    }


def glossary(rows: "DataFrame") -> list[Term]:
    """What the papers' letters mean, of metrics that this run's probes have."""
    kinds = set(rows["kind"])

    def asked(term: Term) -> bool:
        metric = METRICS[term.ours]
        return all(set(METRICS[part].kinds) & kinds for part in (metric.terms or (term.ours,)))

    return [term for term in TERMS if asked(term)]


def _facts(about: Mapping[str, Any], rows: "DataFrame") -> list[tuple[str, str]]:
    """How the run was made, line by line."""
    spec, machine = about["spec"], about.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    where = [
        f"{machine.get('cores')} cores",
        f"{machine.get('memory_gib')} GiB",
        machine.get("processor"),
        machine.get("device"),
    ]
    options = "".join(f", {name}={value}" for name, value in (spec.get("data_options") or {}).items())
    found = {
        "command": about.get("command"),
        "model": f"{spec['model']} ({spec.get('dtype')}, weights {spec.get('weights')})",
        "data": f"{spec.get('data') or 'the preset’s own'}{options}, split {spec.get('split')}, {spec['n']} cases, seed {spec['seed']}",
        "rows": f"{len(rows):,}",
        "versions": versions,
        "machine": ", ".join(str(w) for w in where if w),
        "threads": str(about.get("threads", "")),
        "engine": f"{about.get('engine')}, {about.get('workers') or 1} at work",
        "started, finished": f"{about.get('started')}, {about.get('finished', 'not yet')}",
        "resumed": "; ".join(
            f"{start.get('started')} by {start.get('command') or 'no command'} ({start.get('engine')}, "
            f"{start.get('workers') or 1} at work)"
            for start in about.get("resumed", [])
        ),
        "take care: rows may be of different kinds": "; ".join(other_sources(about)),
    }
    return [(name, value) for name, value in found.items() if value]


def _left_out(run: Path) -> list[tuple[str, str]]:
    """What was left out of the data, in words, as a line."""
    path = run / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("left_out", {}) if path.is_file() else {}
    said = "; ".join(f"{where}: {why}" for where, why in list(found.items())[:8])
    return [("left out of the data", f"{len(found)} ({said}{'; …' if len(found) > 8 else ''})")] if found else []


def _template(name: str) -> Any:
    """A template beside this file. HTML is escaped by Jinja2; Markdown's own signs by the filter `plain`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda path: (files("errata.bench") / path).read_text(encoding="utf-8")),
        autoescape=lambda path: str(path).endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["whole"] = lambda table: Markup(table.html())  # escapes by itself
    return environment.get_template(name)


def _plain(text: object) -> str:
    """A text in Markdown as it stands: signs that mean something there are escaped, line breaks become spaces."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(text).split()))
