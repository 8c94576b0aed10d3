"""Describes how a rank failed, finds the failure that caused the others, and turns it into an error message."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from delock.errors import StageFailed, UsageError
from delock.launch.progress import Position

# Messages of gloo, NCCL and the store if the other end is gone.
_LOST_PEER = re.compile(r"gloo|nccl|tcpstore|connection .*(closed|reset|refused)|broken pipe", re.IGNORECASE)
_HUNG_UP = re.compile(r"connection .*(closed|reset)|broken pipe", re.IGNORECASE)  # the other process is gone, or has closed
_DIED, _RAISED, _ECHO = range(3)  # the likelier cause comes first


@dataclass(frozen=True)
class Failure:
    """Holds the failure of one rank; it can be pickled.

    `echo`: it looks like a consequence of another rank's failure. `usage`: the class of an error of bad input, which is reported without a
    traceback, and `facts`: the attributes of that error.
    """

    rank: int
    where: str
    what: str
    details: str = ""
    usage: type[UsageError] | None = None
    severity: int = _RAISED
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def echo(self) -> bool:
        return self.severity == _ECHO

    @property
    def headline(self) -> str:
        """Returns what it says in one line, without a traceback."""
        return str(self).partition("\n")[0]

    def error(self) -> StageFailed | UsageError:
        """Returns the exception to raise in the user's process."""
        if self.usage:
            error = self.usage(self.what)
            vars(error).update(self.facts)
            return error
        return StageFailed(str(self))

    def __str__(self) -> str:
        text = f"stage {self.rank} {self.what if self.severity == _DIED else 'failed'} {self.where}"
        if self.severity != _DIED:
            text += f": {self.what}"
        return text + (f"\n\n{self.details.strip()}" if self.details else "")


def raised(rank: int, error: BaseException, at: Position) -> Failure:
    """Returns the failure of an exception. An echo is a RuntimeError raised while waiting for a peer, or one about a lost connection."""
    what = "".join(traceback.format_exception_only(error)).strip()
    kinds = (kind for kind in type(error).__mro__ if issubclass(kind, UsageError) and kind.__module__.startswith("delock."))
    usage = next(kinds, None)  # not a user's own subclass, whose arguments are unknown
    chain = _chain(error)
    lost = any(isinstance(one, RuntimeError | OSError) and (at.waits_for is not None or _LOST_PEER.search(str(one))) for one in chain)
    trace = "".join(traceback.format_exception(error))
    severity = _ECHO if lost and not usage else _RAISED
    return Failure(rank, str(at), str(error) if usage else what, trace, usage, severity, vars(error) if usage else {})


def hung_up(error: BaseException) -> bool:
    """Returns True if the error says that the process at the other end of a connection has closed it."""
    return any(_HUNG_UP.search(str(one)) for one in _chain(error))


def died(rank: int, exit_code: int, at: Position, stack: str) -> Failure:
    """Returns the failure of a process that ended without a message; a negative exit code is the number of a signal."""
    if exit_code >= 0:
        how = f"ended with exit code {exit_code}" + ("" if at.born else " while it started (its own words are above)")
    else:
        name = signal.Signals(-exit_code).name
        hint = " (the system does so when memory runs out)" if name == "SIGKILL" else ""
        how = f"was killed by {name}{hint}"
    return Failure(rank, str(at), how, stack, severity=_DIED)


def first(failures: Sequence[Failure]) -> Failure:
    """Returns the failure that caused the others: a death, else the first exception that is not an echo, else the first."""
    return min(failures, key=lambda failure: failure.severity)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


class Ended(SystemExit):
    """Ends the program of one rank of torchrun, which has said why; `code` is the exit code, and the text names the stage at fault."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
