"""Records what a rank is doing in a few bytes of shared memory, written by the rank at every op and read by its watcher."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

Buffer: TypeAlias = "bytearray | memoryview"

_RECORD = struct.Struct("=Qii32s96s")  # moves, state, peer, op, batch
_HEAD = struct.Struct("=Qii")
_UNBORN, _SETUP, _COMPUTES, _WAITS = range(4)


@dataclass(frozen=True)
class Position:
    """Holds the position of a rank at one moment. `moves` grows with every action of the rank; `waits_for` is a peer's rank or None."""

    moves: int
    born: bool
    begun: bool
    waits_for: int | None
    op: str
    batch: str

    def __str__(self) -> str:
        """Returns the position for a sentence: 'in F12 (epoch 1, batch 3)', 'before its first op'."""
        if not self.op:
            return "before its first op"
        return f"in {self.op}" + (f" ({self.batch})" if self.batch else "")

    def told(self) -> str:
        """Returns the position with the peer, if the rank waits for one: 'in F12 (epoch 1, batch 3), where it waits for stage 1'."""
        return str(self) + (f", where it waits for stage {self.waits_for}" if self.waits_for is not None else "")


class Progress:
    """Holds one rank's record. A write takes about half a microsecond and no system call, so every op is recorded.

    A reader in another process may see a record half written; the watcher acts only on one that has not changed for a long time.
    """

    SIZE = _RECORD.size

    def __init__(self, memory: Buffer | None = None) -> None:
        """memory: SIZE bytes shared with the watcher; without it the record belongs to this process."""
        self._memory: Buffer = bytearray(self.SIZE) if memory is None else memory
        self._moves = 0

    def born(self) -> None:
        """Records that the rank's own code runs; setting up may take any time."""
        self._head(_SETUP, -1)

    def at(self, op: str, batch: str = "") -> None:
        """Records the begin of an op, e.g. at("F12", "epoch 1, batch 3"); 32 and 96 bytes are kept. The watch begins with the first op."""
        self._moves += 1
        _RECORD.pack_into(self._memory, 0, self._moves, _COMPUTES, -1, op.encode(), batch.encode())

    def wait_for(self, peer: int) -> None:
        """Records that the op waits for a message from or to rank `peer`; this stays if the wait raises, because that may be an echo."""
        self._head(_WAITS, peer)

    def go_on(self) -> None:
        """Records that the wait is over and the op computes."""
        self._head(_COMPUTES, -1)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Records, within the block, work beside the ops, such as a user's callback; like setting up it may take any time."""
        _, state, peer = _HEAD.unpack_from(self._memory)
        self._head(_SETUP, peer)
        try:
            yield
        finally:
            self._head(state, peer)

    def read(self) -> Position:
        """Returns the record; a watcher can call it, too, on the same memory in another process."""
        moves, state, peer, op, batch = _RECORD.unpack_from(self._memory)
        waits_for = peer if state == _WAITS else None
        return Position(moves, state != _UNBORN, state in (_COMPUTES, _WAITS), waits_for, _text(op), _text(batch))

    def raw(self) -> bytes:
        """Returns the record's SIZE bytes; a Progress on a copy of them reads the same."""
        return bytes(self._memory)

    @property
    def moves(self) -> int:
        """Returns the number of times that the record was written."""
        return int(_HEAD.unpack_from(self._memory)[0])

    def _head(self, state: int, peer: int) -> None:
        self._moves += 1
        _HEAD.pack_into(self._memory, 0, self._moves, state, peer)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="ignore")
