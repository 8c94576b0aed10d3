"""Refuses runs in processes for which too few files may be open at once."""

from __future__ import annotations

from delock.cli.config import TrainConfig
from delock.cli.ranks import ranks
from delock.errors import UsageError

PROGRAM, STAGE = 24, 8  # files: of the program itself, and its ends of what joins it to a stage's process


def refuse_few_handles(config: TrainConfig) -> None:
    """Raises UsageError if a resolved run's processes could not be joined."""
    try:
        from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
    except ImportError:  # not on this system
        return
    most, K = getrlimit(RLIMIT_NOFILE)[0], config.network.stages or 1
    least = PROGRAM + STAGE * K
    if config.machine.workers == "processes" and K > 1 and ranks() is None and RLIM_INFINITY != most < least:
        raise UsageError(
            f"this program may have {most} files open at once (ulimit -n), and {K} stages in processes need {least}: "
            "raise the limit with ulimit -n 1024, or use --workers inline"
        )
