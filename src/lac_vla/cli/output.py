"""Prints the command line's results; tables are made to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

console = Console(markup=False, highlight=False, emoji=False)
"""Prints texts as they are: paths, names and errors come from outside, and may hold square brackets."""


def show(result: RenderableType) -> None:
    """Print a result; a table that is wider than the terminal in several parts, each with the first column."""
    for part in folded(result, console.width) if isinstance(result, Table) else [result]:
        console.print(part)


def folded(table: Table, width: int) -> Iterator[Table]:
    """Divide a table's columns among as few tables as fit, so that no cell is cut; the last one has the caption."""
    first, *rest = table.columns
    leading = min(_width(first), width // 2)  # a longer one is wrapped
    room = width - leading - 1
    groups: list[list[Column]] = [[]]
    for column in rest:
        if groups[-1] and sum(map(_width, groups[-1])) + _width(column) > room:
            groups.append([])
        groups[-1].append(column)
    for number, group in enumerate(groups):
        yield _part(table, [first, *group], leading, first=number == 0, last=number == len(groups) - 1)


def _part(table: Table, columns: Sequence[Column], leading: int, *, first: bool, last: bool) -> Table:
    part = Table(
        box=table.box,
        title=table.title if first else None,
        title_justify=table.title_justify,
        caption=table.caption if last else None,
        caption_justify=table.caption_justify,
    )
    for number, column in enumerate(columns):
        needed = _width(column) if number else leading
        part.add_column(column.header, justify=column.justify, min_width=needed - 3, overflow="fold")
    for index, row in enumerate(table.rows):
        part.add_row(*([*column.cells][index] for column in columns), style=row.style)
    return part


def _width(column: Column) -> int:
    """Measure the longest word of the heading and the longest line of the cells, with the lines of the table."""
    words = str(column.header).split()
    lines = [line for cell in column.cells for line in str(cell).split("\n")]
    return max((Text(text).cell_len for text in (*words, *lines)), default=0) + 3
