"""Lines that are printed at once, and kept in a file: what is measured is not lost if the next measurement fails."""

from pathlib import Path

WIDTH = 12  # of a column at least; columns are as wide as their headings


class Rows:
    """Text and Markdown tables, line by line.

    Args:
        output: a file that the lines are appended to; None: they are only printed.
    """

    def __init__(self, output: Path | None = None) -> None:
        self._output, self._widths = output, list[int]()

    def say(self, text: str = "") -> None:
        """A line of text."""
        print(text, flush=True)
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def note(self, text: str) -> None:
        """How far it is: only printed."""
        print(text, flush=True)

    def head(self, first: str, *others: str) -> None:
        """Begin a table; the first column has room for names."""
        self._widths = [max(len(first), 24), *(max(WIDTH, len(name)) for name in others)]
        self.say()
        self.row(first, *others)
        self.row(*("-" * width for width in self._widths))

    def row(self, *cells: str) -> None:
        """A row of the table."""
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        self.say("| " + " | ".join(padded) + " |")
