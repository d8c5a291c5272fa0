"""Tables of words that studies print and write."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """At a terminal."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown, with an empty line after it."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([*lines, ""])
