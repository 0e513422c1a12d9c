"""Tables of results: in Markdown for files, aligned for the screen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


def markdown_table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of texts.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    first, *others = (f"| {' | '.join(line)} |" for line in (heads, *body))
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def markdown_of(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """The fields ``columns`` of each row; empty where a row has none.

    >>> print(markdown_of([{"a_b": 1}, {"c": 2}], ["a_b", "c"]))
    | a b | c |
    |---|---|
    | 1 |  |
    |  | 2 |
    """
    heads = [column.replace("_", " ") for column in columns]
    return markdown_table(heads, ([_text(row.get(column)) for column in columns] for row in rows))


def screen_table(rows: Sequence[Row]) -> Table:
    """All fields that hold one value, a line for each row."""
    fields = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list | dict))
    numbers = {name for name in fields if all(isinstance(row.get(name), int | float | None) for row in rows)}
    table = Table(box=None, pad_edge=False)
    for name in fields:
        table.add_column(name.replace("_", " "), justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in fields))
    return table


def _text(value: Any) -> str:
    return "" if value is None else str(value)
