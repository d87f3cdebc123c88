"""Rows: one for each probe's outcome, in Parquet. Every table, interval and figure is a query over rows.

A run's directory has them in `units/*.parquet`, its fits in `fits/*.parquet`, and what probes lack of their cases (requests,
references) in `cases.jsonl`, with what words weigh in their data set in `idf.json`.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from errata.bench.cases import Case
from errata.bench.where import condition, no_column
from errata.errors import ConfigError, RecordError
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

    from errata.bench.fluency import TfIdf

TAGS = pa.map_(pa.string(), pa.string())

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),  # a label of the run; "unedited" for the model as it is
        ("setting", pa.string()),  # single, all, sequential
        ("edits", pa.int32()),  # edits in the model when the probe was asked; 0 for the unedited one
        ("case", pa.string()),  # empty for probes of the whole run: collateral, unrelated text
        ("edit", pa.string()),  # EditRequest.id
        ("probe", pa.int32()),  # index of the probe in its case
        ("kind", pa.string()),
        ("test", pa.string()),
        ("joined", pa.string()),
        ("condition", pa.bool_()),
        ("tags", TAGS),  # the case's and the probe's
        ("prompt", pa.string()),
        ("expected", pa.list_(pa.string())),
        ("alternatives", pa.list_(pa.string())),
        ("answers", pa.list_(pa.list_(pa.string()))),  # names of each answer, where there are several; else empty
        ("generated", pa.string()),  # greedy continuation; for kind "generation" the sampled text, prompt included
        ("first_token", pa.string()),  # text of the likeliest next token
        ("unedited", pa.string()),  # the unedited model's greedy continuation
        # Geometric mean over tokens, teacher-forced, of the canonical expected and of the first alternative; null without.
        ("p_expected", pa.float64()),
        ("p_alternative", pa.float64()),
        ("p_expected_first", pa.float64()),  # probability of the first token of each
        ("p_alternative_first", pa.float64()),
        ("token_accuracy", pa.float64()),  # share of expected's tokens that are the likeliest, teacher-forced
        (
            "gate",
            pa.string(),
        ),  # id of the edit whose gate was open at the prompt's end, empty for none, null without gates
        ("distance", pa.float64()),  # to the nearest edit's centre, in its gate's unit; null without gates
        ("own_distance", pa.float64()),  # to the centre of the case's own edit
        # By our default protocol: of a kind that should stay (`cases.STAY`), or without an expected object, the unedited answer is
        # kept; of any other the whole object is said.
        ("passed", pa.bool_()),
    ]
)
FITS = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("case", pa.string()),
        ("edit", pa.string()),
        ("seconds", pa.float64()),  # of the fit, a batch's shared evenly over its edits
        ("nbytes", pa.int64()),  # of the patch's tensors for this edit
        ("radius", pa.float64()),  # of the edit's own scope, in its gate's unit; null without one
        ("error", pa.string()),  # why the fit failed; empty if it did not
        ("report", pa.string()),  # JSON: the patch's entry about the edit
    ]
)
UNEDITED = "unedited"
# What a model did with a probe: all that another model's row of the same probe may differ in.
ANSWER = (
    "generated", "first_token", "p_expected", "p_alternative", "p_expected_first", "p_alternative_first",
    "token_accuracy", "passed",
)  # fmt: skip
PROBE = ["case", "probe"]  # what one probe of a run is known by


# -- files ---------------------------------------------------------------------------------------------------------------


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Write rows as one Parquet file, whole or not at all. A column that a row leaves out is null in it.

    Raises RecordError for a column that the schema lacks and for a value of another type, with the row's number.
    """
    import pyarrow.parquet as pq

    for number, row in enumerate(rows):
        unknown = [name for name in row if name not in schema.names]
        if unknown:
            raise RecordError(f"row {number} of {path} has {no_column(unknown[0], schema)}")
    columns = [_column(rows, field, path) for field in schema]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def read_rows(
    run: str | Path, where: str | None = None, columns: Sequence[str] | None = None, limit: int | None = None
) -> "DataFrame":
    """The rows of a run's directory, those for which `where` holds, in the order of units; every column by default.

    where: `column op value`, joined by `and`; see `errata.bench.where`. Lists are tuples, tags a dict, what is missing NaN.
    Raises RecordError for a directory without rows or a damaged file, ConfigError for an unknown column or a bad `where`.
    """
    return read(Path(run) / "units", SCHEMA, where, columns, limit)


def read_fits(run: str | Path, where: str | None = None, columns: Sequence[str] | None = None) -> "DataFrame":
    """The fits of a run's directory, as `read_rows`; none at all, of a run of the unedited model alone, is an empty table."""
    folder = Path(run) / "fits"
    if not any(folder.glob("*.parquet")):
        return _frame(FITS.empty_table().select(_known(columns, FITS)))
    return read(folder, FITS, where, columns)


def write_cases(run: str | Path, cases: Iterable[Case]) -> None:
    """Write `cases.jsonl`: of each case its id, request, references and tags; and `idf.json`, the weights of their data set, where
    it has any.
    """
    cases = list(cases)
    if (tfidf := tfidf_of(cases)) is not None:
        write_atomically(Path(run) / "idf.json", json.dumps(dict(tfidf.idf), ensure_ascii=False) + "\n")
    lines = (
        json.dumps(
            {
                "id": case.id,
                "request": case.request.model_dump(mode="json"),
                "references": list(case.references),
                "tags": dict(case.tags),
            },
            ensure_ascii=False,
        )
        for case in cases
    )
    write_atomically(Path(run) / "cases.jsonl", "".join(f"{line}\n" for line in lines))


def tfidf_of(cases: Iterable[Case]) -> "TfIdf | None":
    """What words weigh in the data set that the cases are of; None where it has no reference texts."""
    return next((case.tfidf for case in cases if case.tfidf is not None), None)


def read_tfidf(run: str | Path) -> "TfIdf | None":
    """The weights that `write_cases` wrote; None where there are none. Raises RecordError for a damaged file."""
    from errata.bench.fluency import TfIdf

    path = Path(run) / "idf.json"
    if not path.is_file():
        return None
    try:
        return TfIdf({word: float(idf) for word, idf in json.loads(path.read_text(encoding="utf-8")).items()})
    except (ValueError, AttributeError, TypeError) as error:
        raise RecordError(f"expected {{word: weight}} in {path}, but {error!r}; run the benchmark again") from None


def read_cases(run: str | Path) -> dict[str, dict[str, Any]]:
    """What `write_cases` wrote, by the case's id; empty where there is no such file. Raises RecordError for a damaged one."""
    path = Path(run) / "cases.jsonl"
    if not path.is_file():
        return {}
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {entry["id"]: entry for entry in found}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordError(f"expected one case a line in {path}, but {error!r}; run the benchmark again") from None


def results(run: str | Path) -> "DataFrame":
    """The rows of a run as metrics take them: every row, and four columns more.

    references: of rows of kind "generation", the case's reference texts; tfidf: the weights of the run's data set. radius: of the
    scope of the row's own edit, NaN without one. failed: whether the fit of the row's edit failed.
    A failed fit leaves the model as it is; wherever the run did not ask it again, the unedited model's answers stand in, so that
    no method gains by failing and no case is lost.
    """
    rows, fits = read_rows(run), read_fits(run)
    radius = dict(zip(zip(fits["method"], fits["edit"], strict=True), fits["radius"], strict=True))
    rows = rows.assign(radius=[radius.get(key, nan) for key in zip(rows["method"], rows["edit"], strict=True)])
    return with_references(with_failed(rows, fits), read_cases(run)).assign(tfidf=read_tfidf(run))


def with_failed(rows: "DataFrame", fits: "DataFrame") -> "DataFrame":
    """Rows with a column `failed`, and the unedited model's rows wherever a failed fit (FITS) left none of its own.

    A sequence counts a failed case at every checkpoint from its own place on, a stream at every look since it was tried. fits: in
    the order in which they were made.
    """
    import pandas as pd

    wrong = fits["error"].fillna("") != ""
    lost = pd.MultiIndex.from_frame(fits.loc[wrong, ["method", "case"]])
    parts = [rows.assign(failed=pd.MultiIndex.from_frame(rows[["method", "case"]]).isin(lost))]
    plain = rows[(rows["method"] == UNEDITED) & ~rows["condition"].astype(bool)]
    for method in dict.fromkeys(lost.get_level_values("method")):
        own, failed = rows[rows["method"] == method], wrong[fits["method"] == method]
        cases = fits.loc[failed.index, "case"]
        # The number of edits from which on a case is asked: a sequence counts its cases, a stream the edits that were made.
        since = {"sequential": failed.notna().cumsum(), "stream": (~failed).cumsum()}
        gate = "" if own["gate"].notna().any() else None
        for setting, edits in dict.fromkeys(zip(own["setting"], own["edits"], strict=True)) or [("single", 0)]:
            asked = set(own.loc[(own["setting"] == setting) & (own["edits"] == edits), "case"])
            due = failed & (since[setting] <= edits) if setting in since else failed
            stand_in = plain[plain["case"].isin(set(cases[due]) - asked)]
            parts.append(stand_in.assign(method=method, setting=setting, edits=edits, gate=gate, failed=True))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def with_references(rows: "DataFrame", cases: Mapping[str, Mapping[str, Any]]) -> "DataFrame":
    """Rows with a column `references`: the texts of the case (`read_cases`) for kind "generation", else empty."""
    found = [
        tuple(cases[case]["references"]) if kind == "generation" and case in cases else ()
        for case, kind in zip(rows["case"], rows["kind"], strict=True)
    ]
    return rows.assign(references=found)


# -- between Arrow and pandas --------------------------------------------------------------------------------------------


def read(
    folder: Path,
    schema: pa.Schema,
    where: str | None = None,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
) -> "DataFrame":
    """The rows of all Parquet files of a folder, at most `limit`; see `read_rows`."""
    wanted = _known(columns, schema)
    with _readable(folder):
        if limit is None:
            return _frame(_dataset(folder, schema).to_table(columns=wanted, filter=_filter(where, schema)))
        return _frame(_dataset(folder, schema).head(limit, columns=wanted, filter=_filter(where, schema)))


def count(folder: Path, schema: pa.Schema, where: str | None = None) -> int:
    """How many rows a folder's files have for which `where` holds."""
    with _readable(folder):
        return int(_dataset(folder, schema).count_rows(filter=_filter(where, schema)))


def _in_order(path: Path) -> list[tuple[str, int]]:
    """So that unit 2 comes before unit 10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", path.stem)]


def _filter(where: str | None, schema: pa.Schema) -> Any:
    return condition(where, schema) if where is not None else None


def _dataset(folder: Path, schema: pa.Schema) -> Any:
    import pyarrow.dataset as ds

    found = (path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    paths = [str(path) for path in sorted(found, key=_in_order)]
    if not paths:
        raise RecordError(f"expected Parquet files in {folder}, found none; name the directory of a run that has begun")
    return ds.dataset(paths, schema=schema, format="parquet")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
        raise RecordError(f"cannot read the rows of {folder}: {str(error).splitlines()[0]}") from None


def _frame(table: pa.Table) -> "DataFrame":
    """As pandas: lists as tuples, maps as dicts."""
    frame = table.to_pandas(strings_to_categorical=False)
    for field in table.schema:
        if pa.types.is_list(field.type):
            nested = pa.types.is_list(field.type.value_type)
            values = table[field.name].to_pylist()
            frame[field.name] = [tuple(map(tuple, v or ())) if nested else tuple(v or ()) for v in values]
        elif pa.types.is_map(field.type):
            frame[field.name] = [dict(v or ()) for v in table[field.name].to_pylist()]
        elif pa.types.is_boolean(field.type) and table[field.name].null_count == 0:
            frame[field.name] = frame[field.name].astype(bool)
    return frame


def _column(rows: Sequence[Mapping[str, Any]], field: pa.Field, path: str | Path) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if pa.types.is_map(field.type):
        values = [None if v is None else list(dict(v).items()) for v in values]
    elif pa.types.is_list(field.type):
        if any(isinstance(v, str) for v in values):  # Arrow would take it for the list of its letters
            raise RecordError(
                f"column {field.name} of {path}: expected a list of texts, found one text; put it in a list"
            )
        values = [v if v is None else list(v) for v in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise RecordError(f"column {field.name} of {path}: expected {field.type}, but {error}") from None


def _known(columns: Sequence[str] | None, schema: pa.Schema) -> list[str]:
    for name in columns or ():
        if name not in schema.names:
            raise ConfigError(no_column(name, schema))
    return list(columns or schema.names)
