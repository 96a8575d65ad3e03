"""Tables that the commands print."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


WIDEST = 10_000  # rich shortens no cell of a table up to this width


def as_table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDEST) -> str:
    """
    A table as plain text without colours, in a terminal and a pipe. Columns after the first are aligned to the right.
    Below the default width, cells are wrapped and aligned to the left, with an empty line between rows.
    """
    wraps = width < WIDEST
    table = Table(box=None, pad_edge=False, padding=(0, 2, int(wraps), 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if wraps or i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # a name may hold what rich would read as markup
    console = Console(file=StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
