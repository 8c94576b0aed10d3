"""Joins neighbouring ranks by channels: those of one host find each other, and share memory where they may."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from delock.errors import UsageError
from delock.launch.progress import Progress
from delock.links.gloo import DistributedChannel
from delock.links.nccl import Courier
from delock.links.rank_link import Channel, RankLink
from delock.links.shared_memory import SharedChannel

PATIENCE = 60.0  # seconds that a neighbour may take to connect, after both have said that they will


def refuse_link(kind: str, device: str) -> None:
    """Raises UsageError for a kind that cannot be had on this system and device."""
    if kind == "shared" and torch.device(device).type != "cpu":
        raise UsageError(f'link is "shared", but tensors on {device} do not lie in memory that processes share: use link "auto"')
    if kind == "shared" and _host() is None:
        raise UsageError('link is "shared", but this system lacks what it takes (Linux with memfd_create and /proc): use link "auto"')


def shares(kind: str, device: str) -> bool:
    """Says whether that kind joins processes of one host by memory that they share."""
    return kind != "gloo" and torch.device(device).type == "cpu" and _host() is not None


def connect(kind: str, depth: dict[int, int], device: torch.device, progress: Progress) -> RankLink:
    """Returns this rank's link to its neighbours, the ranks in `depth`: how many messages may wait for each. All ranks call it together.

    kind: "gloo", the process group (between GPUs NCCL); "shared", memory that two processes share; "auto", shared memory where both are
    on one host and the tensors on the CPU, else the process group.
    Raises UsageError where the kind is "shared" and a neighbour is on another host.
    """
    met = _meet(depth) if kind != "gloo" and device.type == "cpu" else {}
    if kind == "shared" and (away := depth.keys() - met.keys()):
        pair = sorted((dist.get_rank(), min(away)))
        raise UsageError(f'link is "shared", but stages {pair[0]} and {pair[1]} are on different hosts: use link "auto"')
    courier = Courier(depth, device, "nccl") if device.type == "cuda" and "nccl" in dist.get_backend_config() else None
    channels: dict[int, Channel] = {}
    for peer, messages in depth.items():
        if peer in met:
            channels[peer] = SharedChannel(peer, messages, met[peer])
        else:
            channels[peer] = DistributedChannel(peer, messages, device, courier)
    return RankLink(channels, progress)


def _meet(peers: dict[int, int]) -> dict[int, socket.socket]:
    """Returns a socket to each neighbour on this host. Every rank listens for the one above, and calls on the one below.

    The kernel picks an address outside the file system, which is free again when the socket is closed.
    """
    rank, host = dist.get_rank(), _host()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PATIENCE)
        if host is not None:
            listener.bind("")
            listener.listen(1)
        places: list[tuple[str | None, bytes]] = [(None, b"")] * dist.get_world_size()
        dist.all_gather_object(places, (host, listener.getsockname()))
        here = [peer for peer in sorted(peers) if host is not None and places[peer][0] == host]
        return {peer: _call(places[peer][1]) if peer < rank else listener.accept()[0] for peer in here}


def _call(address: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _host() -> str | None:
    """Returns the running kernel and its network namespace, which ranks share whose sockets can meet; None where these cannot be read."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/net")
    except OSError:
        return None
