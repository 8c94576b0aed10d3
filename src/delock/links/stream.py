"""Packed messages over stream sockets between two processes of one host: one socket each way, on which the other end says what has arrived.

    sender       length | message   length | message ...   ------>   receiver
                                               <------   a byte for every message that has come whole

A free-running stage needs this: one thread sends up, one takes from below, one hears from above, and none may wait for another.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from time import perf_counter

import torch
from torch import Tensor

LENGTH = struct.Struct("=q")  # bytes of the message that follows


class StreamSender:
    """Sends packed messages, each a row of uint8, in order."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.under_way = connection, 0

    def send(self, packed: Tensor) -> float:
        """Hands a message over; returns the seconds that it took until the other end had read most of it."""
        asked = perf_counter()
        self.connection.sendall(LENGTH.pack(len(packed)))
        self.connection.sendall(packed.numpy().data)
        self.under_way += 1
        return perf_counter() - asked

    def flush(self) -> None:
        """Waits until everything has arrived. Raises ConnectionError if the other end is gone."""
        while self.under_way:
            self.under_way -= len(_some(self.connection, self.under_way))

    def close(self) -> None:
        """Lets everything arrive, and says that no more will come."""
        self.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.close()


class StreamReceiver:
    """Receives packed messages in order, each in memory of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def receive(self) -> Tensor:
        """Returns the next message, waiting for it without a limit. Raises ConnectionError if the other end is gone."""
        head = bytearray(LENGTH.size)
        self._fill(memoryview(head))
        packed = torch.empty(LENGTH.unpack(head)[0], dtype=torch.uint8)
        self._fill(packed.numpy().data)
        self.connection.sendall(b"\1")
        return packed

    def _fill(self, memory: memoryview) -> None:
        while memory:
            count = self.connection.recv_into(memory)
            if not count:
                raise ConnectionError("the connection to a neighbour was closed")
            memory = memory[count:]

    def close(self) -> None:
        """Waits until the other end has nothing more to send."""
        while self.connection.recv(1):
            pass
        self.connection.close()


class StreamWays:
    """The ways of rank k to its neighbours: the socket that it shares with each carries what goes up, a second one what comes down."""

    def __init__(self, k: int, peers: Mapping[int, socket.socket]) -> None:
        self.k = k
        self.ways = {peer: (connection, another(k, peer, connection)) for peer, connection in peers.items()}

    def sender(self, peer: int) -> StreamSender:
        """Returns the way to that neighbour."""
        return StreamSender(self.ways[peer][peer < self.k])

    def receiver(self, peer: int) -> StreamReceiver:
        """Returns the way from that neighbour."""
        return StreamReceiver(self.ways[peer][peer > self.k])

    def abandon(self) -> None:
        """Ends every wait, at both ends."""
        for way in self.ways.values():
            for connection in way:
                _hang_up(connection)


def another(k: int, peer: int, first: socket.socket) -> socket.socket:
    """Returns another socket between rank k and its peer, who call together: the lower one makes the pair, and passes one end on."""
    if k > peer:
        _, [descriptor, *_], _, _ = socket.recv_fds(first, 1, 1)
        return socket.socket(fileno=descriptor)
    own, other = socket.socketpair()
    with other:
        socket.send_fds(first, [b"\0"], [other.fileno()])
    return own


def _some(connection: socket.socket, most: int) -> bytes:
    found = connection.recv(most)
    if not found:
        raise ConnectionError("the connection to a neighbour was closed")
    return found


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed, or the other end is gone
