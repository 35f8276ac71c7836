"""Qdrant filters: SQL conditions on columns as Qdrant's filters.

    condition := condition OR condition | condition AND condition | NOT condition | (condition)
               | column =, !=, <>, <, <=, >, >= literal | column [NOT] IN (literal, ...) | column [NOT] BETWEEN a AND b
               | column IS [NOT] NULL

As in SQL, a comparison with null holds no more than its negation does. NOT is carried down to the comparisons.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdrant_client import models

TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?\d+(?:\.\d+)?\b)|'(?P<text>(?:[^']|'')*)'|(?P<word>\w+|"[^"]+")"""
    r"""|(?P<sign><=|>=|<>|!=|[=<>(),]))"""
)
WORDS = {"AND", "OR", "NOT", "IN", "IS", "NULL", "BETWEEN", "TRUE", "FALSE"}
RANGES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}
OPPOSITE = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "=": "!=", "!=": "="}


def filter_of(condition: str, columns: Sequence[str]) -> models.Filter:
    """The filter. Raises ValueError naming what it does not understand, or the columns that there are."""
    try:
        parser = _Parser(_tokens(condition), columns)
        found = parser.any_of(negated=False)
        if parser.tokens:
            raise ValueError(f"nothing is expected at {parser.tokens[0][1]!r}")
    except (ValueError, IndexError) as error:
        reason = "it ends too early" if isinstance(error, IndexError) else error
        raise ValueError(f"filter {condition!r}: {reason}") from None
    return found


def _tokens(condition: str) -> list[tuple[str, Any]]:
    """(sort, value): number, text, name, sign or key word."""
    tokens: list[tuple[str, Any]] = []
    end = 0
    while condition[end:].strip():
        match = TOKEN.match(condition, end)
        if match is None:
            raise ValueError(f"{condition[end:].strip()[:20]!r} is not understood")
        end = match.end()
        sort, value = match.lastgroup, match[match.lastgroup]
        if sort == "number":
            value = float(value) if "." in value else int(value)
        elif sort == "text":
            value = value.replace("''", "'")
        elif sort == "word" and value.upper() in WORDS:
            sort, value = "key word", value.upper()
        elif sort == "word":
            sort, value = "name", value.strip('"')
        elif value == "<>":
            value = "!="
        tokens.append((sort, value))
    return tokens


class _Parser:
    """Takes tokens from the front; every method gives the filter of what it has taken, or of its negation."""

    def __init__(self, tokens: list[tuple[str, Any]], columns: Sequence[str]) -> None:
        self.tokens = tokens
        self.columns = columns

    def take(self, *values: Any) -> bool:
        """Whether the next token is one of these key words or signs; it is taken if so."""
        found = bool(self.tokens) and self.tokens[0][0] in ("key word", "sign") and self.tokens[0][1] in values
        if found:
            self.tokens.pop(0)
        return found

    def need(self, value: str) -> None:
        if not self.take(value):
            raise ValueError(f"{value} is expected at {self.tokens[0][1]!r}")

    def any_of(self, negated: bool) -> models.Filter:
        parts = [self.all_of(negated)]
        while self.take("OR"):
            parts.append(self.all_of(negated))
        return _joined(parts, all_hold=negated)

    def all_of(self, negated: bool) -> models.Filter:
        parts = [self.one(negated)]
        while self.take("AND"):
            parts.append(self.one(negated))
        return _joined(parts, all_hold=not negated)

    def one(self, negated: bool) -> models.Filter:
        if self.take("NOT"):
            return self.one(not negated)
        if self.take("("):
            found = self.any_of(negated)
            self.need(")")
            return found
        return self.comparison(negated)

    def comparison(self, negated: bool) -> models.Filter:
        sort, column = self.tokens.pop(0)
        if sort != "name":
            raise ValueError(f"a column is expected at {column!r}")
        if column not in self.columns:
            raise ValueError(f"no column {column!r}; there are {', '.join(self.columns)}")
        if self.take("IS"):
            negated ^= self.take("NOT")
            self.need("NULL")
            return _null(column, holds=not negated)
        negated ^= self.take("NOT")
        if self.take("IN"):
            self.need("(")
            values = [self.literal()]
            while self.take(","):
                values.append(self.literal())
            self.need(")")
            return _joined([_compared(column, "!=" if negated else "=", one) for one in values], all_hold=negated)
        if self.take("BETWEEN"):
            low = _compared(column, "<" if negated else ">=", self.literal())
            self.need("AND")
            return _joined([low, _compared(column, ">" if negated else "<=", self.literal())], all_hold=not negated)
        sort, sign = self.tokens.pop(0)
        if sort != "sign" or sign not in OPPOSITE:
            raise ValueError(f"a comparison is expected at {sign!r}")
        return _compared(column, OPPOSITE[sign] if negated else sign, self.literal())

    def literal(self) -> str | int | float | bool:
        sort, value = self.tokens.pop(0)
        if value in ("TRUE", "FALSE") and sort == "key word":
            return value == "TRUE"
        if sort not in ("number", "text"):
            raise ValueError(f"a number or a text is expected at {value!r}")
        return value


def _joined(parts: list[models.Filter], all_hold: bool) -> models.Filter:
    from qdrant_client import models

    if len(parts) == 1:
        return parts[0]
    return models.Filter(must=parts) if all_hold else models.Filter(should=parts)


def _null(column: str, holds: bool) -> models.Filter:
    """That the column is null, or missing, or that it is not."""
    from qdrant_client import models

    empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=column))
    return models.Filter(must=[empty]) if holds else models.Filter(must_not=[empty])


def _compared(column: str, sign: str, value: str | int | float | bool) -> models.Filter:
    from qdrant_client import models

    if sign in RANGES:
        if isinstance(value, str | bool):
            raise ValueError(f"{column} {sign} {value!r}: only numbers can be greater or less")
        return models.Filter(must=[models.FieldCondition(key=column, range=models.Range(**{RANGES[sign]: value}))])
    if isinstance(value, float | int) and not isinstance(value, bool):
        equal = models.FieldCondition(key=column, range=models.Range(gte=value, lte=value))
    else:
        equal = models.FieldCondition(key=column, match=models.MatchValue(value=value))
    if sign == "=":
        return models.Filter(must=[equal])
    return models.Filter(must=[_null(column, holds=False)], must_not=[equal])
