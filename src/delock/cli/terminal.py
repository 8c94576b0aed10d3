"""Shows a run in a terminal; without a terminal it prints plain lines from time to time."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from delock.cli.tables import Cells

PLAIN_SECONDS = 10.0  # between two lines of a run without a terminal


class _Console(Console):
    """Leaves it to its user what a reader that is gone means; rich itself would end the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Terminal:
    """Shows one phase at a time: loading, measuring, training.

    quiet: shows nothing (ranks above 0). goes_on: what it shows is not the result, so where it cannot be written any more, because the disk
    is full or its reader is gone, it says so once on stderr and then shows nothing.
    """

    def __init__(self, *, quiet: bool = False, goes_on: bool = False) -> None:
        self._goes_on = goes_on
        self.console = _Console(quiet=quiet, highlight=False, markup=False, emoji=False)
        if not self.console.is_terminal:
            self.console.width = 140  # a file has no width to fit
        self._bar: Progress | None = None
        self._what = ""
        self._printed = time.monotonic()

    def line(self, text: str = "") -> None:
        """Prints a line of text."""
        with self._written():
            self.console.print(text, soft_wrap=True)
        self._printed = time.monotonic()

    def table(self, head: Cells, rows: Sequence[Cells], spare: Sequence[str] = ()) -> None:
        """Prints a table; all columns but the first to the right.

        In a narrow terminal the `spare` columns are left out, then the first column is folded.
        """
        for name in spare:
            if _width(head, rows) > self.console.width:
                kept = [i for i, other in enumerate(head) if other != name]
                head, rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", vertical="bottom", no_wrap=i > 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        with self._written():
            self.console.print(table)

    def phase(self, what: str, total: int | None = None) -> None:
        """Begins a phase of `total` steps, or of an unknown number."""
        self.end()
        self._what = what
        if self.console.is_terminal:
            bar = [BarColumn(), TimeRemainingColumn()] if total else []
            columns = (SpinnerColumn(), *bar, TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(what, total=total)
            self._bar.start()

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Shows the progress of the phase: in the bar, or in a line if there has been none for a while."""
        text = f"{self._what} {note or f'{done:,} of {total:,}'}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self.line(text)

    def end(self) -> None:
        """Ends the phase."""
        if self._bar is not None:
            with self._written():
                self._bar.stop()
            self._bar = None

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Goes on without output where that is asked for: a run is worth more than its log."""
        try:
            yield
        except OSError as error:
            if not self._goes_on:
                raise
            self.console.quiet = True
            with suppress(OSError):
                print(f"warning: cannot write to standard output: {error.strerror}. The run goes on, and shows no more", file=sys.stderr)


def _width(head: Cells, rows: Sequence[Cells]) -> int:
    """Returns the columns of the terminal that a table takes: two between its own."""
    longest = [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(head, *rows, strict=True)]
    return sum(longest) + 2 * (len(head) - 1)
