"""Qdrant filters: SQL conditions on columns as Qdrant's filters.

    condition := condition OR condition | condition AND condition | NOT condition | (condition)
               | column =, !=, <>, <, <=, >, >= literal | column [NOT] IN (literal, ...) | column [NOT] BETWEEN a AND b
               | column IS [NOT] NULL

As in SQL, a comparison with null holds no more than its negation does. NOT is carried down to the comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vladva.index.filters import parse_condition

if TYPE_CHECKING:
    from qdrant_client import models
    from sqlglot import exp

RANGES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}
NEGATED = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "=": "!=", "!=": "="}


def qdrant_filter(condition: str, columns: Sequence[str]) -> models.Filter:
    """The filter. Raises ValueError naming what is not understood, or the columns that there are."""
    tree = parse_condition(condition, columns)
    try:
        return _filter(tree, negated=False)
    except ValueError as error:
        raise ValueError(f"filter {condition!r}: {error}") from None


def _filter(node: exp.Expr, negated: bool) -> models.Filter:
    """The filter of a condition, or of its negation."""
    from sqlglot import exp

    if isinstance(node, exp.Paren | exp.Not):
        return _filter(node.this, negated ^ isinstance(node, exp.Not))
    if isinstance(node, exp.Connector):
        # De Morgan: the negation of "both" is "one of the negations".
        parts = [_filter(part, negated) for part in node.flatten()]
        return _joined(parts, all_hold=isinstance(node, exp.And) ^ negated)
    column = node.this
    if not isinstance(column, exp.Column):
        raise ValueError(f"a comparison begins with a column, and {node.sql()!r} does not")
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return _null(column.name, holds=not negated)
    if isinstance(node, exp.In):
        equal = "!=" if negated else "="
        return _joined([_compared(column.name, equal, _value(one)) for one in node.expressions], all_hold=negated)
    if isinstance(node, exp.Between):
        low = _compared(column.name, "<" if negated else ">=", _value(node.args["low"]))
        high = _compared(column.name, ">" if negated else "<=", _value(node.args["high"]))
        return _joined([low, high], all_hold=not negated)
    signs = {exp.EQ: "=", exp.NEQ: "!=", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="}
    sign = next((sign for kind, sign in signs.items() if type(node) is kind), None)
    if sign is None:
        raise ValueError(f"Qdrant has no {type(node).__name__.upper()}")
    return _compared(column.name, NEGATED[sign] if negated else sign, _value(node.expression))


def _value(node: exp.Expr) -> str | int | float | bool:
    from sqlglot import exp

    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Neg) and isinstance(number := _value(node.this), int | float):
        return -number
    if not isinstance(node, exp.Literal):
        raise ValueError(f"a number or a text is expected at {node.sql()!r}")
    if node.is_string:
        return node.name
    return int(node.name) if node.is_int else float(node.name)


def _joined(parts: list[models.Filter], all_hold: bool) -> models.Filter:
    from qdrant_client import models

    if len(parts) == 1:
        return parts[0]
    return models.Filter(must=list(parts)) if all_hold else models.Filter(should=list(parts))


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
