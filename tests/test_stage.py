"""A stage alone and in a row: what it keeps, what it leaves alone, what it sends."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from delock.errors import UsageError
from delock.links.message import Message
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, Method
from delock.ops import Backward, Forward, Update
from delock.plan import Step
from delock.stage import Stage, checkpoint
from delock.timeline import in_flight

from chain import Chain, by_bp, layers, plain, seeded, stage, vectors
from harness import every_method

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


@pytest.mark.usefixtures("own_random")
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
        assert changed == {isinstance(step.op, Forward)}, f"stage {k}, {step.op}"
        before[k] = now
    assert [int(s.module[1].num_batches_tracked) for s in chain.stages] == [5 * method.micro_batches] * 3


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
    """Live graphs, stored inputs, sets of weights: current, older, drawn out; each is held once, however many graphs need it."""
    kept = list(s.in_flight.items())
    graphs = [m for _, m in kept if m.outputs is not None]
    copies = {m.weights["weight"].data_ptr(): (m.version, drawn_out(m.step)) for m in graphs if m.weights}
    copies |= {weights["weight"].data_ptr(): (version, 0.0) for version, weights in s.banks.kept.items()}
    copies |= {weights["weight"].data_ptr(): key for key, weights in s.banks.drawn.items()}
    assert len(set(copies.values())) == len(copies), "a version was copied twice"
    assert all(m.weights is None for b, m in kept if m.outputs is None)
    inputs = [b for b, m in kept if m.step.keep == "input" and (m.outputs is None or b == replayed)]
    return len(graphs), len(inputs), len({(s.version, 0.0), *copies.values()})


def drawn_out(step: Step) -> float:
    assert isinstance(step.op, Forward)
    return step.op.weights.ahead if step.op.weights.draws_out(step.version) else 0.0


@pytest.mark.parametrize("method", every_method(3), ids=str)
def test_nothing_is_left_when_a_run_ends_and_graphs_go_with_their_last_use(method: Method) -> None:
    chain = Chain(seeded(lambda: [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(3)]), method, vectors(7))
    graphs: dict[tuple[int, int], Any] = {}
    for k, step in chain.steps():
        match step.op:
            case Forward(b) if b in chain.stages[k].in_flight and chain.stages[k].in_flight[b].outputs is not None:
                graphs[k, b] = weakref.ref(chain.stages[k].in_flight[b].outputs)
            case Backward(b) if step.last and (k, b) in graphs:
                assert graphs[k, b]() is None, f"stage {k} still holds the graph of batch {b}"
    assert not any(s.in_flight for s in chain.stages)
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
        checkpoint.state(chain.stages[0])


@pytest.mark.usefixtures("own_random")
def test_a_state_holds_each_version_of_the_weights_once() -> None:
    """Shared between its graphs before and after a trip through pickle."""
    chain = Chain(layers(), ADL(accumulate=3), vectors(12))
    for k, step in chain.steps():
        if k == 0 and step.op == Forward(8):
            break
    first = chain.stages[0]
    second = stage(copy.deepcopy(first.module), 0, 3)
    checkpoint.load(second, pickle.loads(pickle.dumps(checkpoint.state(first))))
    assert {b: m.version for b, m in second.in_flight.items()} == {b: m.version for b, m in first.in_flight.items()}
    assert holds(second) == holds(first)
    assert holds(first)[2] > 1


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


@pytest.mark.usefixtures("own_random")
def test_an_error_holds_a_tensor_or_none_per_floating_input() -> None:
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
    error, loss, batch = upper.backward(backward, None)
    assert error is not None
    assert loss is not None
    assert batch.message.samples == 3
    h, mask, skip = error.values  # h, the floats and x, but not the integers
    assert torch.equal(h, sent.values[2])
    assert torch.equal(mask, sent.values[0])
    assert skip is None
    assert lower.backward(Step(Backward(0, 1), 0, 0, last=True), error)[:2] == (None, None)
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
        (lambda out, y: (out - y) ** 2, r"returned a tensor of shape \(3, 4\): take its mean"),
        (lambda out, y: mse_loss(out, y).item(), "returned a float"),
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
