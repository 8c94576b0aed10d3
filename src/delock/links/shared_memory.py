"""The channel between two ranks of one host: messages lie in memory that both have mapped, in slots, and a socket reports them.

What there is. A socket, and so gloo, copies a tensor from process to process through the kernel. Linux can map the same pages into two
processes instead, so that a tensor of the receiver is the memory that the sender has written to: one copy, or 0.5 ms for 8 MB where bare
gloo takes 1.7 ms (benchmarks/overhead). torch.multiprocessing does this for a tensor at a time.

Why that is not enough. New memory for every message is slow: the kernel has to clear each page when it is first touched, and to map it in
both processes. So memory must be written to again, and for that the sender has to learn when the receiver needs it no longer. That is
not when the message has been read: the graph of a batch keeps its input until the error comes back, many ticks later, a label lives
until the loss, and a checkpoint holds whatever it has pulled. torch frees the memory of a tensor when the last of its views has died, but
reports it nowhere.

What we do. A slot is memory that both ends map once. The receiver makes every tensor of a message from one memoryview of the slot
(torch.frombuffer), so that their storages are all that refers to it: slices, detached aliases and what a graph has saved share a storage.
When the last storage dies so does the memoryview, a weak reference to it reports that, and the slot goes back to the sender:

    sender                                            receiver
    packs a message into a slot that is free
    SENT   slot, length                      ------>
                                             <------  TAKEN         the stage receives it: its tensors are views of the slot
                                             <------  FREE   slot   the last of them has died: the slot may be written to again
    SLOT   slot, size, and its memory        ------>                before the SENT where no free slot was large enough

So a sender never waits for a slot, it makes one, in place of a free one that is too small if there is any: there are as many as were in
use at one time, of the sizes that came. FREE does not travel by itself, it goes ahead of the next record. The sender waits for TAKEN
alone, when `depth` messages are on their way.

Memory goes to the peer through the socket, as a file descriptor without a name: nothing of it can be left behind, however a process ends,
and a peer that is gone ends every wait for it at once. Linux only.
"""

from __future__ import annotations

import mmap
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

from delock.errors import LinkError
from delock.links.message import Message, MessageName
from delock.links.wire import Buffer, MessageLayout, buffer_views, pack, unpack_borrowed

try:
    import fcntl
except ImportError:  # Windows has neither this nor such memory
    fcntl = None  # type: ignore[assignment]

LIMIT = 30 * 60  # seconds of the longest wait, as gloo's
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_ADD_SEALS") else 0  # Linux
PAGE = 4096  # bytes: slots are of whole pages, so that messages that differ little need no new one
RECORD = struct.Struct("=iiq")  # event, slot, bytes of a message or of a slot; the socket carries nothing else
READ = 256 * RECORD.size  # bytes read at once
ANCILLARY = socket.CMSG_LEN(array("i").itemsize)  # room for what comes beside them, a file descriptor: no read goes past one


class SlotEvent(IntEnum):
    """The events that records report; the chart above has all but BYE, after which nothing follows."""

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
        self.credits = depth  # messages that may be sent before the peer has to take one
        self.slots: list[Tensor] = []  # to write to
        self.sizes: list[int] = []  # of these, in bytes
        self.buffers: dict[int, tuple[MessageLayout, Buffer]] = {}  # slot -> the layout of its last message, with views of the slot
        self.free: list[int] = []  # slots without a message; the last one freed, still in the cache, is the last
        self.unannounced: dict[int, int] = {}  # slots that the peer does not know yet -> file descriptors
        self.chosen = 0  # the slot packed last
        self.theirs: dict[int, memoryview] = {}  # the peer's slots, to read from
        self.descriptors: deque[int] = deque()  # of the peer's slots to come
        self.arrived: deque[tuple[int, int]] = deque()  # messages that have not been taken: slot, length
        self.borrowed: dict[int, object] = {}  # slots of the peer's -> weak references, which report that no tensor is left there
        self.released: deque[int] = deque()  # slots of the peer's without a tensor, of which it does not know yet
        self.incomplete = b""  # the beginning of a record whose end has not come
        self.ended = False  # the peer sends nothing more

    # ---- sending ---------------------------------------------------------------------------------------------------------------------

    def pack(self, name: MessageName, message: Message) -> tuple[tuple[int, int], int]:
        """Lays a message out in a slot, without a copy in between."""
        length = len(pack(name, message, into=self._buffer)[0])
        return (self.chosen, length), length

    def _buffer(self, layout: MessageLayout) -> Buffer:
        """Chooses a slot; its views are there already where the message before had the same layout."""
        chosen = self.chosen = self._slot(layout.length)
        before, buffer = self.buffers.get(chosen, (None, None))
        if buffer is None or before is not layout:
            buffer = buffer_views(self.slots[chosen][: layout.length], layout)
            self.buffers[chosen] = layout, buffer
        return buffer

    def _slot(self, length: int) -> int:
        if self._fitting(length) is None:
            self._read(socket.MSG_DONTWAIT)  # of slots that have become free
        chosen = self._fitting(length)
        if chosen is None:
            chosen = self._new_slot(length)
        if chosen in self.free:
            self.free.remove(chosen)
        return chosen

    def _fitting(self, length: int) -> int | None:
        """Returns the smallest free slot that is large enough."""
        large = [slot for slot in reversed(self.free) if self.sizes[slot] >= length]
        return min(large, key=self.sizes.__getitem__, default=None)

    def _new_slot(self, length: int) -> int:
        """Makes a slot, in place of the smallest free one if there is any."""
        chosen = min(self.free, key=self.sizes.__getitem__, default=len(self.slots))
        size = -(-length // PAGE) * PAGE
        self.unannounced[chosen] = _new_memory(size)
        self.slots[chosen : chosen + 1] = [torch.frombuffer(_mapped(self.unannounced[chosen], size), dtype=torch.uint8)]
        self.sizes[chosen : chosen + 1] = [size]
        self.buffers.pop(chosen, None)
        return chosen

    def post(self, packed: tuple[int, int]) -> float:
        """Reports the slot to the peer, after that has taken enough of the messages before."""
        asked = perf_counter()
        while not self.credits:
            self._read()
        waited = perf_counter() - asked
        self.credits -= 1
        slot, length = packed
        sent = RECORD.pack(SlotEvent.SENT, slot, length)
        if slot in self.unannounced:
            descriptor = self.unannounced.pop(slot)
            self._write(RECORD.pack(SlotEvent.SLOT, slot, self.sizes[slot]) + sent, [descriptor])
            os.close(descriptor)
        else:
            self._write(sent)
        return waited

    def ready(self) -> bool:
        """Returns True if a message can be posted without a wait."""
        if not self.credits:
            self._read(socket.MSG_DONTWAIT)
        return self.credits > 0

    # ---- receiving -------------------------------------------------------------------------------------------------------------------

    def receive(self) -> tuple[MessageName, Message]:
        """Returns the next message; its tensors are views of the slot, which is theirs as long as one of them lives."""
        while not self.arrived:
            self._read()
        slot, length = self.arrived.popleft()
        self._write(RECORD.pack(SlotEvent.TAKEN, slot, 0))
        memory = self.theirs[slot][:length]
        self.borrowed[slot] = weakref.ref(memory, partial(self._release, slot))
        return unpack_borrowed(memory)

    def _release(self, slot: int, memory: object) -> None:
        """Notes a slot without tensors. Nothing is sent: tensors die anywhere, in the middle of a write too."""
        self.released.append(slot)

    # ---- the socket ------------------------------------------------------------------------------------------------------------------

    def _write(self, records: bytes, descriptors: Sequence[int] = ()) -> None:
        """Sends records, and before them which slots have become free; `descriptors` go along."""
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        while self.released:
            records = RECORD.pack(SlotEvent.FREE, self.released.popleft(), 0) + records
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
            self._read()

    def _read(self, flags: int = 0) -> None:
        """Takes in what the peer has written, waiting for something unless flags are MSG_DONTWAIT. Raises OSError when the peer is gone."""
        try:
            records, beside, _, _ = self.connection.recvmsg(READ, ANCILLARY, flags)
        except BlockingIOError:
            if flags:
                return
            raise self._late() from None
        if not records:
            raise ConnectionError(f"the connection to stage {self.peer} was closed")
        for _, _, data in beside:
            self.descriptors.extend(array("i", data))
        records = self.incomplete + records
        whole = len(records) - len(records) % RECORD.size
        records, self.incomplete = records[:whole], records[whole:]
        for event, slot, length in RECORD.iter_unpack(records):
            self._note(event, slot, length)

    def _note(self, event: int, slot: int, length: int) -> None:
        match event:
            case SlotEvent.SENT:
                self.arrived.append((slot, length))
            case SlotEvent.TAKEN:
                self.credits += 1
            case SlotEvent.FREE:
                self.free.append(slot)
            case SlotEvent.SLOT:
                descriptor = self.descriptors.popleft()
                self.theirs[slot] = memoryview(_mapped(descriptor, length))
                os.close(descriptor)
            case SlotEvent.BYE:
                self.ended = True

    def _late(self) -> TimeoutError:
        return TimeoutError(f"stage {self.peer} has neither sent nor taken anything for {LIMIT // 60} minutes")

    def close(self) -> None:
        """Says goodbye, and reads until the peer has said it too."""
        self._write(RECORD.pack(SlotEvent.BYE, 0, 0))
        while not self.ended:
            self._read()
        self.connection.close()


def _new_memory(size: int) -> int:
    """Returns the file descriptor of `size` bytes of memory, whose size is for good. Raises OSError where there is no more."""
    descriptor = os.memfd_create("delock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(descriptor, 0, size)  # now: to have no page for a later write would end the process
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """Maps that memory; the descriptor need not stay open. Raises LinkError for a file that is not of that size for good."""
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:  # no such memory at all
        sealed = False
    if not sealed or os.fstat(descriptor).st_size != size:
        raise LinkError(f"a neighbour offers memory that is not {size} bytes for good: reading it could end this process")
    return mmap.mmap(descriptor, size)
