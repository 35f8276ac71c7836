"""Filters: the SQL conditions of searches, parsed and checked before anything evaluates them.

    comparisons and arithmetic of columns and literals, AND, OR, NOT, IN, BETWEEN, LIKE, IS NULL

Whatever else SQL has (functions, subqueries, casts of columns) is refused: a condition may come from a stranger, and
its cost must follow from the number of rows alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlglot import Dialect, exp

MAX_LENGTH = 20_000  # characters of a condition
MAX_NESTING = 40  # brackets, NOTs and signs within one another


def parse_condition(condition: str, columns: Sequence[str]) -> exp.Expr:
    """The condition as a tree, with the columns named as they are stored.

    Raises ValueError naming what is not understood or not allowed, or the columns that there are.
    """
    try:
        if len(condition) > MAX_LENGTH:
            raise ValueError(f"it has {len(condition):,} characters; at most {MAX_LENGTH:,} are accepted")
        tree = _parsed(condition)
        _check_nodes(tree)
        _name_columns(tree, columns)
    except ValueError as error:
        shown = condition if len(condition) <= 200 else f"{condition[:200]}..."
        raise ValueError(f"filter {shown!r}: {error}") from None
    return tree


def lance_sql(tree: exp.Expr) -> str:
    """A parsed condition as Lance reads it: names in backticks, no comments."""
    return tree.sql(dialect=_dialect(), identify=True, comments=False)


@lru_cache(1)
def _dialect() -> type[Dialect]:
    """Standard SQL, and names in backticks as Lance writes them."""
    from sqlglot import Dialect, tokens

    class LanceDialect(Dialect):
        class Tokenizer(tokens.Tokenizer):
            IDENTIFIERS = ["`", '"']  # noqa: RUF012

    return LanceDialect


def _parsed(condition: str) -> exp.Expr:
    import sqlglot
    from sqlglot.errors import SqlglotError

    depth = 0
    for bracket in re.findall(r"[()]", condition):
        depth += 1 if bracket == "(" else -1
        if depth > MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} brackets within one another")
    try:
        trees = sqlglot.parse(condition, dialect=_dialect())
    except RecursionError:
        raise ValueError(f"more than {MAX_NESTING} operators within one another") from None
    except SqlglotError as error:
        detail = getattr(error, "errors", [])
        where = f" at {detail[0]['highlight']!r}" if detail and detail[0].get("highlight") else ""
        raise ValueError(f"it cannot be parsed{where or '; it may end too early'}") from None
    if len(trees) != 1 or trees[0] is None:
        raise ValueError("give one condition")
    return trees[0]


@lru_cache(1)
def _allowed() -> tuple[type[exp.Expr], ...]:
    from sqlglot import exp

    comparisons = (exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.In, exp.Between, exp.Is)
    patterns = (exp.Like, exp.ILike, exp.Escape)
    arithmetic = (exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Neg)
    values = (exp.Column, exp.Identifier, exp.Literal, exp.Boolean, exp.Null)
    return (exp.And, exp.Or, exp.Not, exp.Paren, *comparisons, *patterns, *arithmetic, *values)


def _check_nodes(tree: exp.Expr) -> None:
    """Raises ValueError for what is not allowed. Without recursion: a stranger chose the depth."""
    from sqlglot import exp

    allowed = _allowed()
    stack: list[tuple[exp.Expr, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if type(node) not in allowed:
            if _is_date(node):
                continue
            raise ValueError(f"{_word(node)} is not allowed; use comparisons, AND, OR, NOT, IN, BETWEEN, LIKE, IS NULL")
        # A chain of ANDs or ORs is a list, however it was parsed.
        depth += not isinstance(node, exp.Connector)
        if depth > 2 * MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} operators within one another")
        if isinstance(node, exp.In) and (node.args.get("query") or node.args.get("unnest") or not node.expressions):
            raise ValueError("IN takes a list of values in brackets")
        if isinstance(node, exp.Between) and node.args.get("symmetric"):
            raise ValueError("BETWEEN SYMMETRIC is not allowed")
        stack += [(child, depth) for child in node.iter_expressions()]
    if isinstance(tree, exp.Literal | exp.Neg | exp.Null):
        raise ValueError("it is a value and not a condition")


def _is_date(node: exp.Expr) -> bool:
    """Whether it is `date '2026-01-31'` or `timestamp '...'`: a literal, which sqlglot gives as a cast."""
    from sqlglot import exp

    return type(node) is exp.Cast and isinstance(node.this, exp.Literal) and node.to.this.name in ("DATE", "TIMESTAMP")


def _word(node: exp.Expr) -> str:
    """What the user wrote, or nearly: the name of a function, or the kind of expression."""
    from sqlglot import exp

    if isinstance(node, exp.Anonymous):
        return f"the function {node.name}"
    return f"the function {node.sql_name().lower()}" if isinstance(node, exp.Func) else type(node).__name__.upper()


def _name_columns(tree: exp.Expr, columns: Sequence[str]) -> None:
    """Replace every column's name by the stored one, which may differ in case where it is not quoted."""
    from sqlglot import exp

    for column in tree.find_all(exp.Column):
        name = ".".join(part.name for part in column.parts)
        found = [name] if name in columns else [one for one in columns if one.lower() == name.lower()]
        if len(found) != 1 or isinstance(column.this, exp.Star):
            raise ValueError(f"no column {name!r}; there are {', '.join(columns)}")
        column.set("this", exp.to_identifier(found[0], quoted=True))
