"""Shows a run while it goes on, in one line that changes: in a notebook or in a terminal; elsewhere a line for every evaluation."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from delock.records import EvaluationRecord, Event, Started, StepRecord

SECONDS = 0.1  # between two pictures
CELLS = 24


class ProgressBar:
    """Shows batches, loss, the time that is left and the last evaluation: `fit(..., callbacks=[delock.ProgressBar()])`."""

    def __init__(self) -> None:
        self._total, self._done = 0, 0
        self._training = self._evaluation = ""
        self._drawn = 0.0
        self._place: Callable[[str, bool], None] | None = None  # text, and whether it is the last of its line

    def __call__(self, event: Event) -> None:
        """Takes an event of `fit`."""
        match event:
            case Started():
                self._total, self._done, self._evaluation, self._place = event.batches, 0, "", _notebook() or _terminal()
            case StepRecord():
                self._done, self._training = event.batches, _training(event, self._total)
                self._draw(event.batches == self._total)
            case EvaluationRecord():
                self._evaluation = ", ".join(
                    f"{name} {value:.4g}" for name, value in {"test loss": event.test_loss, **event.metrics}.items()
                )
                self._draw(True)
                if self._place is None:
                    self._done = event.batches
                    print(self.text(), flush=True)

    def text(self) -> str:
        """Returns the line as it is now."""
        full = CELLS * self._done // max(1, self._total)
        parts = [f"{'━' * full}{'─' * (CELLS - full)} {self._done:,} of {self._total:,} batches", self._training, self._evaluation]
        return "; ".join(part for part in parts if part)

    def _draw(self, now: bool) -> None:
        if self._place and (now or time.monotonic() - self._drawn > SECONDS):
            self._drawn = time.monotonic()
            self._place(self.text(), self._done == self._total)


def _training(record: StepRecord, total: int) -> str:
    left = record.seconds / record.batches * (total - record.batches)
    return f"loss {record.loss:.4g}" + (f", {left // 60:.0f}:{left % 60:02.0f} left" if left else "")


def _notebook() -> Callable[[str, bool], None] | None:
    """Returns what shows a line below the cell that runs; None if this is no notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    handle: Any = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda text, last: handle.update({"text/plain": text}, raw=True)


def _terminal() -> Callable[[str, bool], None] | None:
    """Returns what shows a line in the terminal; None if output goes elsewhere."""
    if not sys.stdout.isatty():
        return None
    width = shutil.get_terminal_size().columns - 1
    return lambda text, last: print("\r" + text[:width].ljust(width), end="\n" if last else "", flush=True)
