"""The number of updates that a run makes, asked before it, is that of its stages after it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import delock
from delock.data import Batches, as_loader
from delock.errors import UsageError
from delock.methods import ADL, METHODS, AsyncDGL, Method
from delock.nets import tokens
from delock.recipes import updates

from chain import seeded, vectors
from harness import every_method

ASYNC: list[Method] = [AsyncDGL(order="sampled"), AsyncDGL(order="round-robin"), AsyncDGL(order="sampled", max_reuse=2)]
CASES = [*every_method(2), *(ADL(accumulate) for accumulate in (3, 4, 5, 9, 40)), *ASYNC]


def made(method: Method, data: Any, epochs: int, **options: Any) -> list[int]:
    model = seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))))
    heads = [nn.Linear(4, 4) for _ in method.headed(2)] or None
    given = {"optimizer": partial(torch.optim.SGD, lr=0.01), "cuts": [1], "workers": "inline", "heads": heads} | options
    result = delock.fit(model, data, loss=mse_loss, method=method, epochs=epochs, **given)
    return [stage.updates for stage in result.stages]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", CASES, ids=str)
@pytest.mark.parametrize(("batches", "epochs"), [(1, 1), (7, 3)])
def test_a_run_makes_that_many_on_every_stage(method: Method, batches: int, epochs: int) -> None:
    data = vectors(batches)
    assert made(method, data, epochs) == [updates(method, data, epochs)] * 2


@pytest.mark.usefixtures("own_random")
def test_free_running_stages_make_that_many() -> None:
    data = vectors(5)
    assert made(AsyncDGL(), data, 2, workers="processes") == [updates("dgl-async", data, 2)] * 2 == [10, 10]


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_a_method_with_its_defaults(name: str) -> None:
    assert updates(name, vectors(5), 3) == updates(METHODS[name](), vectors(5), 3) == (8 if name == "adl" else 15)


def test_any_data_that_fit_takes() -> None:
    """As many as a schedule is stepped; an incomplete last group counts."""
    endless = as_loader(vectors(9), batches_per_epoch=7)
    assert [updates(ADL(4), data, 1) for data in (endless, Batches(vectors(7), weight=tokens))] == [2, 2]


def test_refusals() -> None:
    for epochs in (0, -1, 1.5, True, "3"):
        with pytest.raises(UsageError, match="it must be a whole number, at least 1"):
            updates("bp", vectors(2), epochs)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="can be read only once"):
        updates("bp", iter(vectors(2)), 1)
    with pytest.raises(UsageError, match="no method is called 'ald'"):
        updates("ald", vectors(2), 1)
    with pytest.raises(UsageError, match="it must be a method of delock"):
        updates(ADL, vectors(2), 1)  # type: ignore[arg-type]
