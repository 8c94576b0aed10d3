"""What links of runs with replay buffers have in common: such a run is repeated from its trace, and never saved in its middle."""

from __future__ import annotations

from typing import NoReturn

from delock.links.message import Message, Name


class Unresumed:
    """The part of a Link that checkpoints need, refused."""

    def pull(self, source: int, count: int) -> NoReturn:
        """See Link."""
        self._refuse()

    def push(self, source: int, messages: list[tuple[Name, Message]]) -> NoReturn:
        """See Link."""
        self._refuse()

    def state(self) -> NoReturn:
        """See Link."""
        self._refuse()

    def load(self, state: None) -> NoReturn:
        """See Link."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")
