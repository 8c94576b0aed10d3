"""Sessions: a loop of one's own has the bits of `fit`, whatever it does in between, and leaves nothing behind however it ends."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data import Batches
from delock.errors import NonFinite, StageFailed, UsageError
from delock.methods import BP, DGL, FDG, GPipe, Method, PipeDream2BW
from delock.records import BatchResult
from delock.run.session import Session
from loops import EACH, SGD, accuracy, batches, equal, network, session

from chain import seeded
from harness import enough, every_method, options_of
from leftovers import children

PROCESSES: list[Method] = [GPipe(micro_batches=2), FDG(beta=0.5), PipeDream2BW(micro_batches=3, ahead="part"), DGL()]
pytestmark = pytest.mark.usefixtures("own_random")


def trained(method: Method, workers: Any, loop: Callable[[Session], list[BatchResult]], **options: Any) -> tuple[nn.Module, list[float]]:
    model = network()
    with session(model, method=method, workers=workers, **options) as run:
        found = loop(run)
        found += run.drain()
    assert [one.number for one in found] == list(range(len(found)))
    return model, [one.loss for one in found]


def through(run: Session, given: list[tuple[Tensor, Tensor]]) -> None:
    """Hands all batches in, and lets them through."""
    for batch in given:
        run.step(batch)
    run.drain()


def plainly(run: Session) -> list[BatchResult]:
    return [one for batch in batches() for one in run.step(batch)]


def busily(run: Session) -> list[BatchResult]:
    """Looks at all there is to see between the batches, and writes to each batch when it was handed in."""
    found = []
    for i, batch in enumerate(batches()):
        found += run.step(batch, outputs=i % 2 == 0, wait=i == 4)
        batch[0].fill_(torch.nan)
        torch.randn(3)
        if i in (1, 5):
            run.evaluate(batches(3))
        if i == 6:
            run.state_dict()
            assert run.lr == 0.1
    return found


@pytest.mark.parametrize(
    ("method", "clip"),
    enough(itertools.product(every_method(3), (None, 0.3)), together=1, of=lambda method, clip: (*options_of(method), clip)),
    ids=str,
)
def test_a_session_has_the_bits_of_fit(method: Method, clip: float | None) -> None:
    options: dict[str, Any] = {"clip": clip} if clip else {"metrics": {"accuracy": accuracy}}
    model = network()
    result = delock.fit(model, batches(), loss=cross_entropy, optimizer=SGD, method=method, stages=3, epochs=1, workers="inline", clip=clip)
    for loop in (plainly, busily) if clip else (busily,):
        own, losses = trained(method, "inline", loop, **options)
        assert equal(own, model)
        assert losses == result.losses


REST = [pytest.param(one, marks=pytest.mark.slow) for one in every_method(3) if one not in PROCESSES]


@pytest.mark.parametrize("method", [*PROCESSES, *REST], ids=str)
def test_processes_have_the_bits_of_one(method: Method) -> None:
    options: dict[str, Any] = {"clip": 0.3, "metrics": {"accuracy": accuracy}}
    if method == PROCESSES[1]:
        options["compression"] = delock.Compression(delock.BF16())
    model, losses = trained(method, "processes", busily, **options)
    here, same = trained(method, "inline", plainly, **options)
    assert equal(model, here)
    assert losses == same
    assert not children()


@EACH
def test_results_say_what_a_batch_gave(workers: Any) -> None:
    """Metrics and outputs are those of training, also of a batch in parts; with wait=True they come at once wherever stages run."""
    model, first = network(), batches()[0]
    model[2].p = 0.0  # type: ignore[assignment]
    with session(model, method=GPipe(micro_batches=2), metrics={"accuracy": accuracy}, workers=workers) as run:
        (one,) = run.step(first, outputs=True, wait=True)
        (two,) = run.step(first, wait=True)
    whole = network().train()
    whole[2].p = 0.0  # type: ignore[assignment]
    out = torch.cat([whole(part) for part in first[0].tensor_split(2)])
    assert torch.equal(one.outputs, out)
    assert two.outputs is None
    assert (one.number, one.samples, one.lr) == (0, 7, 0.1)
    parts = zip(out.tensor_split(2), first[1].tensor_split(2), strict=True)
    assert one.metrics["accuracy"] == pytest.approx(sum(float(accuracy(o, y)) * len(y) for o, y in parts) / 7)


@EACH
def test_outputs_of_parts_in_which_nothing_counts_come_back(workers: Any) -> None:
    """A row for every sample; without any that counts metrics are NaN, and an evaluation is refused."""
    counted = Batches(batches()[0], weight=lambda y: (y != -100).sum())
    x, y = batches()[0][0][:4], torch.tensor([1, -100, 2, 0])
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    out = plain(x).detach()
    options: dict[str, Any] = {"method": GPipe(micro_batches=4), "metrics": {"accuracy": accuracy}, "workers": workers}
    with delock.session(plain, counted, loss=cross_entropy, optimizer=SGD, stages=3, **options) as run:
        (one,) = run.step((x, y), outputs=True, wait=True)
        assert torch.allclose(one.outputs, out)
        assert (one.samples, one.metrics["accuracy"]) == (4, pytest.approx(float(accuracy(out, y)) * 4 / 3))
        (none,) = run.step((x, torch.full((4,), -100)), outputs=True, wait=True)
        assert (none.samples, len(none.outputs), list(none.metrics)) == (4, 4, ["accuracy"])
        assert math.isnan(none.loss)
        assert math.isnan(none.metrics["accuracy"])
        with pytest.raises(UsageError, match=r"the test data has samples, but weight\(targets\) is 0 for all of them"):
            run.evaluate([(x, torch.full((4,), -100))])


class Cropped(nn.Embedding):
    """Crops to the longest row of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : int((x != 0).sum(1).max())])


def test_outputs_whose_shapes_differ_come_back_part_by_part() -> None:
    ids = torch.tensor([[1, 2, 0, 0], [1, 0, 0, 0], [2, 3, 4, 0], [3, 1, 0, 0]])
    model = [Cropped(5, 4), nn.Linear(4, 5)]
    with delock.session(
        model, (ids, ids), loss=lambda o, y: o.square().mean(), optimizer=SGD, method=GPipe(micro_batches=2), workers="inline"
    ) as run:
        (one,) = run.step((ids, ids), outputs=True, wait=True)
    assert [tuple(part.shape) for part in one.outputs] == [(2, 2, 5), (2, 3, 5)]


def test_a_delayed_batch_comes_when_the_last_stage_is_through() -> None:
    with session(network(), method="fdg") as run:
        came = [[one.number for one in run.step(batch)] for batch in batches()]
        assert came == [[], [], *([i] for i in range(7))]
        assert [one.number for one in run.drain()] == [7, 8]
        assert run.drain() == []


@EACH
def test_a_session_goes_on_behind_a_drain(workers: Any) -> None:
    """Its batches come into an empty pipeline. Nothing is lost, and bp, which has nothing in flight, does not notice."""

    def drains(run: Session) -> list[BatchResult]:
        found = []
        for i, batch in enumerate(batches()):
            found += run.step(batch)
            found += run.drain() if i in (3, 6) else []
        return found

    bp = trained(BP(), "inline", plainly)
    again = trained(BP(), workers, drains)
    assert equal(bp[0], again[0])
    assert bp[1] == again[1]
    for method in (FDG(), PipeDream2BW(micro_batches=2)):
        model, losses = trained(method, workers, drains)
        other, same = trained(method, "inline", drains)
        assert equal(model, other)
        assert losses == same
        assert len(losses) == 9


@EACH
def test_an_evaluation_is_of_the_weights_of_now(workers: Any) -> None:
    """In eval mode, over several sets, weighted by samples; the same as the model's own with the session's `state_dict`."""
    with session(network(), method="fdg", metrics={"accuracy": accuracy}, workers=workers) as run:
        for batch in batches()[:5]:
            run.step(batch)
        found = run.evaluate({"one": batches()[-2:], "two": batches()[:1]})
        model = network().eval()
        model.load_state_dict(run.state_dict())
    x, y = (torch.cat(one) for one in zip(*batches()[-2:], strict=True))
    out = model(x).detach()
    assert found.loss == pytest.approx(float(cross_entropy(out, y)), rel=1e-6)
    assert found.metrics["one/accuracy"] == pytest.approx(float(accuracy(out, y)))
    assert found.metrics.keys() == {"one/loss", "two/loss", "one/accuracy", "two/accuracy"}
    assert found.samples == 20


class Names(nn.Module):
    """Takes a dict and returns one, with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.a(x).tanh()
        out = self.c(h + self.b(h))
        return {"logits": out, **({"loss": cross_entropy(out, labels)} if labels is not None else {})}


@EACH
def test_a_traced_model_computes_its_own_loss(workers: Any) -> None:
    model = seeded(Names)
    given = [{"x": x, "labels": y} for x, y in batches()]
    losses = []
    with delock.session(model, given[0], optimizer=SGD, method="bp", stages=2, workers=workers) as run:
        for batch in given:
            (one,) = run.step(batch, outputs=True, wait=True)
            losses.append(one.loss)
            assert one.outputs["logits"].shape == (len(batch["x"]), 3)
        with pytest.raises(UsageError, match="batch 9"):
            run.step({"y": given[0]["x"]})
        with pytest.raises(UsageError, match="batch 9"):
            run.step(batches()[0][0])
        losses.append(run.step(given[0], wait=True)[0].loss)
    plain = seeded(Names)
    optimizer = SGD(plain.parameters())
    for batch, loss in zip([*given, given[0]], losses, strict=True):
        optimizer.zero_grad()
        own = plain(**batch)["loss"]
        own.backward()
        optimizer.step()
        assert own.item() == loss
    assert equal(model, plain)


@EACH
@pytest.mark.parametrize("at", ["begin", "flight", "drained", "evaluated"])
def test_an_exception_in_the_loop_leaves_nothing(workers: Any, at: str) -> None:
    model, before = network(), network()
    error: type[BaseException] = KeyboardInterrupt if at == "flight" else ValueError

    def loop(run: Session) -> None:
        for batch in batches()[: 0 if at == "begin" else 4]:
            run.step(batch)
        if at == "drained":
            run.drain()
        if at == "evaluated":
            run.evaluate(batches(2))
        raise error("of the loop")

    with pytest.raises(error), session(model, method="fdg", workers=workers) as run:
        loop(run)
    assert equal(model, before)
    assert not children()
    with pytest.raises(UsageError, match="the session is over"):
        run.step(batches()[0])


def failing(out: Tensor, y: Tensor) -> Tensor:
    """Raises at the label 0."""
    if (y == 0).all():
        raise RuntimeError("no label but 0")
    return cross_entropy(out, y)


@EACH
def test_a_stage_that_fails_ends_the_session(workers: Any) -> None:
    model, bad = network(), (batches()[0][0], torch.zeros(7, dtype=torch.int64))
    with session(model, method="fdg", loss=failing, workers=workers) as run:
        with pytest.raises(StageFailed, match="no label but 0"):
            through(run, [*batches()[:2], bad, *batches()])
        assert not children()
        with pytest.raises(UsageError, match="the session is over"):
            run.step(batches()[0])
    assert run.result is None
    assert equal(model, network())


@EACH
def test_a_loss_that_is_no_number_ends_it(workers: Any) -> None:
    first = batches()[0]
    with pytest.raises(NonFinite, match="loss of batch 1 became nan"), session(network(), method="bp", workers=workers) as run:
        through(run, [first, (first[0] * torch.nan, first[1])])


def test_a_stage_that_is_killed_is_told_at_the_next_step() -> None:
    """Also while the loop does other things, and nobody looks."""
    with session(network(), method="fdg", workers="processes") as run:
        run.step(batches()[0], wait=True)
        os.kill(min(children()), signal.SIGKILL)
        with pytest.raises(StageFailed, match=r"stage \d.*killed|SIGKILL"):
            through(run, batches() * 20)


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "dgl-async"}, "run freely"),
        ({"stages": 9}, "cannot cut"),
        ({"workers": "threads"}, "workers"),
        ({"simulation": delock.Simulation(replay=[])}, "replay"),
        ({"loss": None}, "loss is missing"),
    ]
    for options, words in cases:
        with pytest.raises(UsageError, match=words), session(network(), **options):
            pass
    with pytest.raises(UsageError, match=r"with delock\.session"):
        session(network()).step(batches()[0])
    run = session(network(), schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    with run:
        with pytest.raises(UsageError, match="schedule sets"):
            run.lr = 1.0
        with pytest.raises(UsageError, match="no samples"):
            run.evaluate([(torch.empty(0, 8), torch.empty(0, dtype=torch.int64))])
    with pytest.raises(UsageError, match="entered once"), run:
        pass


def test_under_torchrun_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="under torchrun use fit"):
        session(network())
