"""Training on one GPU: every method computes what it computes on a CPU, again and again the same, in every precision and layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock import fit
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, AsyncDGL, GPipe, Interlocking, Method
from delock.nets import build
from delock.options import Compression, Execution
from delock.records import Result
from delock.tensors import map_tensors

import oracles
import papers
from harness import assert_equal, every_method, inline, jobs
from training import EXECUTIONS, GPU, assert_close, jobs64, on_gpu
from workloads import WORK, Samples, batches, sgd, warm_up

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
KINDS = [BP(), GPipe(2), DDG(), FR(), FDG(), FDG(at="mixed"), ADL(2), DSP(), DGL(), Interlocking(2), AsyncDGL(order="round-robin")]


def resnet() -> nn.Module:
    return build("resnet8", classes=10, in_channels=3, image_size=8)


@pytest.mark.parametrize("method", [*every_method(3), AsyncDGL(order="round-robin")], ids=str)
def test_a_gpu_agrees_with_a_cpu(method: Method) -> None:
    """In double precision: weights, batch norm's statistics, losses, evaluations."""
    assert_close(on_gpu(jobs64("conv", 3, method)), inline(jobs64("conv", 3, method)))


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_tuples_and_labels_in_a_dict(method: Method) -> None:
    assert_close(on_gpu(jobs64("tuple", 3, method)), inline(jobs64("tuple", 3, method)))


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_a_run_can_be_repeated_bit_for_bit(method: Method) -> None:
    """With dropout, in single precision."""
    assert_equal(on_gpu(jobs("conv", 3, method)), on_gpu(jobs("conv", 3, method)))


@pytest.mark.parametrize("method", [BP(), GPipe(2), DDG(), FR(), FDG(), FDG(at="mixed"), ADL(2), DSP(p=(2, 1), q=(1, 2))], ids=str)
def test_dropout_draws_the_masks_of_the_oracle(method: Method) -> None:
    """Seeded by stage and batch, and again the same in a replay: the paper's equation on the same GPU gives the same weights."""
    net, kind, loss = WORK["conv"]
    data = map_tensors(lambda x: x.to(GPU), batches(22, 8, 2, kind, torch.float64))
    stages = [module.to(GPU) for module in net(3, torch.float64)]
    compute: Any = oracles.backprop if method.synchronous else oracles.delayed
    options = {"accumulate": method.micro_batches} if method.synchronous else papers.oracle_options(method, 3)
    want = compute(stages, data, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7, **options)
    got = on_gpu(jobs("conv", 3, method, dtype=torch.float64, evaluate=False))
    assert oracles.gap([stage.state for stage in got], [{n: x.cpu() for n, x in state.items()} for state in want.states]) < 1e-8


def plain(data: Samples, execution: Execution, epochs: int) -> tuple[nn.Module, list[float]]:
    """Trains by the loop that everyone writes."""
    model = resnet().to(GPU).train()
    last = execution.layout == "channels-last"
    if last:
        model = model.to(memory_format=torch.channels_last)
    optimizer, losses = SGD(model.parameters()), []
    for _ in range(epochs):
        for x, y in data.epoch(0):
            x, y = x.to(GPU), y.to(GPU)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=execution.amp == "bf16"):
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("execution", [Execution(), *EXECUTIONS[:2], Execution("bf16", "channels-last")], ids=str)
@pytest.mark.parametrize("stages", [1, 3])
def test_backpropagation_is_plain_training(execution: Execution, stages: int) -> None:
    """Bit for bit, in one stage and in three, in bfloat16 and channels last too."""
    data = Samples("image", 24, 8, torch.float32)
    data.epoch = lambda e, epoch=data.epoch: epoch(0)  # type: ignore[method-assign,misc]
    model = resnet()
    result = fit(model, data, loss=cross_entropy, method="bp", optimizer=SGD, stages=stages, cuts=None if stages == 1 else [4, 5],
                 epochs=2, workers="inline", device="cuda", execution=execution)  # fmt: skip
    other, losses = plain(data, execution, 2)
    assert result is not None
    assert result.losses == losses
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize("method", [FDG(), DSP(), DGL()], ids=str)
def test_precisions_and_layouts_under_delay(method: Method, execution: Execution) -> None:
    """Within bfloat16's rounding of the run without; the same again bit for bit."""
    made = [[replace(job, execution=execution) for job in jobs("conv", 3, method)] for _ in range(2)]
    first, again = map(on_gpu, made)
    assert_equal(first, again)
    whole = on_gpu(jobs("conv", 3, method))
    assert first[-1].losses == pytest.approx(whole[-1].losses, rel=0.1)
    assert execution == Execution(layout="channels-last") or first[-1].losses != whole[-1].losses


def trained(device: str, **options: Any) -> tuple[nn.Module, Result]:
    """Trains by FDG in two stages, in double precision, with two evaluations."""
    model = resnet().double()
    data, test = Samples("image", 24, 8, torch.float64), Samples("image", 11, 4, torch.float64, seed=1)
    result = fit(model, data, test, loss=cross_entropy, optimizer=SGD, stages=2, cuts=[4], epochs=2, workers="inline", device=device,
                 metrics={"right": right}, **options)  # fmt: skip
    assert result is not None
    return model, result


def right(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


def test_fit_evaluates_and_brings_the_weights_home() -> None:
    ours, other = trained("cuda"), trained("cpu")
    assert ours[1].losses == pytest.approx(other[1].losses, rel=1e-7)
    assert [e.metrics for e in ours[1].evaluations] == [e.metrics for e in other[1].evaluations]
    assert [e.test_loss for e in ours[1].evaluations] == pytest.approx([e.test_loss for e in other[1].evaluations], rel=1e-7)
    torch.testing.assert_close(ours[0].state_dict(), other[0].state_dict(), rtol=1e-6, atol=1e-9, check_device=False)
    assert {p.device.type for p in ours[0].parameters()} == {"cpu"}, "the caller's weights are where they were"


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_codecs_on_a_gpu(codec: str) -> None:
    """A codec has the same steps on both devices, so losses agree closely, and the bytes are equal."""
    made = [[replace(job, compression=Compression(codec)) for job in jobs64("conv", 3, FDG())] for _ in range(2)]
    ours, other = on_gpu(made[0]), inline(made[1])
    assert ours[-1].losses == pytest.approx(other[-1].losses, rel=1e-3)
    assert [one.report.sent_up for one in ours] == [one.report.sent_up for one in other]


def test_a_codebook_on_a_gpu_is_the_same_again() -> None:
    made = [[replace(job, compression=Compression("vq:codes=8:dim=2:every=2")) for job in jobs("conv", 3, FDG())] for _ in range(2)]
    first, again = map(on_gpu, made)
    assert_equal(first, again)


def test_compiled_stages_on_a_gpu() -> None:
    """As uncompiled but for rounding."""
    pytest.importorskip("triton")
    runs = []
    for compile in (True, False):
        model = resnet()
        result = fit(model, Samples("image", 24, 8, torch.float32), loss=cross_entropy, optimizer=SGD, stages=2, cuts=[5], batches=4,
                     workers="inline", device="cuda", execution=Execution(compile=compile))  # fmt: skip
        runs.append(result.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def test_stages_without_weights() -> None:
    """The first stage alone brings nothing to the GPU."""
    made = jobs64("mlp", 2, FDG())
    made[0] = replace(made[0], module=nn.Sequential(nn.Flatten()))
    made[1] = replace(made[1], module=nn.Sequential(nn.Linear(12, 10).double()))
    assert on_gpu(made)[0].report.updates > 0
