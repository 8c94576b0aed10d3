"""Lets neighbouring ranks of torchrun that are on one host find each other: they say over the process group where they listen.

Any process of the host can call at such an address, so every caller is checked: only one of the same user that brings the run's token is
let in. A caller that is sent away does not end the wait. What the group brings is read as JSON.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from delock.errors import LinkError
from delock.launch.collective import gather

PATIENCE = 60.0  # seconds that a neighbour may take to connect, after both have said that they will
SPEAK = 2.0  # seconds that a caller may take to say the token
TOKEN = 32  # bytes
CREDENTIALS = struct.Struct("=iII")  # process, user, group


def here() -> str | None:
    """Returns the running kernel and its network namespace, which ranks share whose sockets can meet; None where these cannot be read."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/net")
    except OSError:
        return None


def meet(peers: Iterable[int]) -> dict[int, socket.socket]:
    """Returns a socket to each neighbour on this host. Every rank listens for the one above, and calls on the one below.

    The kernel picks an address outside the file system, which is free again when the socket is closed. Raises LinkError if nobody comes.
    """
    rank, host, token = dist.get_rank(), here(), secrets.token_bytes(TOKEN)
    with socket.socket(socket.AF_UNIX) as listener:
        if host is not None:
            listener.bind("")
            listener.listen(8)
        own = json.dumps([host, listener.getsockname().hex() if host else "", token.hex()])
        places = [_place(said) for said in gather(own.encode())]
        near = [peer for peer in sorted(peers) if host is not None and places[peer][0] == host]
        return {peer: _call(*places[peer][1:]) if peer < rank else _accept(listener, token, peer) for peer in near}


def _place(said: bytes) -> tuple[str | None, bytes, bytes]:
    """Returns host, address and token of a rank. Raises LinkError for anything else."""
    match json.loads(said):
        case [str() | None as host, str(address), str(token)]:
            return host, bytes.fromhex(address), bytes.fromhex(token)
        case _:
            raise LinkError(f"this is not the place of a rank: {said[:80]!r}")


def _call(address: bytes, token: bytes) -> socket.socket:
    """Calls on the rank that listens there."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    if not _of_same_user(connection):
        connection.close()
        raise LinkError("the place where a neighbour should listen is held by another user")
    connection.sendall(token)
    return connection


def _accept(listener: socket.socket, token: bytes, peer: int) -> socket.socket:
    """Returns the first caller that belongs to this run."""
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        if _of_same_user(connection) and _says(connection, token):
            connection.settimeout(None)
            return connection
        connection.close()
    raise LinkError(f"stage {peer} is on this host, but has not connected within {PATIENCE:.0f} s")


def _says(connection: socket.socket, token: bytes) -> bool:
    connection.settimeout(SPEAK)
    try:
        return secrets.compare_digest(connection.recv(TOKEN, socket.MSG_WAITALL), token)
    except OSError:
        return False


def _of_same_user(connection: socket.socket) -> bool:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(found)[1]) == os.getuid()
