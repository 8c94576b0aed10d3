"""Tensors that travel apart from their header, as they do between GPUs; here over gloo where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import Message
from delock.links.gloo import DistributedChannel
from delock.links.nccl import Courier
from delock.links.rank_link import RankLink
from delock.methods import ADL, DSP, FDG
from delock.plan import windows
from delock.run.job import StageJob, StageResult
from delock.run.worker import Worker

from harness import assert_equal, inline, jobs
from messages import activation, error


class Everything(Courier):
    """Carries tensors of the CPU too."""

    def takes(self, leaf: Tensor) -> bool:
        return leaf.numel() > 0


def talk(rank: Rank, _: None) -> list[Tensor]:
    """Rank 0 sends activations of several shapes up, rank 1 answers with errors of them."""
    other = 1 - rank.rank
    rank.open_group()
    courier = Everything({other: 2}, rank.device, "gloo")
    link = RankLink({other: DistributedChannel(other, 2, rank.device, courier)}, rank.progress)
    got = []
    for b, shape in enumerate([(4, 3, 8, 8), (1, 3, 8, 8), (0, 5), (64, 3, 8, 8)]):
        h = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        if len(shape) == 4:
            h = h.to(memory_format=torch.channels_last)
        if rank.rank == 0:
            link.send(1, activation(b), Message((h, h.long()), {"y": torch.arange(b), "note": "x"}, 0.5, b))
            got.append(link.receive(1, error(b, 1)).values[0])
        else:
            message = link.receive(0, activation(b))
            assert message.values[0].stride() == h.stride()
            assert message.targets["note"] == "x"
            link.send(0, error(b, 1), Message((message.values[0] + message.values[1],)))
    link.close()
    return got


def test_tensors_apart_from_their_header() -> None:
    for answer in run_processes(talk, [None, None], pin=False, patience=30)[0]:
        h = torch.arange(answer.numel(), dtype=torch.float32).reshape(answer.shape)
        assert torch.equal(answer, 2 * h)


def train_with_courier(rank: Rank, job: StageJob) -> StageResult:
    """run_rank, with every tensor apart."""
    rank.open_group()
    depth = {peer: job.method.capacity(min(job.k, peer), job.K) for peer in (job.k - 1, job.k + 1) if 0 <= peer < job.K}
    courier = Everything(depth, rank.device, "gloo")
    link = RankLink({peer: DistributedChannel(peer, n, rank.device, courier) for peer, n in depth.items()}, rank.progress)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress)
    for plan in windows(job.method, job.K, job.length):
        worker.engine.run(plan)
    result = worker.result(alone=True)
    link.close()
    return result


@pytest.mark.parametrize("method", [FDG(), ADL(3), DSP(p=(2, 1), q=(1, 2))], ids=str)
def test_training_with_tensors_apart(method: FDG) -> None:
    got = run_processes(train_with_courier, jobs("tuple", 3, method), pin=False, patience=30)
    assert_equal(got, inline(jobs("tuple", 3, method)))
