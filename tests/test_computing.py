"""bfloat16 and channels_last: plain training does the same, and one process does what many do."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.api import fit
from delock.errors import UsageError
from delock.methods import BP, DGL, DSP, FDG, Interlocking, Method
from delock.nets import build
from delock.options import Execution

from harness import assert_equal, in_processes, inline, jobs
from workloads import WORK, Samples, sgd, without_norm_and_dropout

BOTH = Execution("bf16", "channels-last")
WAYS = (Execution(amp="bf16"), Execution(layout="channels-last"), BOTH)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def plain(data: Samples, execution: Execution, epochs: int) -> tuple[nn.Module, list[float]]:
    """The loop that everybody writes."""
    model = build("resnet8", classes=10, in_channels=3, image_size=8).train()
    last = execution.layout == "channels-last"
    if last:
        model = model.to(memory_format=torch.channels_last)
    optimizer, losses = SGD(model.parameters()), []
    for _ in range(epochs):
        for x, y in data.epoch(0):
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=execution.amp == "bf16"):
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("execution", WAYS, ids=str)
@pytest.mark.parametrize("stages", [1, 3])
def test_backpropagation_is_plain_training(execution: Execution, stages: int) -> None:
    data = Samples("image", 24, 8, torch.float32)
    data.epoch = lambda e, epoch=data.epoch: epoch(0)  # type: ignore[method-assign,misc]
    model = build("resnet8", classes=10, in_channels=3, image_size=8)
    result = fit(model, data, loss=cross_entropy, method="bp", optimizer=SGD, stages=stages, cuts=None if stages == 1 else [4, 5],
                 epochs=2, workers="inline", execution=execution)  # fmt: skip
    other, losses = plain(data, execution, 2)
    assert result.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", [BP(), FDG(), DSP(), DGL(), Interlocking(2)], ids=str)
def test_processes_equal_one_process(method: Method) -> None:
    made = [replace(job, execution=BOTH) for job in jobs("conv", 3, method)]
    assert_equal(inline(made), in_processes([replace(job, execution=BOTH) for job in jobs("conv", 3, method)]))


@pytest.mark.usefixtures("own_random")
def test_what_travels_is_as_small_as_what_is_computed() -> None:
    data, told = Samples("image", 24, 8, torch.float32), []
    for execution in (Execution(), BOTH):
        layers = [nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(288, 10))]
        result = fit(layers, data, loss=cross_entropy, method="bp", optimizer=sgd, batches=2, workers="inline", execution=execution)
        told.append(result.started.messages[0])
    assert told[0] == 2 * told[1]


class Picky(nn.Module):
    """The identity, which takes its time where images (B, C, H, W) lie in one of the two layouts."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self.slow = slow

    def forward(self, x: Tensor) -> Tensor:
        layout = "channels-last" if x.is_contiguous(memory_format=torch.channels_last) else "default"
        time.sleep(0.02 * (layout == self.slow))
        return x


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("slow", "fast"), [("default", "channels last"), ("channels-last", "default")])
def test_auto_takes_the_faster_layout(slow: str, fast: str) -> None:
    data = Samples("image", 24, 8, torch.float32)
    layers = [nn.Conv2d(3, 8, 3), Picky(slow), nn.Sequential(nn.Flatten(), nn.Linear(288, 10))]
    options: dict[str, Any] = {"method": "bp", "optimizer": sgd, "batches": 1, "workers": "inline"}
    result = fit(layers, data, loss=cross_entropy, execution=Execution(layout="auto"), **options)
    assert result.started.layout == fast


def test_mixed_is_refused_under_autocast() -> None:
    data = Samples("image", 24, 8, torch.float32)
    model = build("resnet8", classes=10, in_channels=3, image_size=8)
    with pytest.raises(UsageError, match="does not go with amp"):
        fit(model, data, loss=cross_entropy, method=FDG(at="mixed"), optimizer=sgd, batches=2, workers="inline",
            execution=Execution(amp="bf16"))  # fmt: skip


@pytest.mark.parametrize("work", ["conv", "tuple"])
def test_slices_have_the_gradient_of_the_whole_but_for_batch_norm(work: str) -> None:
    net, kind, loss = WORK[work]
    data = Samples(kind, 22, 8, torch.float64)
    runs = []
    for chunks in (1, 3, 100):
        stages = [without_norm_and_dropout(stage) for stage in net(3, torch.float64)]
        result = fit(stages, data, loss=loss, method=FDG(), optimizer=sgd, epochs=2, workers="inline", execution=Execution(chunks=chunks))
        runs.append((result.losses, [p for stage in stages for p in stage.parameters()]))
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-10)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(weights, runs[0][1], strict=True))


def test_slices_in_processes_equal_one_process() -> None:
    execution = Execution(chunks=3)
    made = [[replace(job, execution=execution) for job in jobs("conv", 3, FDG())] for _ in range(2)]
    assert_equal(inline(made[0]), in_processes(made[1]))


def test_a_slice_of_one_sample_before_batch_norm_is_refused() -> None:
    model = build("resnet8", classes=10, in_channels=3, image_size=8)
    with pytest.raises(UsageError, match="single sample in front of BatchNorm"):
        fit(model, Samples("image", 24, 8, torch.float32), loss=cross_entropy, optimizer=sgd, batches=2, workers="inline",
            execution=Execution(chunks=5))  # fmt: skip
