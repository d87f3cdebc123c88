"""Conditions on rows as a user writes them: `kind = edit and p_expected < 0.5`. Read by a grammar; nothing is evaluated.

One test is `column op value` with op one of = != < <= > >= contains; `column in (a, b)`; `column is null`; `column is not null`.
Tests are joined by `and`. A value with spaces stands in quotes; `tags.NAME` is a tag's value; of a list, `contains` asks for one
entry.
"""

import difflib
import re
from typing import Any

import pyarrow as pa

from errata.errors import ConfigError

_TOKEN = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|<=|>=|!=|==|=|<|>|\(|\)|,|[^\s"'<>=!(),]+)""")
_COMPARE = ("=", "==", "!=", "<", "<=", ">", ">=")


def condition(where: str, schema: pa.Schema) -> Any:
    """The text as a pyarrow expression. Raises ConfigError that says what was expected, and where."""
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
    if pa.types.is_list(kind) and pa.types.is_list(kind.value_type):
        raise ConfigError(f"{name} is a list of lists, which can be shown but not asked about; ask about expected")
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
        raise ConfigError(no_column(name, schema))
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


def no_column(name: str, schema: pa.Schema) -> str:
    """What to say of a column that a schema lacks."""
    near = difflib.get_close_matches(name, schema.names, n=1)
    return f"no column {name!r}; {f'did you mean {near[0]!r}?' if near else 'there are ' + ', '.join(schema.names)}"
