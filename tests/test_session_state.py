"""The state of a session: weights and rates that can be set, mistakes that leave it as it is, checkpoints that it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock import EMA, Checkpoint
from delock.errors import UsageError
from delock.methods import ADL, BP, DDG, FDG, FR, PACI, Method, PipeDream2BW
from delock.run.session import Session
from loops import EACH, SGD, batches, equal, network, session

from chain import seeded

pytestmark = pytest.mark.usefixtures("own_random")


@EACH
def test_weights_and_rates_can_be_set(workers: Any) -> None:
    other = seeded(network, 3)
    with session(network(), method="fdg", workers=workers) as run:
        run.step(batches()[0])
        with pytest.raises(UsageError, match=r"in flight.*drain\(\)"):
            run.load_state_dict(other.state_dict())
        run.drain()
        run.load_state_dict(other.state_dict())
        assert all(torch.equal(run.state_dict()[name], one) for name, one in other.state_dict().items())
        run.lr = 0.0
        assert run.lr == 0.0
        run.step(batches()[1])
        run.drain()
        weights = run.state_dict()
    assert torch.equal(weights["0.weight"], other[0].weight)


def in_groups(named: Any) -> torch.optim.Optimizer:
    """Leaves out groups that would be empty, as many do."""
    found: dict[bool, list[Any]] = {True: [], False: []}
    for name, weight in named:
        found[name.startswith("5.")].append(weight)
    rates = {False: 0.01, True: 0.1}
    return torch.optim.SGD([{"params": own, "lr": rates[last]} for last, own in found.items() if own])


@EACH
def test_rates_keep_the_proportions_in_which_they_were_made(workers: Any) -> None:
    """Over all stages, and after a rate of 0."""
    model, plain = network(), network()
    model[2].p = plain[2].p = 0.0  # type: ignore[assignment]
    with session(model, method="bp", optimizer=in_groups, workers=workers) as run:
        for i, batch in enumerate(batches()):
            run.lr = 0.0 if i == 2 else 0.01 / (i + 1)
            run.step(batch)
        for wrong in (-1.0, float("nan"), None, "0.1", True):
            with pytest.raises(UsageError, match="lr is"):
                run.lr = wrong  # type: ignore[assignment]
    optimizer = in_groups(plain.named_parameters())
    for i, (x, y) in enumerate(batches()):
        for group, rate in zip(optimizer.param_groups, (0.1, 0.01), strict=True):
            group["lr"] = 0.0 if i == 2 else (0.01 / (i + 1)) / 0.01 * rate
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert equal(model, plain)
    with session(network(), method="bp", optimizer=partial(torch.optim.SGD, lr=0.0)) as run, pytest.raises(UsageError, match="a rate of 0"):
        run.lr = 0.1


@EACH
def test_a_mistake_in_an_evaluation_does_not_end_the_session(workers: Any) -> None:
    with session(network(), method="fdg", workers=workers) as run:
        run.step(batches()[0])
        for wrong in (batches()[0], [batches()[0], 3]):
            with pytest.raises(UsageError):
                run.evaluate(wrong)
        assert run.evaluate(batches(2)).samples == 13
        run.step(batches()[1])


def ends_in_an_error(run: Session, loop: Callable[[Session], None]) -> None:
    loop(run)
    run.save()
    raise ZeroDivisionError


@pytest.mark.parametrize("drain", [False, True])
@pytest.mark.parametrize(
    ("method", "workers", "later"),
    [
        (FDG(), "inline", "inline"),
        (FDG(), "processes", "processes"),
        (DDG(accumulate=2), "inline", "processes"),
        (DDG(accumulate=2), "processes", "inline"),
        (PipeDream2BW(micro_batches=3), "inline", "inline"),
        (BP(behind=2, ahead="mean"), "inline", "processes"),
        (BP(accumulate=3), "inline", "inline"),
    ],
    ids=str,
)
def test_a_saved_session_goes_on_as_if_nothing_had_happened(method: Method, workers: Any, later: Any, drain: bool, tmp_path: Path) -> None:
    """With what was in flight, and after an earlier drain; the process that goes on knows nothing but the folder."""

    def first(run: Session) -> None:
        for i, batch in enumerate(batches()[:5]):
            run.step(batch, outputs=i == 4)
            if drain and i == 2:
                run.drain()

    whole = network()
    with session(whole, method=method) as run:
        first(run)
        came = [one for batch in batches()[5:] for one in run.step(batch)] + run.drain()
    saved = delock.Checkpoint(tmp_path)
    with pytest.raises(ZeroDivisionError), session(network(), method=method, workers=workers, checkpoint=saved) as run:
        ends_in_an_error(run, first)
    again = network()
    with session(again, method=method, workers=later, checkpoint=delock.Checkpoint(tmp_path, resume="newest")) as run:
        assert run.number == 5
        found = [one for batch in batches()[5:] for one in run.step(batch)] + run.drain()
    assert equal(again, whole)
    assert [one.loss for one in found][-4:] == [one.loss for one in came][-4:]
    assert [one.outputs is None for one in found] == [one.number != 4 for one in found]


def test_refusals_of_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calls save\(\)"):
        session(network(), checkpoint=delock.Checkpoint(tmp_path, every=3))
    with session(network()) as run, pytest.raises(UsageError, match="no folder"):
        run.save()
    with session(network(), method="fdg", checkpoint=delock.Checkpoint(tmp_path)) as run:
        run.save()
    with pytest.raises(UsageError, match="earlier run"), session(network(), method="fdg", checkpoint=delock.Checkpoint(tmp_path)):
        pass
    resume = delock.Checkpoint(tmp_path, resume="newest")
    with pytest.raises(UsageError, match="method was"), session(network(), method="bp", checkpoint=resume):
        pass
    with pytest.raises(UsageError, match="in the stages"), session(network(), method="fdg", stages=2, checkpoint=resume):
        pass


class Seen(nn.Linear):
    """Keeps a running mean of its inputs in a buffer that no state dict has, and subtracts it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return super().forward(x - self.mean)


@EACH
def test_weights_that_are_set_leave_the_rest_as_it_is(workers: Any) -> None:
    """To load what is there changes nothing."""
    with session(nn.Sequential(Seen(), Seen(), nn.Linear(8, 3)), method="bp", workers=workers) as run:
        for batch in batches()[:3]:
            run.step(batch)
        run.drain()
        before = run.evaluate(batches(3)).loss
        run.load_state_dict(run.state_dict())
        assert run.evaluate(batches(3)).loss == before


@EACH
def test_modes_of_torch_around_a_call(workers: Any) -> None:
    """Those that would change what stages compute are refused, and the session goes on; an evaluation has the same numbers in any."""
    first = batches()[0]
    with session(network(), method="bp", workers=workers) as run:
        run.step(first, wait=True)
        plain = run.evaluate([first]).loss
        with torch.inference_mode():
            assert run.evaluate(batches()[:1]).loss == plain
            with pytest.raises(UsageError, match=r"step is called within torch\.inference_mode, in which nothing can be trained"):
                run.step(first)
        with torch.autocast("cpu", torch.bfloat16):
            for call in (lambda: run.step(first), run.drain, lambda: run.evaluate([first])):
                with pytest.raises(UsageError, match=r"is called within torch.autocast.*Execution\(amp"):
                    call()
        run.step(first)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"^the session is over: make another one with delock\.session$"):
            run.state_dict()


def test_a_rate_is_the_one_that_was_set() -> None:
    with session(network(), method="bp", optimizer=partial(torch.optim.SGD, lr=0.01)) as run:
        for rate in (0.007, 0.0021, 0.1 / 3, 0.0, 0.007):
            run.lr = rate
            assert run.lr == rate


@EACH
def test_an_average_is_that_of_fit(workers: Any) -> None:
    """In evaluations, at the end, and in a session that goes on."""
    average, own, model = EMA(0.8), network(), network()
    options: dict[str, Any] = {"loss": cross_entropy, "optimizer": SGD, "method": "bp", "stages": 3, "callbacks": [average]}
    result = delock.fit(model, batches(), batches(3), epochs=1, eval_every=9, workers="inline", **options)
    with session(own, method="bp", workers=workers, callbacks=[average]) as run:
        for batch in batches():
            run.step(batch)
        run.drain()
        assert run.evaluate(batches(3)).loss == pytest.approx(result.evaluations[-1].test_loss, rel=1e-6)
        weights, mean = run.state_dict(), run.state_dict(average=True)
    assert equal(own, model)
    assert not torch.equal(weights["0.weight"], own[0].weight)  # the weights themselves
    assert all(torch.equal(mean[name], one) for name, one in own.state_dict().items())


@EACH
def test_an_average_begins_anew_with_weights_that_are_set(workers: Any) -> None:
    other = seeded(network, 3)
    with session(network(), method="bp", callbacks=[EMA(0.8)], workers=workers) as run:
        run.step(batches()[0])
        run.drain()
        run.load_state_dict(other.state_dict())
        with_it = run.evaluate(batches(3)).loss
        run.step(batches()[1])
        run.drain()
        assert torch.equal(run.state_dict(average=True)["0.weight"], run.state_dict()["0.weight"])  # the first update sets it
    with session(other, method="bp") as run:
        assert run.evaluate(one for one in batches(3)).loss == with_it
        with pytest.raises(UsageError, match="keeps no average"):
            run.state_dict(average=True)


LATE = (
    *(ADL(accumulate=4), DDG(accumulate=3, micro_batches=2), PipeDream2BW(micro_batches=3), PipeDream2BW(3, "part"), BP(behind=2)),
    *(BP(behind=1, ahead="mean"), DDG(3, "part"), FDG(micro_batches=2, ahead="mean"), FR(2, "part"), PACI(3, "part")),
)


@pytest.mark.parametrize(
    ("method", "workers", "load"),
    [*((one, "inline", i % 2 == 0) for i, one in enumerate(LATE)), (LATE[0], "processes", False), (LATE[2], "processes", False)],
    ids=str,
)
def test_a_drain_ends_a_run_and_begins_another(method: Method, workers: Any, load: bool) -> None:
    """Groups that accumulate gradients too, and weights that are old or ahead; sgd without momentum, so that the optimizer has no state."""
    plain: dict[str, Any] = {"method": method, "workers": workers, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    own, other, third = network(), network(), seeded(network, 3)
    own[2].p = other[2].p = third[2].p = 0.0  # type: ignore[assignment]
    with session(own, **plain) as run:
        for i, batch in enumerate(batches()):
            run.step(batch)
            if i == 4:
                run.drain()
                first = run.state_dict()
                if load:
                    run.load_state_dict(third.state_dict())
    for part in (batches()[:5], batches()[5:]):
        with session(other, **plain) as run:
            for batch in part:
                run.step(batch)
        if len(part) == 5:
            assert all(torch.equal(one, first[name]) for name, one in other.state_dict().items())
        if load and len(part) == 5:
            other.load_state_dict(third.state_dict())
    assert equal(own, other)


def test_an_average_goes_on_with_its_session(tmp_path: Path) -> None:
    whole, own = network(), network()
    with session(whole, method="ddg", callbacks=[EMA(0.8)]) as run:
        for batch in batches():
            run.step(batch)
    checkpoint = Checkpoint(tmp_path, resume="newest")
    with session(network(), method="ddg", callbacks=[EMA(0.8)], checkpoint=checkpoint) as run:
        for batch in batches()[:5]:
            run.step(batch)
        run.save()
    with session(own, method="ddg", callbacks=[EMA(0.8)], checkpoint=checkpoint) as run:
        for batch in batches()[run.number :]:
            run.step(batch)
    assert equal(own, whole)


def test_a_loop_acts_by_itself() -> None:
    with pytest.raises(UsageError, match="callbacks of a session holds EarlyStopping"):
        session(network(), callbacks=[delock.EarlyStopping()])
    with pytest.raises(UsageError, match="callbacks of a session holds print"):
        session(network(), callbacks=[print])


def test_one_run_at_a_time_trains_a_model() -> None:
    model = network()
    with session(model, method="bp") as run:
        with pytest.raises(UsageError, match="is being trained by another run"), session(model):
            raise AssertionError
        with pytest.raises(UsageError, match="is being trained by another run"):
            delock.fit(model, batches(), loss=cross_entropy, optimizer=SGD, workers="inline", stages=3, epochs=1)
        run.step(batches()[0])
    with session(model, method="bp") as run:  # it has ended
        run.step(batches()[0])


@EACH
def test_an_empty_batch_is_refused_and_the_session_goes_on(workers: Any) -> None:
    with session(network(), method="bp", workers=workers) as run:
        run.step(batches()[0])
        with pytest.raises(UsageError, match="batch 1 has no samples"):
            run.step((torch.empty(0, 8), torch.empty(0, dtype=torch.long)))
        run.step(batches()[1])
    assert run.result is not None
    assert len(run.result.losses) == 2


@EACH
def test_a_session_saved_behind_a_drain_goes_on_with_nothing_in_flight(workers: Any, tmp_path: Path) -> None:
    for drained in (True, False):
        folder = tmp_path / str(drained)
        with session(network(), method="ddg", checkpoint=Checkpoint(folder)) as run:
            run.step(batches()[0])
            if drained:
                run.drain()
            run.save()
        with session(network(), method="ddg", workers=workers, checkpoint=Checkpoint(folder, resume="newest")) as run:
            assert run.number == 1
            with nullcontext() if drained else pytest.raises(UsageError, match="batches are in flight"):
                run.load_state_dict(network().state_dict())
