"""torch.compile: the same training but for rounding, with every way to delay a gradient, and nothing left behind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from delock.api import fit
from delock.errors import UsageError
from delock.execution import PLAIN, lay_out_input
from delock.methods import FDG, FR, GPipe, Interlocking, Method
from delock.options import Execution, Simulation
from delock.run.job import StageJob, StageResult
from delock.stage import compiled
from delock.stage.module import ModuleFunction, copies
from delock.timeline import Emulation

from harness import assert_equal, in_processes, inline, jobs
from workloads import Samples, class_loss, sgd, tuple_net, weighted_loss, without_norm_and_dropout

pytestmark = pytest.mark.usefixtures("own_random")

COMPILED = Execution(compile=True)


@pytest.fixture(autouse=True)
def nothing_left_set() -> Iterator[None]:
    """The settings of torch's compiler are the caller's."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    before = [config.get_config_copy() for config in (dynamo, functorch, inductor)]
    yield
    assert [config.get_config_copy() for config in (dynamo, functorch, inductor)] == before
    assert torch._dynamo.eval_frame._stance.stance == "default"


def made(method: Method, execution: Execution = COMPILED, work: str = "conv") -> list[StageJob]:
    """Two stages on 22 samples in batches of 8, so that the last batch of an epoch has another size."""
    example = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, 6, 4, 4, device="meta")
    return [replace(job, execution=execution, example=example[job.k]) for job in jobs(work, 2, method)]


def close(a: list[StageResult], b: list[StageResult]) -> None:
    """Losses and weights are those of the other run but for rounding."""
    assert a[-1].losses == pytest.approx(b[-1].losses, rel=1e-3)
    for one, other in zip(a, b, strict=True):
        for name, tensor in one.state.items():
            assert torch.allclose(tensor, other.state[name], rtol=1e-2, atol=1e-4), name


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    "method",
    [pytest.param(FDG(), marks=pytest.mark.slow), FR(), pytest.param(Interlocking(2, combine="sum"), marks=pytest.mark.slow)],
    ids=str,
)
def test_one_process_is_many_and_compiled_is_plain_training_but_for_rounding(method: Method) -> None:
    a, b = inline(made(method)), in_processes(made(method))
    assert_equal(a, b)
    close(a, inline(made(method, PLAIN)))


class Masks(nn.Module):
    """Dropout, whose mask can be read off the output; the batch norm before it has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.norm(self.linear(x)))
        return out


def test_fit_compiles_tuples_of_tensors_and_micro_batches() -> None:
    results, modules, told = [], [], []
    for compiles in (False, True):
        stages = [without_norm_and_dropout(stage) for stage in tuple_net(2, torch.float32)]
        data = Samples("token", 22, 8, torch.float32)
        result = fit(stages, data, data, loss=weighted_loss, method=GPipe(2), optimizer=sgd, epochs=2, workers="inline",
                     execution=Execution(compile=compiles))  # fmt: skip
        results.append(result)
        modules.append(nn.Sequential(*stages).state_dict())
        told.append(result.started.compiled)
    assert told == [False, True]
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*(m.values() for m in modules), strict=True))
    assert results[1].seconds < 2, "compiling counts as training"


CALLS = ((8, 3, False, False), (8, 3, False, True), (8, 4, True, False), (5, 5, True, False))
"""Rows, batch, whether at the snapshot, and again: a forward with its replay, a stashed one, a smaller last batch."""


@pytest.mark.usefixtures("own_random")
def test_a_compiled_body_is_the_module() -> None:
    """Masks of a replay, statistics, snapshots, shapes that were not compiled, several backwards through one graph, evaluation."""
    torch.manual_seed(0)
    module = Masks()
    plain, fast = (ModuleFunction(copy.deepcopy(module), (0, 1), torch.device("cpu"), execution) for execution in (PLAIN, COMPILED))
    fast.rehearse(torch.zeros(8, 6), (torch.zeros(8, 6).requires_grad_(),), "it")
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), fast.module.state_dict().values(), strict=True))
    found = [called(body, compiled=body is fast) for body in (plain, fast)]
    for a, b in zip(*found, strict=True):
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert torch.equal(found[1][0][0], found[1][1][0]), "the replay drew another mask"
    assert int(fast.module.norm.num_batches_tracked) == 3


def called(body: ModuleFunction, compiled: bool) -> list[list[Tensor]]:
    """Outputs, statistics and gradients of the calls, and an evaluation. The weights move on after a snapshot."""
    snapshot = copies(body.weights)
    with torch.no_grad():
        next(iter(body.weights.values())).add_(1.0)
    found = []
    for rows, batch, stashed, again in CALLS:
        x = torch.linspace(-1, 1, rows * 6).sin().view(rows, 6)
        leaf, weights = x.clone().requires_grad_(), snapshot if stashed else None
        out = body(batch, x, (leaf,), weights, again)
        assert ("Compiled" in out.grad_fn.name()) == (compiled and rows == 8)
        wanted = [leaf, *(weights or body.weights).values()]
        grads = [torch.autograd.grad(out, wanted, torch.cos(out.detach()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        found.append([out.detach(), *(b.clone() for b in body.module.buffers()), *grads[0]])
    return [*found, [body.evaluate(x)]]


@pytest.mark.usefixtures("own_random")
def test_what_does_not_go_with_compile_is_refused_before_anything_is_compiled() -> None:
    def run(**options: Any) -> None:
        layers, data = [nn.Linear(12, 8), nn.Linear(8, 10)], Samples("vector", 16, 8, torch.float32)
        fit(layers, data, loss=class_loss, optimizer=sgd, batches=2, workers="inline", execution=COMPILED, **options)

    with pytest.raises(UsageError, match="does not go with compile"):
        run(method=FDG(at="mixed"))
    with pytest.raises(UsageError, match="nothing to compile"):
        run(method=FDG(), simulation=Simulation(emulate=Emulation(0.01, 0.01)))


@pytest.mark.usefixtures("own_random")
def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layers = [nn.Linear(12, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 10))]
    data = Samples("vector", 16, 8, torch.float32)
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        fit(layers, data, loss=class_loss, optimizer=sgd, batches=2, workers="inline", execution=COMPILED)


@pytest.mark.usefixtures("own_random")
def test_what_torch_cannot_compile_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no\nmore")

    body = ModuleFunction(nn.Linear(2, 2), (0, 1), torch.device("cpu"), COMPILED)
    assert body.compiled is not None
    monkeypatch.setattr(body.compiled, "run", refuse)
    with pytest.raises(UsageError, match=r"does not take stage 7: no; leave compile out$"):
        body.rehearse(torch.zeros(2, 2), (), "stage 7")
    assert body.compiled.stance == "eager_on_recompile"


def test_a_torch_without_the_setting_for_a_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is private, so it may go."""
    import torch._functorch.config  # there as long as this file runs

    with monkeypatch.context() as without:
        without.delattr(torch._functorch, "config")
        without.setitem(sys.modules, "torch._functorch.config", None)
        undonated = compiled._undonated()
    with undonated:
        assert torch._functorch.config.donated_buffer
    with compiled._undonated():
        assert not torch._functorch.config.donated_buffer


def test_every_size_of_part_is_compiled_once() -> None:
    example = torch.empty(8, 3, device="meta"), torch.empty(2, 2, device="meta"), torch.empty((), device="meta")
    sizes = [[tuple(t.shape) for t in part] for part in compiled.pieces(example, 8, 3)]
    assert sizes == [[(3, 3), (2, 2), ()], [(2, 3), (2, 2), ()]]
    assert [tuple(part.shape) for part in compiled.pieces(torch.empty(2, 3, device="meta"), 2, 4)] == [(1, 3)]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("layout", ["default", "channels-last"])
def test_inputs_of_a_shape_have_the_same_strides(layout: Literal["default", "channels-last"]) -> None:
    execution = Execution(layout=layout, compile=True)
    for shape in (4, 3, 5, 5), (4, 3, 1, 1), (1, 3, 2, 2):
        x = torch.randn(shape)
        given = (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3))
        made = [lay_out_input(execution, y) for y in given]
        assert len({y.stride() for y in made}) == 1
        assert all(torch.equal(x, y) for y in made)
