"""A stage alone and in a row: what it keeps, what it leaves alone, and that any module and optimizer is served as plain PyTorch does."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler

from delock import recipes
from delock.errors import UsageError
from delock.links.message import Message
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method
from delock.ops import Backward, Forward, Update
from delock.plan import Step
from delock.stage import Stage, saving
from delock.timeline import in_flight

import oracles
from chain import Chain, by_bp, plain, seeded, sgd, vectors
from harness import every_method
from oracles import MakeOptimizer

CPU = torch.device("cpu")


def layers(*more: nn.Module, first: int = 4) -> list[nn.Module]:
    return seeded(lambda: [nn.Linear(first, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4), *more])


def stage(module: nn.Module, k: int = 0, K: int = 1, **options: Any) -> Stage:
    return Stage(module, k, K, **({"optimizer": sgd, "loss": mse_loss} | options))


# -- inputs ------------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Writes to its input, but not with its first op."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(2 * x)
        x += 1.0
        return y + torch.tanh(x)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), Residual], ids=["first op", "later op"])
@pytest.mark.parametrize("method", [BP(), FR(), FDG(), FDG(at="mixed"), DSP()], ids=str)
def test_a_stage_that_writes_to_its_input_leaves_its_neighbours_alone(make: Callable[[], nn.Module], method: Method) -> None:
    modules = seeded(lambda: [make() for _ in range(3)])
    data = vectors(6)
    before = copy.deepcopy(data)
    chain = Chain(modules, method, data)
    sent: list[tuple[Tensor, Tensor]] = []
    for k, step in chain.steps():
        for to, happened in ((k + 1, step.up), (k - 1, step.down)):
            sent += [(x, x.clone()) for x in flat(chain.box.queue(k, to)[-1][1])] if happened else []
    assert len(sent) == 24
    assert all(torch.equal(x, was) for x, was in sent), "a message was written to"
    assert all(torch.equal(x, was) for pair, old in zip(data, before, strict=True) for x, was in zip(pair, old, strict=True))
    if isinstance(method, BP):
        chain.assert_equals(plain(modules, before))


def flat(message: Message) -> list[Tensor]:
    return [message.values] if isinstance(message.values, Tensor) else list(message.values)


class Probe(nn.Module):
    """Passes on what comes and notes where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.data_ptr())
        return x


@pytest.mark.parametrize("method", [BP(), FR()], ids=str)
def test_inputs_are_cloned_only_where_they_must_be(method: Method) -> None:
    clean, dirty = nn.Sequential(Probe(), nn.Linear(4, 4)), nn.Sequential(Probe(), nn.ReLU(inplace=True), nn.Linear(4, 4))
    data = vectors(4)
    chain = Chain([clean, dirty], method, data).run()
    assert [s.body.clones_inputs for s in chain.stages] == [False, True]
    seen = chain.stages[0].module[0].seen
    assert set(seen[1:]) <= {x.data_ptr() for x, _ in data}, "a copy was made without need"  # the first forward finds out


# -- replay ------------------------------------------------------------------------------------------------------------------------


class Masks(nn.Module):
    """Dropout that keeps its masks, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        if self.training:
            self.masks.append(mask)
        return x * mask


@pytest.mark.parametrize("method", [FR(), DSP(p=2)], ids=str)
def test_a_replay_draws_the_mask_of_its_forward(method: Method) -> None:
    modules = seeded(lambda: [nn.Sequential(nn.Linear(16, 16), Masks()) for _ in range(3)])
    chain = Chain(modules, method, vectors(6, features=16))
    of: list[dict[int, list[Tensor]]] = [{}, {}, {}]
    for k, step in chain.steps():
        if not isinstance(step.op, Update):
            module = chain.stages[k].module[1]
            of[k].setdefault(step.op.batch, []).extend(module.masks)
            module.masks.clear()
    for k, masks in enumerate(of):
        calls = [1 if k == 2 or b == 0 else 2 for b in range(6)]  # with no Update in between the graph itself is kept
        assert [len(masks[b]) for b in range(6)] == calls
        assert all(torch.equal(mask, m[0]) for m in masks.values() for mask in m)
        assert not any(torch.equal(masks[a][0], masks[b][0]) for a in range(6) for b in range(a))
    assert not any(torch.equal(of[0][b][0], of[k][b][0]) for b in range(6) for k in (1, 2)), "stages draw alike"


@pytest.mark.parametrize("method", every_method(3), ids=str)
def test_statistics_change_once_per_batch_and_in_its_forward(method: Method) -> None:
    modules = seeded(lambda: [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)])
    chain = Chain(modules, method, vectors(5, rows=6), test=vectors(2, rows=4), every=2)
    before = [{name: x.clone() for name, x in s.module.named_buffers()} for s in chain.stages]
    for k, step in chain.steps():
        now = {name: x.clone() for name, x in chain.stages[k].module.named_buffers()}
        changed = {not torch.equal(x, before[k][name]) for name, x in now.items()}
        assert changed == {isinstance(step.op, Forward) and step.op.train}, f"stage {k}, {step.op}"
        before[k] = now
    assert [int(s.module[1].num_batches_tracked) for s in chain.stages] == [5 * method.parts] * 3


# -- what is kept ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", every_method(4), ids=str)
def test_a_stage_holds_what_the_plan_predicts(method: Method) -> None:
    chain = Chain(seeded(lambda: [nn.Linear(4, 4) for _ in range(4)]), method, vectors(14))
    held = [(0, 0, 1)] * 4
    for k, s in enumerate(chain.stages):

        def look(step: Step, k: int = k, s: Stage = s, prepare: Callable[[Step], None] = s.prepare) -> None:
            prepare(step)  # a replay has its graph now, and the error has not come
            held[k] = most(held[k], holds(s, replayed=step.op.batch))

        s.prepare = look
    for k, _ in chain.steps():
        held[k] = most(held[k], holds(chain.stages[k]))
    assert held == [(p.graphs, p.inputs, p.versions) for p in in_flight(chain.plan())]


def most(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = map(max, a, b)
    return x, y, z


def holds(s: Stage, replayed: int | None = None) -> tuple[int, int, int]:
    """Live graphs, stored inputs, versions of the weights; versions are held once each, however many graphs refer to them."""
    kept = list(s.memory.items())
    graphs = [m for _, m in kept if m.outputs is not None]
    copies = {m.weights["weight"].data_ptr(): m.taken for m in graphs if m.weights}
    assert len(set(copies.values())) == len(copies), "a version was copied twice"
    assert all(m.weights is None for b, m in kept if m.outputs is None)
    inputs = [b for b, m in kept if m.step.keep == "input" and (m.outputs is None or b == replayed)]
    return len(graphs), len(inputs), len({s.version, *copies.values()})


@pytest.mark.parametrize("method", every_method(3), ids=str)
def test_nothing_is_left_when_a_run_ends_and_graphs_go_with_their_last_use(method: Method) -> None:
    chain = Chain(seeded(lambda: [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(3)]), method, vectors(7))
    graphs: dict[tuple[int, int], Any] = {}
    for k, step in chain.steps():
        match step.op:
            case Forward(b) if b in chain.stages[k].memory and chain.stages[k].memory[b].outputs is not None:
                graphs[k, b] = weakref.ref(chain.stages[k].memory[b].outputs)
            case Backward(b) if step.last and (k, b) in graphs:
                assert graphs[k, b]() is None, f"stage {k} still holds the graph of batch {b}"
    assert not any(s.memory for s in chain.stages)
    assert not any(g is not None for s in chain.stages for g in s.learner.grads)
    assert not any(p.grad is not None for s in chain.stages for p in s.learner.weights)
    assert not any(chain.box.queues.values())
    assert all(graph() is None for graph in graphs.values())


def test_a_saved_mixed_stage_must_have_been_built_for_it() -> None:
    chain = Chain(layers(), FDG(at="mixed"), vectors(6))
    for k, step in chain.steps():
        if k == 0 and step.op == Forward(1):
            break
    with pytest.raises(UsageError, match="resumable=True"):
        saving.state(chain.stages[0])


def test_a_state_holds_each_version_of_the_weights_once() -> None:
    """Shared between its graphs before and after a trip through pickle."""
    chain = Chain(layers(), ADL(accumulate=3), vectors(12))
    for k, step in chain.steps():
        if k == 0 and step.op == Forward(8):
            break
    first = chain.stages[0]
    second = stage(copy.deepcopy(first.module), 0, 3)
    saving.load(second, pickle.loads(pickle.dumps(saving.state(first))))
    assert {b: m.taken for b, m in second.memory.items()} == {b: m.taken for b, m in first.memory.items()}
    assert holds(second) == holds(first)
    assert holds(first)[2] > 1


# -- mixed -------------------------------------------------------------------------------------------------------------------------


def parametrized(how: str) -> nn.Module:
    linear = nn.Linear(4, 4)
    match how:
        case "weight_norm, old":
            return nn.utils.weight_norm(linear)
        case "weight_norm":
            return parametrizations.weight_norm(linear)
        case "spectral_norm, old":
            return nn.utils.spectral_norm(linear)
        case "orthogonal":
            return parametrizations.orthogonal(linear)
        case "pruned":
            return prune.l1_unstructured(linear, "weight", 0.25)
    raise ValueError(how)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm, old", "weight_norm", "spectral_norm, old", "orthogonal", "pruned"])
def test_mixed_refuses_weights_that_are_derived(how: str) -> None:
    made = nn.Sequential(nn.Tanh(), parametrized(how))
    with pytest.raises(UsageError, match=r'at="mixed" cannot be computed for 1: .*use at="stash"'):
        stage(made, mixed=True)
    stage(made)


@pytest.mark.parametrize("how", ["weight_norm", "orthogonal"])
def test_derived_weights_train_with_stash_and_replay(how: str) -> None:
    data = vectors(6, dtype=torch.float64)
    modules = seeded(lambda: [nn.Sequential(parametrized(how), nn.Tanh()).double() for _ in range(3)])
    by_bp(seeded(lambda: [parametrized(how).double() for _ in range(2)]), data)
    Chain(modules, FDG(), data).run().assert_close(delayed(modules, data, [4, 2, 0]))
    Chain(modules, FR(), data).run().assert_close(delayed(modules, data, [2, 1, 0], at="replay"))


def delayed(modules: list[nn.Module], data: Any, delays: list[int], optimizer: MakeOptimizer = sgd, **options: Any) -> oracles.OracleRun:
    return oracles.delayed(modules, data, loss=mse_loss, make_optimizer=optimizer, delays=delays, seed=7, **options)


VARIANTS: dict[str, MakeOptimizer] = {
    "sgd foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05, foreach=True),
    "sgd fused": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05, fused=True),
    "nesterov foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "adam fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "the command line's sgd": recipes.SGD(lr=0.05, momentum=0.9, weight_decay=0.05, nesterov=True),
}


@pytest.mark.parametrize("optimizer", VARIANTS.values(), ids=VARIANTS.keys())
def test_mixed_and_stash_do_not_depend_on_how_the_optimizer_writes(optimizer: MakeOptimizer) -> None:
    """Fused optimizers do not count versions, foreach ones write to gradients."""
    modules, data = layers(), vectors(8)
    want = oracles.mixed_deque(
        modules, data, loss=mse_loss, make_optimizer=optimizer, delays=[4, 2, 0], backward_first=True, seed=7
    )
    Chain(modules, FDG(at="mixed", order="backward-first"), data, optimizer=optimizer).run().assert_equals(want)
    exact = [copy.deepcopy(m).double() for m in modules]
    precise = vectors(8, dtype=torch.float64)
    Chain(exact, FDG(), precise, optimizer=optimizer).run().assert_close(delayed(exact, precise, [4, 2, 0], optimizer))


# -- gradients ---------------------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """x + a + b: autograd hands out one tensor as the gradient of x, a and b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a + self.b


@pytest.mark.parametrize("optimizer", [sgd, *VARIANTS.values()], ids=["sgd", *VARIANTS.keys()])
def test_one_gradient_for_two_parameters_and_the_error_below(optimizer: MakeOptimizer) -> None:
    modules = seeded(lambda: [nn.Linear(4, 4), Shift(), nn.Sequential(Shift(), nn.Linear(4, 4))])
    by_bp(modules, vectors(6), optimizer=optimizer)


class ClippedSGD(torch.optim.SGD):
    """Clips in its step, in place, as people do."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        return super().step(closure)


def test_an_optimizer_that_clips_in_place() -> None:
    modules = seeded(lambda: [nn.Linear(4, 4), Shift(), nn.Linear(4, 4)])
    by_bp(modules, vectors(6), optimizer=partial(ClippedSGD, lr=0.1))


@pytest.mark.parametrize("optimizer", [sgd, VARIANTS["sgd fused"], VARIANTS["adam fused"]], ids=["sgd", "sgd fused", "adam fused"])
def test_gradients_lie_in_memory_as_their_weights(optimizer: MakeOptimizer) -> None:
    """On channels_last inputs autograd gives them other strides, which fused optimizers take no notice of."""
    modules = seeded(lambda: [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))])
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 3, 8, 8, generator=g).to(memory_format=torch.channels_last), torch.randn(3, 2, generator=g)) for _ in range(4)]
    by_bp(modules, data, optimizer=optimizer)


@pytest.mark.parametrize("method", [BP(), FDG(), FDG(at="mixed"), FR()], ids=str)
def test_frozen_weights_stay_and_pass_errors_on(method: Method) -> None:
    modules = [m.double() for m in layers(nn.Linear(4, 4))]
    modules[1].requires_grad_(False)  # a whole stage
    modules[2].bias.requires_grad_(False)
    data = vectors(6, dtype=torch.float64)
    chain = Chain(modules, method, data).run()
    frozen = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert torch.equal(chain.state(1)["1.weight"], frozen["1.weight"])
    assert not torch.equal(chain.state(0)["weight"], modules[0].weight)
    assert chain.stages[1].optimizer is None
    assert (chain.stages[1].lr, chain.stages[1].version) == (0.0, 6)
    if isinstance(method, BP):
        chain.assert_equals(plain(modules, data))
    else:
        at, delays = ("replay", [3, 2, 1, 0]) if isinstance(method, FR) else (method.at, [6, 4, 2, 0])
        chain.assert_close(delayed(modules, data, delays, at=at))


class Idle(nn.Module):
    """Holds a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        out: Tensor = self.used(x)
        return out


@pytest.mark.parametrize("method", [FDG(), FR(), GPipe(2)], ids=str)
def test_parameters_without_gradient_are_left_alone(method: Method) -> None:
    """No weight decay either, as in plain PyTorch."""
    modules = seeded(lambda: [Idle(), Idle()])
    chain = Chain(modules, method, vectors(4)).run()
    for k in (0, 1):
        assert torch.equal(chain.state(k)["idle.weight"], modules[k].idle.weight)
        assert not torch.equal(chain.state(k)["used.weight"], modules[k].used.weight)
    by_bp(modules, vectors(4))


@pytest.mark.parametrize("method", [BP(), FDG(), DDG(), FR(), FDG(at="mixed"), ADL(2)], ids=str)
def test_stages_without_parameters(method: Method) -> None:
    modules = [nn.Tanh(), *layers(), nn.Sequential(nn.Tanh(), nn.Flatten())]
    chain = Chain(modules, method, vectors(6), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1)).run()
    assert chain.stages[0].optimizer is None
    assert [s.version for s in chain.stages] == [3 if isinstance(method, ADL) else 6] * 5
    if isinstance(method, BP):
        chain.assert_equals(plain(modules, vectors(6), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1)))


class Tied(nn.Module):
    """Encodes and decodes with one weight under two names, and uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.twice(torch.tanh(self.twice(self.up(x))))))
        return out


@pytest.mark.parametrize("method", [FDG(), FDG(at="mixed"), FR()], ids=str)
def test_weights_tied_within_a_stage_stay_tied(method: Method) -> None:
    modules = seeded(lambda: [Tied().double(), Tied().double(), nn.Linear(4, 4).double()])
    data = vectors(7, dtype=torch.float64)
    chain = Chain(modules, method, data).run()
    at, delays = ("replay", [2, 1, 0]) if isinstance(method, FR) else (method.at, [4, 2, 0])
    chain.assert_close(delayed(modules, data, delays, at=at))
    module = chain.stages[0].module
    assert module.up.weight is module.down.weight
    by_bp(modules, data)


# -- optimizers and schedules ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adadelta": partial(torch.optim.Adadelta),
    "nadam": partial(torch.optim.NAdam),
    "radam": partial(torch.optim.RAdam),
    "rprop": partial(torch.optim.Rprop, foreach=True),
    "adamax": partial(torch.optim.Adamax),
    "asgd": partial(torch.optim.ASGD),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=8),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "linear": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (n + 1)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer(optimizer: MakeOptimizer) -> None:
    by_bp(layers(), vectors(6), optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_any_schedule_is_stepped_once_per_update(schedule: Callable[[Any], Any]) -> None:
    """All stages have the rate of update n in update n, also where the stages' updates lie ticks apart."""
    by_bp(layers(), vectors(8), schedule=schedule)
    wanted = []
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    rates = schedule(optimizer)
    for _ in range(7):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    for method in (FDG(), ADL(2), GPipe(3)):
        chain = Chain(layers(), method, vectors(7 * method.batches_per_update), schedule=schedule)
        found: list[list[float]] = [[], [], []]
        was = [s.lr for s in chain.stages]
        for k, step in chain.steps():
            if isinstance(step.op, Update):
                found[k].append(was[k])
            was[k] = chain.stages[k].lr
        assert found == [wanted] * 3


def test_what_cannot_be_stepped_by_a_stage_alone_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LBFGS .* use another optimizer"):
        stage(nn.Linear(4, 4), optimizer=torch.optim.LBFGS)
    with pytest.raises(UsageError, match=r"ReduceLROnPlateau .* use another schedule"):
        stage(nn.Linear(4, 4), schedule=lr_scheduler.ReduceLROnPlateau)


@pytest.mark.parametrize("method", [FDG(), FDG(order="backward-first"), ADL(2), DDG(), FR(), DSP(p=2, q=3)], ids=str)
def test_no_step_of_the_optimizer_before_the_first_error(method: Method) -> None:
    """No weight decay, no momentum, no schedule: a stage's weights are the initial ones until its first Update."""
    chain = Chain(layers(), method, vectors(16), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5))
    initial = [{name: p.clone() for name, p in s.module.named_parameters()} for s in chain.stages]
    heard, forwards = [False] * 3, [0] * 3
    for k, step in chain.steps():
        s = chain.stages[k]
        forwards[k] += isinstance(step.op, Forward) and not heard[k]
        if isinstance(step.op, Update):
            assert heard[k]
        heard[k] |= isinstance(step.op, Backward)
        if s.version == 0:
            assert all(torch.equal(p, initial[k][name]) for name, p in s.module.named_parameters())
            assert not s.optimizer.state
            assert s.lr == 0.05
    early = [int(k < 2 and getattr(method, "order", "") == "backward-first") for k in range(3)]
    assert forwards == [method.delay(k, 3) + 1 - early[k] for k in range(3)]
    assert all(s.version for s in chain.stages)


# -- tuples, dtypes ----------------------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """x (B, 4) -> its map, integers, floats that need no gradient, and x as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x), x.argsort(), (x > 0).to(x.dtype), x


def steps(batch: int = 0, loss: int = 1) -> tuple[Step, Step]:
    return Step(Forward(batch), 0, 0, keep="graph", up=True), Step(Backward(batch, loss), 0, 0, last=True, down=True)


def test_an_error_holds_one_tensor_per_floating_input() -> None:
    forward, backward = steps()
    lower, upper = stage(Three(), 0, 2), stage(nn.Flatten(), 1, 2)
    x = torch.randn(3, 4)
    sent = lower.forward(forward, Message(x, "labels", samples=3))
    assert (sent.targets, sent.samples) == ("labels", 3)
    assert not any(t.requires_grad for t in sent.values)

    class Reads(nn.Module):
        def forward(self, message: tuple[Tensor, ...]) -> Tensor:
            h, _, mask, _ = message
            return h * mask

    upper = stage(Reads(), 1, 2, loss=lambda out, target: out.sum())
    upper.forward(forward, sent)
    error, loss = upper.backward(backward, None)
    assert error is not None
    assert loss is not None
    h, mask, skip = error.values  # h, the floats and x, but not the integers
    assert torch.equal(h, sent.values[2])
    assert torch.equal(mask, sent.values[0])
    assert torch.equal(skip, torch.zeros(3, 4))
    assert lower.backward(Step(Backward(0, 1), 0, 0, last=True), error) == (None, None)
    assert torch.allclose(lower.learner.grads[0], h.T @ x)


def test_integers_alone_between_stages() -> None:
    """The lower stage is told nothing, and learns nothing."""
    modules = seeded(lambda: [Ranks(), nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(8, 4))])
    chain = Chain(modules, FDG(), vectors(5)).run()
    assert torch.equal(chain.state(0)["linear.weight"], modules[0].linear.weight)
    assert chain.stages[0].version == 5


class Ranks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argsort()


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


class Back(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(x * (1 + 0.5j), n=4)


def test_complex_tensors_carry_gradients() -> None:
    modules = [nn.Sequential(layers()[0], Fourier()), nn.Sequential(Back(), layers()[2])]
    by_bp(modules, vectors(5))


class Query(nn.Module):
    """Hands a parameter and a buffer of its own to the next stage, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.count += 1
        return self.linear(x), self.query, self.count


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, message: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        h, query, count = message
        return self.linear(torch.tanh(h * query)) / count


@pytest.mark.parametrize("method", [DDG(), FR(), FDG(), FDG(at="mixed"), DSP(p=3)], ids=str)
def test_an_output_that_lies_in_a_weight_arrives_as_it_was_sent(method: Method) -> None:
    chain = Chain(seeded(lambda: [Query(), Attend()]), method, vectors(8))
    sent: list[tuple[Tensor, Tensor]] = []
    for k, step in chain.steps():
        if k == 0 and isinstance(step.op, Forward):
            sent += [(x, x.clone()) for x in chain.box.queue(0, 1)[-1][1].values]
    assert len(sent) == 24
    assert all(torch.equal(x, was) for x, was in sent)
    assert not torch.equal(sent[1][0], sent[-2][0])


# -- losses ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda out, y: (out - y) ** 2, r"returned \(3, 4\); take its mean"),
        (lambda out, y: mse_loss(out, y).item(), "returned float"),
        (lambda out, y: mse_loss(out.detach(), y), "cannot be differentiated"),
        (lambda out, y: (out > y).sum(), "cannot be differentiated"),
    ],
    ids=["a matrix", "a float", "detached", "a count"],
)
def test_a_loss_that_is_no_loss_is_refused(loss: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Chain(layers(), FDG(), vectors(3), loss=loss).run()


def test_a_loss_of_one_element_is_a_loss() -> None:
    by_bp(layers(), vectors(3), loss=lambda out, y: mse_loss(out, y).reshape(1))



def test_dropout_keys_are_those_of_the_stage_and_the_batch() -> None:
    """Not those of what ran before in this process."""
    results = []
    for disturb in (False, True):
        chain = Chain(seeded(lambda: [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]), FR(), vectors(4))
        for _ in chain.steps():
            if disturb:
                torch.rand(3)
        results.append(chain.losses)
    assert results[0] == results[1]
