"""Rows: one for each probe's outcome, in Parquet. Every table, interval and figure is a query over rows.

A run's directory has them in `units/*.parquet`, its fits in `fits/*.parquet`, and what probes lack of their cases (requests,
references) in `cases.jsonl`.
"""

import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from errata.bench.cases import Case
from errata.errors import ConfigError, RecordError
from errata.files import write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

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
        ("passed", pa.bool_()),  # by our default protocol: the whole object, or the unedited answer kept
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
            raise RecordError(f"row {number} of {path} has {_no_column(unknown[0], schema)}")
    columns = [_column(rows, field, path) for field in schema]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def read_rows(
    run: str | Path, where: str | None = None, columns: Sequence[str] | None = None, limit: int | None = None
) -> "DataFrame":
    """The rows of a run's directory, those for which `where` holds, in the order of units; every column by default.

    where: `column op value`, joined by `and`; see `condition`. Lists are tuples, tags a dict, what is missing NaN.
    Raises RecordError for a directory without rows or a damaged file, ConfigError for an unknown column or a bad `where`.
    """
    return _read(Path(run) / "units", SCHEMA, where, columns, limit)


def read_fits(run: str | Path, where: str | None = None, columns: Sequence[str] | None = None) -> "DataFrame":
    """The fits of a run's directory, as `read_rows`; none at all, of a run of the unedited model alone, is an empty table."""
    folder = Path(run) / "fits"
    if not any(folder.glob("*.parquet")):
        return _frame(FITS.empty_table().select(_known(columns, FITS)))
    return _read(folder, FITS, where, columns, None)


def write_cases(run: str | Path, cases: Iterable[Case]) -> None:
    """Write `cases.jsonl`: of each case its id, request, references and tags."""
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


def read_cases(run: str | Path) -> dict[str, dict[str, Any]]:
    """What `write_cases` wrote, by the case's id; empty where there is no such file. Raises RecordError for a damaged one."""
    path = Path(run) / "cases.jsonl"
    if not path.is_file():
        return {}
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {entry["id"]: entry for entry in found}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordError(f"expected one case a line in {path}, but {error!r}; run the benchmark again") from None


def results(run: str | Path) -> "DataFrame":
    """The rows of a run as metrics take them: every row, and two columns more.

    references: of rows of kind "generation", the case's reference texts. failed: whether the fit of the row's edit failed.
    A failed fit leaves the model as it is; where the run did not ask it again, the unedited model's answers stand in, so that
    no method gains by failing and no case is lost.
    """
    rows = read_rows(run)
    return with_references(with_failed(rows, read_fits(run)), read_cases(run))


def with_failed(rows: "DataFrame", fits: "DataFrame") -> "DataFrame":
    """Rows with a column `failed`, and the unedited model's rows where a failed fit (FITS) left none of its own."""
    import pandas as pd

    lost = fits[fits["error"].fillna("") != ""]
    key = pd.MultiIndex.from_frame(rows[["method", "case"]])
    parts = [rows.assign(failed=key.isin(list(zip(lost["method"], lost["case"], strict=True))))]
    plain, present = rows[(rows["method"] == UNEDITED) & ~rows["condition"].astype(bool)], set(key)
    for method, cases in lost.groupby("method")["case"]:
        gone = {case for case in cases if (method, case) not in present}
        own = rows.loc[rows["method"] == method, ["setting", "edits"]].drop_duplicates()
        for setting, edits in own.itertuples(index=False) if len(own) else [("single", 0)]:
            stand_in = plain[plain["case"].isin(gone)]
            parts.append(stand_in.assign(method=method, setting=setting, edits=edits, failed=True))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def with_references(rows: "DataFrame", cases: Mapping[str, Mapping[str, Any]]) -> "DataFrame":
    """Rows with a column `references`: the texts of the case (`read_cases`) for kind "generation", else empty."""
    found = [
        tuple(cases[case]["references"]) if kind == "generation" and case in cases else ()
        for case, kind in zip(rows["case"], rows["kind"], strict=True)
    ]
    return rows.assign(references=found)


# -- conditions ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|<=|>=|!=|==|=|<|>|\(|\)|,|[^\s"'<>=!(),]+)""")
_COMPARE = ("=", "==", "!=", "<", "<=", ">", ">=")


def condition(where: str, schema: pa.Schema = SCHEMA) -> Any:
    """A text like `kind = edit and p_expected < 0.5` as a pyarrow expression; nothing is evaluated.

    One test is `column op value` with op one of = != < <= > >= contains; `column in (a, b)`; `column is null`;
    `column is not null`. Tests are joined by `and`. A value with spaces stands in quotes; `tags.NAME` is a tag's value; of a
    list, `contains` asks for one entry. Raises ConfigError that says what was expected, and where.
    """
    tokens = _tokens(where)
    whole = _test(tokens, schema, where)
    while tokens:
        if (joint := tokens.pop(0)).lower() != "and":
            raise ConfigError(f"expected 'and' or the end, found {joint!r} in {where!r}")
        whole = whole & _test(tokens, schema, where)
    return whole


def _tokens(where: str) -> list[str]:
    found, at = [], 0
    while at < len(where.rstrip()):
        match = _TOKEN.match(where, at)
        if match is None:
            raise ConfigError(f"cannot read {where[at:]!r} in {where!r}; put a text with such signs in quotes")
        found.append(match.group(1))
        at = match.end()
    return found


def _test(tokens: list[str], schema: pa.Schema, where: str) -> Any:
    import pyarrow.compute as pc

    def take(what: str) -> str:
        if not tokens:
            raise ConfigError(f"expected {what} at the end of {where!r}")
        return tokens.pop(0)

    name = take("a column")
    column, kind = _column_of(name, schema)
    operator = take(f"one of {' '.join(_COMPARE)} contains in is, after {name}").lower()
    if operator == "is":
        word = take("null or 'not null'").lower()
        negated = word == "not"
        if (take("null") if negated else word).lower() != "null":
            raise ConfigError(f"expected 'is null' or 'is not null' after {name} in {where!r}")
        return ~pc.is_null(column) if negated else pc.is_null(column)
    if operator == "in":
        if take("'('") != "(":
            raise ConfigError(f"expected values in parentheses after '{name} in' of {where!r}")
        values = [_value(take("a value"), kind, name)]
        while (sign := take("',' or ')'")) == ",":
            values.append(_value(take("a value"), kind, name))
        if sign != ")":
            raise ConfigError(f"expected ',' or ')', found {sign!r} in {where!r}")
        return column.isin(pa.array(values, kind))
    if operator == "contains" and pa.types.is_list(kind):
        joined = pc.binary_join(
            column, "\x1f"
        )  # no entry contains a unit separator, so whole entries can be found in it
        entry = re.escape(_unquoted(take("a value")))
        return pc.match_substring_regex(joined, rf"(^|\x1f){entry}(\x1f|$)")
    if pa.types.is_list(kind) or pa.types.is_map(kind):
        raise ConfigError(
            f"{name} is a {'list; use contains' if pa.types.is_list(kind) else 'map; name a tag, tags.NAME'}"
        )
    if operator == "contains":
        if not pa.types.is_string(kind):
            raise ConfigError(f"contains is for texts, and {name} is {kind}; use one of {' '.join(_COMPARE)}")
        return pc.match_substring(column, _unquoted(take("a value")))
    if operator not in _COMPARE:
        raise ConfigError(f"expected one of {' '.join(_COMPARE)} contains in is, found {operator!r} after {name}")
    value = pa.scalar(_value(take("a value"), kind, name), kind)
    return {
        "=": column == value, "==": column == value, "!=": column != value,
        "<": column < value, "<=": column <= value, ">": column > value, ">=": column >= value,
    }[operator]  # fmt: skip


def _column_of(name: str, schema: pa.Schema) -> tuple[Any, pa.DataType]:
    import pyarrow.compute as pc

    if name.startswith("tags.") and "tags" in schema.names:
        return pc.map_lookup(pc.field("tags"), name.removeprefix("tags."), "first"), pa.string()
    if name not in schema.names:
        raise ConfigError(_no_column(name, schema))
    return pc.field(name), schema.field(name).type


def _value(text: str, kind: pa.DataType, name: str) -> Any:
    plain = _unquoted(text)
    try:
        if pa.types.is_boolean(kind):
            return {"true": True, "false": False}[plain.lower()]
        if pa.types.is_integer(kind):
            return int(plain)
        return float(plain) if pa.types.is_floating(kind) else plain
    except (KeyError, ValueError):
        raise ConfigError(f"expected a value of type {kind} for {name}, found {text!r}") from None


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if quoted else text


# -- between Arrow and pandas --------------------------------------------------------------------------------------------


def _read(
    folder: Path, schema: pa.Schema, where: str | None, columns: Sequence[str] | None, limit: int | None
) -> "DataFrame":
    import pyarrow.dataset as ds

    paths = sorted(str(path) for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise RecordError(f"expected Parquet files in {folder}, found none; name the directory of a run that has begun")
    wanted, chosen = _known(columns, schema), condition(where, schema) if where else None
    try:
        found = ds.dataset(paths, schema=schema, format="parquet")
        if limit is None:
            return _frame(found.to_table(columns=wanted, filter=chosen))
        return _frame(found.head(limit, columns=wanted, filter=chosen))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise RecordError(f"cannot read the rows of {folder}: {str(error).splitlines()[0]}") from None


def _frame(table: pa.Table) -> "DataFrame":
    """As pandas: lists as tuples, maps as dicts."""
    frame = table.to_pandas(strings_to_categorical=False)
    for field in table.schema:
        if pa.types.is_list(field.type):
            frame[field.name] = [() if v is None else tuple(v) for v in table[field.name].to_pylist()]
        elif pa.types.is_map(field.type):
            frame[field.name] = [dict(v or ()) for v in table[field.name].to_pylist()]
        elif pa.types.is_boolean(field.type) and table[field.name].null_count == 0:
            frame[field.name] = frame[field.name].astype(bool)
    return frame


def _column(rows: Sequence[Mapping[str, Any]], field: pa.Field, path: str | Path) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if pa.types.is_map(field.type):
        values = [None if v is None else list(dict(v).items()) for v in values]
    elif pa.types.is_list(field.type):  # a text would become the list of its letters
        values = [v if v is None or isinstance(v, str) else list(v) for v in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise RecordError(f"column {field.name} of {path}: expected {field.type}, but {error}") from None


def _known(columns: Sequence[str] | None, schema: pa.Schema) -> list[str]:
    for name in columns or ():
        if name not in schema.names:
            raise ConfigError(_no_column(name, schema))
    return list(columns or schema.names)


def _no_column(name: str, schema: pa.Schema) -> str:
    near = difflib.get_close_matches(name, schema.names, n=1)
    return f"no column {name!r}; {f'did you mean {near[0]!r}?' if near else 'there are ' + ', '.join(schema.names)}"
