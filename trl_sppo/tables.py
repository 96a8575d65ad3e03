"""Tables that the commands print."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


WIDEST = 10_000  # rich shortens no cell of a table up to this width


def as_table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDEST) -> str:
    """
    Lay out a table as plain text, which looks the same in a terminal, a pipe and a file.

    Args:
        columns (sequence of `str`):
            Headings.
        rows (iterable of sequences of `str`):
            Cells, as many as there are headings. Columns after the first are aligned to the right.
        width (`int`, *optional*):
            Longest line. Cells are then wrapped and aligned to the left, with an empty line between rows. By default,
            each row is one line.

    Returns:
        `str`: lines without colours and trailing spaces.
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
