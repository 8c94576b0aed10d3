"""The remedy for a loss that is no number: what can be seen in its batch, and what cannot be the cause."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import delock
from delock.data import Batches
from delock.errors import NonFinite, UsageError
from delock.methods import ADL, DGL, DSP, FDG, FR, GPipe, Method, PipeDream2BW
from delock.run import nonfinite

from chain import seeded, vectors

pytestmark = pytest.mark.usefixtures("own_random")

NO_UPDATE = "after 0 updates; no update was made before it, so neither the learning rate nor staleness can be the cause: "


def told(data: Any, method: str | Method = "fdg", *, rate: float = 0.01, loss: Any = mse_loss, weight: float = 0.5, **options: Any) -> str:
    """The error of a run of two stages whose loss becomes no number."""
    model = seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    nn.init.constant_(model[0].weight, weight)
    given = {"optimizer": partial(torch.optim.SGD, lr=rate), "cuts": [1], "epochs": 3, "workers": "inline"} | options
    with pytest.raises(NonFinite) as caught:
        delock.fit(model, data, loss=loss, method=method, **given)
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


def spoilt(batch: int, row: int, value: float, which: int = 0) -> list[tuple[Tensor, Tensor]]:
    data = vectors(4, rows=6)
    data[batch][which][row, :2] = value
    return data


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_inputs_that_are_no_numbers(workers: str) -> None:
    error = told(spoilt(2, 1, math.nan), workers=workers)
    assert error == "the loss of batch 2 became nan at stage 1, after 2 updates; its inputs hold 2 numbers NaN or infinite: clean the data"


@pytest.mark.parametrize("codec", ["bf16", "int8", "vq:codes=4:dim=1:every=50"])
def test_no_codec_makes_numbers_of_what_is_none(codec: str) -> None:
    error = told(spoilt(2, 1, math.nan), compression=delock.Compression(codec))
    assert error.startswith("the loss of batch 2 became nan at stage 1, after 2 updates; its inputs hold 2 numbers NaN")


@pytest.mark.parametrize("method", [GPipe(3), ADL(4), DSP(), FR()], ids=str)
def test_inputs_and_targets_under_every_kind_of_method(method: Method) -> None:
    assert told(spoilt(0, 5, -math.inf), method).endswith("its inputs hold 2 numbers NaN or infinite: clean the data")
    assert told(spoilt(3, 5, math.inf, 1), method).endswith("its targets hold 2 numbers NaN or infinite: clean the data")


def test_only_the_part_that_has_the_loss_is_looked_at() -> None:
    """The fault named is the first's, not the one of a part to come."""
    data = spoilt(1, 0, math.nan)
    data[1][0][4] = math.inf
    assert "batch 1 (micro-batch 4) became nan at stage 1, after 1 update; its inputs hold 2 numbers" in told(data, PipeDream2BW())
    assert "batch 1 (micro-batch 3) became nan at stage 1, after 1 update; its inputs hold 2 numbers" in told(data, GPipe(3))


def behind_sigmoid(data: Any, method: str | Method, **options: Any) -> str:
    """The error of a run in which an infinite input leaves the loss of its own batch finite."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)))
    given = {"optimizer": partial(torch.optim.SGD, lr=0.01), "cuts": [2], "epochs": 3, "workers": "inline"} | options
    with pytest.raises(NonFinite) as caught:
        delock.fit(model, data, loss=mse_loss, method=method, **given)
    return str(caught.value)


SPOILS = ", which can spoil the weights for all batches after it: clean the data"


@pytest.mark.parametrize("method", ["bp", "fdg", "dgl", GPipe(2)], ids=str)
def test_an_infinite_input_whose_effect_shows_up_in_a_later_batch(method: str | Method) -> None:
    data = vectors(6, rows=6)
    data[1][0][2, 3] = math.inf
    error = behind_sigmoid(data, method, heads=[nn.Linear(4, 4)] if method == "dgl" else None)
    assert "the loss of batch 1 " not in error
    assert error.endswith(f"; the inputs of batch 1 hold 1 number NaN or infinite{SPOILS}")


def test_an_infinite_input_at_the_end_of_an_epoch_whose_effect_shows_up_in_the_next() -> None:
    data = vectors(4, rows=6)
    data[3][0][2, 3] = math.inf
    error = behind_sigmoid(data, "bp")
    assert error.startswith("the loss of batch 4 became nan")
    assert error.endswith(f"; the inputs of batch 3 hold 1 number NaN or infinite{SPOILS}")


class Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_the_tensor_at_fault_is_named() -> None:
    data = [((x, x.clone()), {"y": y, "z": y.clone()}) for x, y in vectors(3)]
    data[1][0][1][0, 0] = math.nan
    model = seeded(lambda: nn.Sequential(Sum(), nn.Linear(4, 4), nn.Linear(4, 4)))
    made = partial(torch.optim.SGD, lr=0.01)

    def loss(out: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return mse_loss(out, targets["y"]) + mse_loss(out, targets["z"])

    with pytest.raises(NonFinite, match=r"loss of batch 1 .*; its inputs\[1\] hold 1 number NaN or infinite: clean the data$"):
        delock.fit(model, data, loss=loss, optimizer=made, cuts=[2], epochs=1, workers="inline")
    data[1][0][1][0, 0] = 0.0
    data[1][1]["z"][0] = math.inf
    with pytest.raises(NonFinite, match=r"loss of batch 1 .*; its targets\['z'\] hold 4 numbers NaN or infinite: clean the data$"):
        delock.fit(model, data, loss=loss, optimizer=made, cuts=[2], epochs=1, workers="inline")


def huge(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.exp() * 1e30).exp().mean()


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_before_any_update_neither_rate_nor_staleness_is_named(workers: str) -> None:
    want = NO_UPDATE + "its inputs are finite, so look at the loss and the initial weights"
    assert told(vectors(3), loss=huge, workers=workers) == f"the loss of batch 0 became inf at stage 1, {want}"
    assert told(vectors(3), weight=math.nan, method="gpipe").endswith(want)


@pytest.mark.parametrize(
    ("method", "remedy"),
    [(FDG(), "lower the learning rate, warm it up, or shrink the gradients (beta)"), (GPipe(3), "lower the learning rate or warm it up"),
     (DGL(), "lower the learning rate or warm it up")],
    ids=str,
)  # fmt: skip
def test_beta_is_named_where_the_method_has_it(method: Method, remedy: str) -> None:
    options = {"heads": [nn.Linear(4, 4)]} if isinstance(method, DGL) else {}
    assert told(vectors(6), method, rate=1e25, **options).split("; ")[1] == remedy  # type: ignore[arg-type]


def classes(*ignored: int) -> list[tuple[Tensor, Tensor]]:
    x, _ = vectors(1, rows=6)[0]
    return [(x, (torch.arange(6) % 4).index_fill(0, torch.tensor(ignored), -100))]


def test_a_part_whose_targets_are_ignored() -> None:
    error = told(classes(2, 3), GPipe(3), loss=cross_entropy)
    assert error.startswith("the loss of batch 0 (micro-batch 1) became nan at stage 1, after 0 updates; all its targets are -100")
    assert "delock.data.Batches(loader, weight=delock.nets.tokens)" in error
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weighed = Batches(classes(2, 3), weight=delock.nets.tokens)
    made = partial(torch.optim.SGD, lr=0.1)
    result = delock.fit(model, weighed, loss=cross_entropy, method=GPipe(3), optimizer=made, epochs=1, workers="inline")
    assert math.isfinite(result.losses[0])


class Once:
    """Data that differ, take long or fail when they are read again."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then, self.read = then, 0

    def __len__(self) -> int:
        return 3

    def sizes(self) -> None:
        return None

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.read += 1
        for x, y in vectors(3):
            if self.read > 2:  # one reads to measure, and one to train
                self.then()
            yield x, y


def fails() -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("then", [fails, partial(time.sleep, 0.02)], ids=["fails", "slow"])
def test_a_batch_that_cannot_be_read_again(then: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "PATIENCE", 0.001)
    first = NO_UPDATE + "look at its inputs, the loss and the initial weights"
    if then is fails:
        assert told(Once(then), loss=huge).endswith(first)
    assert told(Once(then), rate=1e25).endswith("lower the learning rate, warm it up, or shrink the gradients (beta)")


def test_nothing_is_read_again_while_all_is_well() -> None:
    data = Once(fails)
    delock.fit(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        data,
        loss=mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=1,
        workers="inline",
    )
    assert data.read == 2


@pytest.mark.parametrize(("rate", "says"), [(3e38, r"the weight \S+ NaN or infinite"), (1e30, "a test loss of (nan|inf)")])
def test_a_run_that_ends_with_what_is_no_number_warns(rate: float, says: str) -> None:
    """The loss of its last batch was finite, and what the update has spoilt would be seen by the next one."""
    model, data = seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))), vectors(1)
    made = partial(torch.optim.SGD, lr=rate, weight_decay=100.0)
    with pytest.warns(UserWarning, match=f"the run has ended with {says}.*: lower the learning rate"):
        delock.fit(model, data, data, loss=mse_loss, optimizer=made, cuts=[1], batches=1, workers="inline", method="bp")
