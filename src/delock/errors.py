"""Defines the errors that Delock raises on purpose, and shows those of the user's own code."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWN = "raised within "  # begins the note on an exception of the user's own code


class DelockError(Exception):
    """The base of every error below."""


class UsageError(DelockError, ValueError):
    """Raised for bad input: the message says in the user's words what is wrong, and the remedy. The command line then exits with 2."""


class StageFailed(DelockError):
    """Raised if a stage raised, died or hung: the message names the stage, the op and the batch, and shows the original traceback."""


class NonFinite(UsageError):
    """Raised if a loss becomes infinite or NaN: the message names the batch and the stage.

    batch, part: of the loss, where they are known; parts: those of a batch; updates: those that the stage had made.
    """

    def __init__(self, message: str, *, batch: int | None = None, part: int = 0, parts: int = 1, updates: int = 0) -> None:
        super().__init__(message)
        self.batch, self.part, self.parts, self.updates = batch, part, parts, updates


class Stopped(DelockError):
    """Raised inside a stage that ends at an agreed tick, before the end of its run."""

    def __init__(self, tick: int) -> None:
        super().__init__(f"the run ends at tick {tick}")
        self.tick = tick


class Concluded(DelockError):
    """Raised inside a stage in front of an evaluation, where the run turns out to be shorter than planned; batches: its length now."""

    def __init__(self, batches: int) -> None:
        super().__init__(f"the run ends with {batches} batches")
        self.batches = batches


class PlanError(DelockError):
    """Raised for a plan that cannot be executed: the message shows its chart, and what waits for what."""


class LinkError(DelockError):
    """Raised for a message that was not due: the two stages do not follow the same plan."""


def said(error: BaseException) -> str:
    """Returns an exception of the user's code in one line: its class, its first words, and the line of the user's code it came from."""
    words = "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]
    own = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "delock")
    ]
    return words + (own[-1] if own else "")


@contextmanager
def users_own(what: str) -> Iterator[None]:
    """Notes on an exception that is raised within the block that the user's own code raised it, and when that was called."""
    try:
        yield
    except DelockError:
        raise
    except Exception as error:
        error.add_note(f"{OWN}{what}, which Delock called")
        raise


def is_users_own(error: BaseException) -> bool:
    """Says whether an exception passed a block of `users_own`."""
    return any(note.startswith(OWN) for note in getattr(error, "__notes__", ()))
