"""Captured ticks on a GPU: streams and CUDA graphs give the numbers of the plain engine, and a stage that asks back is named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from delock import fit
from delock.engine.graphs.streams import make_streams
from delock.errors import StageFailed, UsageError
from delock.methods import ADL, BP, DGL, DSP, FDG, Method
from delock.nets import build
from delock.options import Execution
from test_captured import METHODS, made

from harness import assert_equal, inline, jobs
from training import EXECUTIONS, GPU, assert_close, on_gpu
from workloads import Samples

captured = partial(on_gpu, captured=True)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_gpu_agrees_with_the_cpu_to_rounding(method: Method, K: int) -> None:
    """In double precision, so that nothing but the order of sums differs."""
    found = partial(made, "conv", K, method, dtype=torch.float64)
    assert_close(captured(found()), inline(found()))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_graphs_give_the_bits_of_the_plain_engine(method: Method) -> None:
    """On the same GPU, in single precision."""
    assert_equal(captured(made("conv", 3, method)), on_gpu(made("conv", 3, method)))


@pytest.mark.parametrize("method", [FDG(), DSP(), DGL(), ADL()], ids=str)
def test_tuples_and_weights_without_gradient(method: Method) -> None:
    found = partial(made, "tuple", 3, method, dtype=torch.float64)
    assert_close(captured(found()), inline(found()))


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize("method", [BP(), FDG(), DSP(), DGL()], ids=str)
def test_precisions_and_layouts(method: Method, execution: Execution) -> None:
    """Bit for bit those of the plain engine."""
    found = [[replace(job, execution=execution) for job in made("conv", 3, method)] for _ in range(2)]
    assert_equal(captured(found[0]), on_gpu(found[1]))


def test_a_recording_runs_nothing_and_every_replay_everything() -> None:
    recorder = make_streams(GPU, 2)
    value = torch.zeros(4, device=GPU)

    def work() -> None:
        value.add_(1)

    replay = recorder.record(work, apart=False)
    assert float(value.sum()) == 0, "a capture runs nothing"
    replay()
    replay()
    recorder.join()
    assert torch.equal(value.cpu(), torch.full((4,), 2.0))


class Asking(nn.Module):
    """Asks for a number that the GPU has computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum() > 0)


def test_a_stage_that_asks_back_is_named_and_the_gpu_is_as_before() -> None:
    found = made("mlp", 1, BP())
    found[0].module.append(Asking())  # type: ignore[operator]
    with pytest.raises(StageFailed, match="could not be captured as a CUDA graph"):
        captured(found)
    assert_equal(captured(made("mlp", 2, FDG())), on_gpu(made("mlp", 2, FDG())))


def test_dropout_is_refused() -> None:
    with pytest.raises(UsageError, match="stage 0 draws random numbers"):
        captured(jobs("conv", 2, FDG(), samples=32))


@pytest.mark.parametrize("method", ["bp", "fdg", "dsp", "dgl"])
def test_fit_by_captured_ticks(method: str) -> None:
    """Through the front door, with evaluations, from batches on the CPU."""
    runs: list[Any] = []
    for graphs in (True, False):
        model = build("resnet8", classes=10, in_channels=3, image_size=8)
        data, test = Samples("image", 64, 8, torch.float32), Samples("image", 11, 4, torch.float32, seed=1)
        runs.append(fit(model, data, test, loss=cross_entropy, method=method, optimizer=partial(torch.optim.SGD, lr=2**-5, momentum=0.9),
                        stages=2, cuts=[5], epochs=3, workers="inline", device="cuda",
                        execution=Execution(captured=graphs)))  # fmt: skip
    ours, other = runs
    assert ours.losses == pytest.approx(other.losses, rel=1e-3)
    assert len(ours.evaluations) == 3
    assert ours.stages[1].staleness == other.stages[1].staleness
