"""Meets the other ranks at the store of torchrun, or of a program that sets its variables, in a way that a signal can end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed.rendezvous import rendezvous

from delock.errors import UsageError

_LOOK = 0.2  # seconds between two looks
_TOLD = 30.0  # seconds after which a rank says that it waits


def store_name() -> str:
    """Returns the name of the store for messages."""
    return f"the store of the rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def meet(rank: int, world: int, limit: timedelta, waiting: Callable[[], None]) -> Any:
    """Returns the store, once this rank has reached it. waiting: is called again and again until then, and may raise.

    torch waits in C++, where no handler of a signal runs, so it does on a thread of its own. Raises UsageError if the store is not reached
    within `limit`.
    """
    found: list[Any] = []

    def reach() -> None:
        try:
            found.append(next(rendezvous("env://", rank, world, timeout=limit))[0])
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=reach, name="delock-rendezvous", daemon=True)
    thread.start()
    looks = 0
    while thread.is_alive():
        thread.join(_LOOK)
        waiting()
        looks += 1
        if looks == _TOLD / _LOOK:
            print(f"stage {rank} waits for {store_name()}, which rank 0 or torchrun starts", file=sys.stderr, flush=True)
    if isinstance(found[0], Exception):
        why = str(found[0]).partition("\n")[0]
        raise UsageError(f"stage {rank} could not reach {store_name()}: {why}; see that MASTER_ADDR and MASTER_PORT are rank 0's")
    return found[0]
