"""Joins neighbouring ranks by channels: those of one host find each other, and share memory where they may."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import torch
import torch.distributed as dist

from delock.errors import UsageError
from delock.launch.rank import Rank
from delock.links import meeting
from delock.links.free_ways import Ways
from delock.links.gloo import DistributedChannel, GlooWays
from delock.links.nccl import Courier
from delock.links.rank_link import Channel, RankLink
from delock.links.shared_memory import SharedChannel
from delock.links.stream import StreamWays


def refuse_link(kind: str, device: str) -> None:
    """Raises UsageError for a kind that cannot be had on this system and device."""
    if kind == "shared" and torch.device(device).type != "cpu":
        raise UsageError(f'link is "shared", but tensors on {device} do not lie in memory that processes share: use link "auto"')
    if kind == "shared" and meeting.here() is None:
        raise UsageError('link is "shared", but this system lacks what it takes (Linux with memfd_create and /proc): use link "auto"')


def shares(kind: str, device: str) -> bool:
    """Says whether that kind joins processes of one host by memory that they share."""
    return kind != "gloo" and torch.device(device).type == "cpu" and meeting.here() is not None


def connect(kind: str, depth: dict[int, int], rank: Rank) -> RankLink:
    """Returns this rank's link to its neighbours, the ranks in `depth`: how many messages may wait for each. All ranks call it together.

    kind: "gloo", the process group (between GPUs NCCL); "shared", memory that two processes share; "auto", shared memory where both are
    on one host and the tensors on the CPU, else the process group.
    Raises UsageError where the kind is "shared" and a neighbour is on another host.
    """
    near = _near(depth, rank) if shares(kind, rank.device.type) else {}
    far = depth.keys() - near.keys()
    if kind == "shared" and far:
        pair = sorted((rank.rank, min(far)))
        raise UsageError(f'link is "shared", but stages {pair[0]} and {pair[1]} are on different hosts: use link "auto"')
    channels: dict[int, Channel] = {peer: SharedChannel(peer, depth[peer], connection) for peer, connection in near.items()}
    if far:
        rank.open_group()
        carried = rank.device.type == "cuda" and "nccl" in dist.get_backend_config()
        courier = Courier(depth, rank.device, "nccl") if carried else None
        channels |= {peer: DistributedChannel(peer, depth[peer], rank.device, courier) for peer in sorted(far)}
    return RankLink(channels, rank.progress)


def free_ways(kind: str, rank: Rank) -> Ways:
    """Returns the ways of a free-running stage to its neighbours; all ranks call it together."""
    if kind != "gloo" and (rank.peers or rank.world == 1):
        return StreamWays(rank.rank, rank.peers)
    rank.open_group()
    return GlooWays(rank.rank, rank.world)


def _near(peers: Iterable[int], rank: Rank) -> dict[int, socket.socket]:
    """Returns a socket to each neighbour on this host: those that came with the rank, or under torchrun those that are found."""
    return {peer: rank.peers[peer] for peer in peers} if rank.peers else meeting.meet(peers) if dist.is_initialized() else {}
