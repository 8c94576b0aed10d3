"""Notices that one rank gives to all of them, itself included: numbered texts, which every rank takes in order as it needs them."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any, Protocol

from delock.launch.progress import Progress

LOOK = 0.002  # seconds between two looks into a store


class Notices(Protocol):
    """The way of notices between the ranks of a run."""

    def put(self, number: int, text: str) -> None:
        """Gives notice `number` to all ranks."""

    def take(self, number: int) -> str:
        """Waits for notice `number`, which may take any time, and returns it. Those before it are let go of."""


class NoticesHere:
    """Keeps the notices of stages that take turns in one process, where each is there before it is wanted."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def put(self, number: int, text: str) -> None:
        """Keeps a notice."""
        self.texts[number] = text

    def take(self, number: int) -> str:
        """Returns a notice."""
        return self.texts[number]


class NoticesThroughParent:
    """Sends notices to the parent process, which sends them to all ranks.

    give((number, text)): sends one; hear(): waits for the parent's next message.
    """

    def __init__(self, give: Callable[[tuple[int, str]], None], hear: Callable[[], bytes], progress: Progress) -> None:
        self.give, self.hear, self.progress = give, hear, progress

    def put(self, number: int, text: str) -> None:
        """Sends a notice."""
        self.give((number, text))

    def take(self, number: int) -> str:
        """Waits for a notice."""
        with self.progress.aside():
            found, text = pickle.loads(self.hear())
            while found < number:
                found, text = pickle.loads(self.hear())
        assert found == number
        return str(text)


class NoticesInStore:
    """Keeps notices in a store that all ranks reach. They are looked for again and again: a store that waits would hold up other calls."""

    def __init__(self, store: Any, progress: Progress) -> None:
        self.store, self.progress = store, progress

    def put(self, number: int, text: str) -> None:
        """Writes a notice into the store."""
        self.store.set(f"notice/{number}", text)

    def take(self, number: int) -> str:
        """Looks for a notice until it is there."""
        key = f"notice/{number}"
        with self.progress.aside():
            while not self.store.check([key]):
                time.sleep(LOOK)
            return bytes(self.store.get(key)).decode()
