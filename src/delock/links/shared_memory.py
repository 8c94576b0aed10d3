"""The channel between two ranks of one host: messages lie in memory that both have mapped, and a socket tells of them.

    sender                                            receiver
    packs a message into a slot that is free
    SENT   slot, length                      ------>
                                             <------  TAKEN         the stage receives it: its tensors are views of the slot
                                             <------  FREE   slot   the last of them has died: the slot may be written to again
    SLOT   slot, size, and its memory        ------>                before the SENT where no free slot was large enough

A slot stays with the tensors in it, whoever holds them: a graph, a label, a message that a checkpoint has pulled. So a sender never waits
for a slot, it makes one, in place of a free one that is too small if there is any: there are as many as were in use at one time, of
the sizes that came, FREE being told with the next word. It waits for TAKEN alone, when `depth` messages are on their way.

Memory goes to the peer through the socket, as a file descriptor without a name: nothing of it can be left behind, however a process ends,
and a peer that is gone ends every wait for it at once. Linux only.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from delock.links.message import Message, MessageName
from delock.links.wire import Buffer, MessageLayout, buffer_views, pack, unpack_borrowed

LIMIT = 30 * 60  # seconds of the longest wait, as gloo's
PAGE = 4096  # bytes: slots are of whole pages, so that messages that differ little need no new one
RECORD = struct.Struct("=iiq")  # what, slot, bytes of a message or of a slot; the socket carries nothing else
READ = 256 * RECORD.size  # bytes read at once
BESIDE = socket.CMSG_LEN(array("i").itemsize)  # room for what comes beside them, a file descriptor: no read goes past one


class SlotEvent(IntEnum):
    """What a record says."""

    SENT = 0
    TAKEN = 1
    FREE = 2
    SLOT = 3
    BYE = 4


class SharedChannel:
    """The connection to one peer over a stream socket of the Unix domain. `depth`: messages each way that the other end has not taken."""

    def __init__(self, peer: int, depth: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LIMIT, 0))
        self.peer, self.connection = peer, connection
        self.room = depth  # messages that may be sent before the peer has to take one
        self.slots: list[Tensor] = []  # to write to
        self.sizes: list[int] = []  # of these, in bytes
        self.rooms: dict[int, tuple[MessageLayout, Buffer]] = {}  # how the last message in each lies
        self.free: list[int] = []  # those without a message; the last one freed, still in the cache, is the last
        self.fresh: dict[int, int] = {}  # slots that the peer has not been told of: file descriptors
        self.chosen = 0  # the slot packed last
        self.theirs: dict[int, memoryview] = {}  # the peer's slots, to read from
        self.descriptors: deque[int] = deque()  # of the peer's slots to come
        self.arrived: deque[tuple[int, int]] = deque()  # messages that have not been taken: slot, length
        self.lent: dict[int, object] = {}  # slots of the peer's: who tells when the last tensor in it has died
        self.died: deque[int] = deque()  # slots of the peer in which no tensor is left, not yet told
        self.rest = b""  # of a record that has come in part
        self.ended = False  # the peer has nothing more to say

    # ---- sending ---------------------------------------------------------------------------------------------------------------------

    def pack(self, name: MessageName, message: Message) -> tuple[tuple[int, int], int]:
        """See Channel: straight into a slot."""
        length = len(pack(name, message, room=self._room)[0])
        return (self.chosen, length), length

    def _room(self, layout: MessageLayout) -> Buffer:
        """A slot, with the views of a message that is laid out as the one before it there."""
        chosen = self.chosen = self._slot(layout.length)
        before, room = self.rooms.get(chosen, (None, None))
        if room is None or before is not layout:
            room = buffer_views(self.slots[chosen][: layout.length], layout)
            self.rooms[chosen] = layout, room
        return room

    def _slot(self, length: int) -> int:
        if self._fitting(length) is None:
            self._hear(socket.MSG_DONTWAIT)  # of slots that have become free
        chosen = self._fitting(length)
        if chosen is None:
            chosen = min(self.free, key=self.sizes.__getitem__, default=len(self.slots))
            size = -(-length // PAGE) * PAGE
            self.fresh[chosen] = _memory(size)
            self.slots[chosen : chosen + 1] = [_mapped(self.fresh[chosen], size)]
            self.sizes[chosen : chosen + 1] = [size]
            self.rooms.pop(chosen, None)
        if chosen in self.free:
            self.free.remove(chosen)
        return chosen

    def _fitting(self, length: int) -> int | None:
        """The smallest free slot that is large enough."""
        large = [slot for slot in reversed(self.free) if self.sizes[slot] >= length]
        return min(large, key=self.sizes.__getitem__, default=None)

    def post(self, packed: tuple[int, int]) -> float:
        """See Channel."""
        asked = perf_counter()
        while not self.room:
            self._hear()
        waited = perf_counter() - asked
        self.room -= 1
        slot, length = packed
        sent = RECORD.pack(SlotEvent.SENT, slot, length)
        if slot in self.fresh:
            descriptor = self.fresh.pop(slot)
            self._tell(RECORD.pack(SlotEvent.SLOT, slot, self.sizes[slot]) + sent, [descriptor])
            os.close(descriptor)
        else:
            self._tell(sent)
        return waited

    # ---- receiving -------------------------------------------------------------------------------------------------------------------

    def receive(self) -> tuple[MessageName, Message]:
        """See Channel: the tensors are views of the slot, which is theirs as long as one of them lives."""
        while not self.arrived:
            self._hear()
        slot, length = self.arrived.popleft()
        self._tell(RECORD.pack(SlotEvent.TAKEN, slot, 0))
        held = self.theirs[slot][:length]
        self.lent[slot] = weakref.ref(held, partial(self._died, slot))
        return unpack_borrowed(held)

    def _died(self, slot: int, held: object) -> None:
        self.died.append(slot)

    # ---- the socket ------------------------------------------------------------------------------------------------------------------

    def _tell(self, records: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send records, and before them which slots have become free; `descriptors` go along."""
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        while self.died:
            records = RECORD.pack(SlotEvent.FREE, self.died.popleft(), 0) + records
        while records:
            try:
                if beside:
                    sent = self.connection.sendmsg([records], beside, socket.MSG_DONTWAIT)
                else:
                    sent = self.connection.send(records, socket.MSG_DONTWAIT)
                records, beside = records[sent:], []
            except BlockingIOError:  # the peer has much to read, and may be stuck alike until we read what it has written
                self._until_ready()

    def _until_ready(self) -> None:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN | select.POLLOUT)
        ready = poll.poll(1000 * LIMIT)
        if not ready:
            raise self._late()
        if ready[0][1] & select.POLLIN:
            self._hear()

    def _hear(self, flags: int = 0) -> None:
        """Take in what the peer has told, waiting for something unless flags are MSG_DONTWAIT. Raises OSError when the peer is gone."""
        try:
            records, beside, _, _ = self.connection.recvmsg(READ, BESIDE, flags)
        except BlockingIOError:
            if flags:
                return
            raise self._late() from None
        if not records:
            raise ConnectionError(f"the connection to stage {self.peer} was closed")
        for _, _, data in beside:
            self.descriptors.extend(array("i", data))
        records = self.rest + records
        whole = len(records) - len(records) % RECORD.size
        records, self.rest = records[:whole], records[whole:]
        for what, slot, length in RECORD.iter_unpack(records):
            match what:
                case SlotEvent.SENT:
                    self.arrived.append((slot, length))
                case SlotEvent.TAKEN:
                    self.room += 1
                case SlotEvent.FREE:
                    self.free.append(slot)
                case SlotEvent.SLOT:
                    descriptor = self.descriptors.popleft()
                    self.theirs[slot] = _mapped(descriptor, length).numpy().data
                    os.close(descriptor)
                case SlotEvent.BYE:
                    self.ended = True

    def _late(self) -> TimeoutError:
        return TimeoutError(f"stage {self.peer} has said and heard nothing for {LIMIT // 60} minutes")

    def close(self) -> None:
        """See Channel."""
        self._tell(RECORD.pack(SlotEvent.BYE, 0, 0))
        while not self.ended:
            self._hear()
        self.connection.close()


def _memory(size: int) -> int:
    """File descriptor of so many bytes of memory. Raises OSError where there is no more."""
    descriptor = os.memfd_create("delock")
    os.posix_fallocate(descriptor, 0, size)  # now: to have no page for a later write would end the process
    return descriptor


def _mapped(descriptor: int, size: int) -> Tensor:
    """That memory; the descriptor need not stay open."""
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
