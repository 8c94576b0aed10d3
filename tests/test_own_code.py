"""Errors in the user's own code, a layer or the loss: who is at fault, in its own words, with the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO, TextIOWrapper
from threading import Lock
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.errors import StageFailed, UsageError

from chain import seeded

pytestmark = pytest.mark.usefixtures("own_random")


class Own(nn.Module):
    """A layer that calls a given function."""

    def __init__(self, act: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Any:
        return self.act(x)


def raises(error: Exception) -> Callable[[Tensor], Any]:
    def act(x: Tensor) -> Any:
        raise error

    return act


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 4, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(n)]


def fit(act: Any = torch.tanh, data: Any = None, **options: Any) -> Any:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), Own(act), nn.Linear(8, 3)))
    given = {"loss": cross_entropy, "optimizer": partial(torch.optim.SGD, lr=0.1), "cuts": [2], "epochs": 1, "workers": "inline"} | options
    return delock.fit(given.pop("model", model), data or batches(), given.pop("test", None), **given)


def refused(act: Any = torch.tanh, data: Any = None, **options: Any) -> tuple[str, BaseException | None]:
    """The words of a refusal before a run begins, and the error behind it."""
    heard: list[Any] = []
    with pytest.raises(UsageError) as caught:
        fit(act, data, callbacks=[heard.append], **options)
    assert not heard
    return str(caught.value), caught.value.__cause__


# ---- layers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [AssertionError("five features"), NotImplementedError("later"), RuntimeError("no\nmore"), TypeError("t"), KeyError("k"),
     AttributeError("a"), ZeroDivisionError("z")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_layer_raises_names_the_layer_and_shows_its_own_words(error: Exception) -> None:
    text, cause = refused(raises(error))
    first = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    assert text.startswith(f"layer 1 (1, Own) fails on its input (5, 8) float32: {first} (test_own_code.py, line ")
    assert cause is error


def test_a_layer_of_torch_that_fails_shows_no_line_of_the_user() -> None:
    text, _ = refused(model=nn.Sequential(nn.Linear(4, 8), nn.ModuleList(), nn.Linear(8, 3)))
    assert text.startswith("layer 1 (1, ModuleList) fails on its input (5, 8) float32: NotImplementedError: Module [ModuleList] is missing")
    assert text.endswith("function")


def test_a_layer_that_has_no_derivative_is_named() -> None:
    assert "layer 1 (1, Own) fails on its input" in refused(lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1))[0]


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda x: None, "None"),
        (lambda x: (x, (x, x)), "a tuple of 2 (Tensor, tuple)"),
        (lambda x: [x], "a list of 1 (Tensor)"),
        (lambda x: {"x": x}, "a dict"),
        (lambda x: "x", "a str"),
        (lambda x: (x, None), "a tuple of 2 (Tensor, NoneType)"),
        (lambda x: (), "an empty tuple"),
        (lambda x: 1, "an int"),
    ],
)
def test_a_layer_that_returns_no_tensors_is_named_with_what_it_returns(act: Any, what: str) -> None:
    assert (
        refused(act)[0] == f"layer 1 (1, Own) returns {what}, and only a tensor or a tuple of tensors can go from layer to layer: wrap it"
    )


def test_a_layer_that_returns_no_tensors_later_is_named_too() -> None:
    data = [*batches(2), (torch.full((5, 4), 9.0), batches(1)[0][1])]
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), Own(lambda x: {"x": x} if x.abs().max() > 3 else x), nn.Linear(4, 3)))
    with pytest.raises(UsageError, match=r"the last layer \(Own\) of stage 0 returns a dict, and only a tensor or a tuple of tensors"):
        fit(data=data, model=model)


@pytest.mark.parametrize("make", [Lock, partial(open, __file__)], ids=["lock", "file"])
def test_a_layer_with_something_that_cannot_be_copied_trains_inline(make: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Sequential(Own(torch.tanh)), nn.Linear(8, 3)))
    model[1][0].handle = {"deep": [handle := make()]}
    before = model[0].weight.clone()
    fit(model=model)
    assert model[1][0].handle["deep"][0] is handle
    assert not torch.equal(before, model[0].weight)
    if hasattr(handle, "close"):
        handle.close()


# ---- loss --------------------------------------------------------------------------------------------------------------------------

ONE = "the loss must be one number for a batch, a tensor computed from the outputs, but loss(outputs, targets) returned "


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda out, y: cross_entropy(out, y).item(), ONE + "a float: return the tensor itself, without item() or float()"),
        (lambda out, y: None, ONE + "None: return the loss"),
        (lambda out, y: (cross_entropy(out, y), 1), ONE + "a tuple of 2 (Tensor, int): return the one that is to be differentiated"),
        (lambda out, y: cross_entropy(out, y, reduction="none"), ONE + "a tensor of shape (5,): take its mean"),
        (lambda out, y: cross_entropy(out, y) * 1j, ONE + "a complex number (() complex64): take its real part or its absolute value"),
        (lambda out, y: cross_entropy(out, y).long(), "the loss cannot be differentiated, and a tensor of dtype int64 has no gradient: "),
        (lambda out, y: cross_entropy(out, y).detach(), "the loss cannot be differentiated: compute it from the outputs by torch's own"),
    ],
)
@pytest.mark.parametrize("method", ["fdg", "dgl"])
def test_a_loss_that_returns_something_else_is_told_what_it_must_return(loss: Any, says: str, method: str) -> None:
    assert refused(loss=loss, method=method)[0].removeprefix("the auxiliary head of stage 0 does not fit: ").startswith(says)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0, 1, 2, 3, 9]), "(5,) int64 from 0 to 9"),
        (torch.tensor([0, 1, 2, 1, 0]).int(), "(5,) int32 from 0 to 2"),
        (torch.tensor([0, 1, 2, 1, 0.5]), "(5,) float32 from 0 to 2"),
        (torch.tensor([0, 1]), "(2,) int64 from 0 to 1"),
    ],
)
def test_labels_that_the_loss_does_not_take_are_shown_and_no_layer_is_blamed(labels: Tensor, says: str) -> None:
    given = f"loss(outputs, targets) was called with outputs (5, 3) float32 and targets {says}"
    bad = (batches(1)[0][0], labels)
    text, cause = refused(data=[bad, *batches(2)])
    assert text.startswith(f"the loss failed: {type(cause).__name__}: ")
    assert text.endswith(given)
    assert "layer" not in text
    with pytest.raises(StageFailed) as caught:
        fit(data=[*batches(2), bad])
    told = str(caught.value).split("\n\n")[0]
    assert told.startswith("stage 1 failed in B2 (backward of batch 2, tick 2): ")
    assert told.endswith(given)


# ---- factories and callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (partial(torch.optim.SGD, lr=-1), "SGD(lr=-1) fails at stage 0: ValueError: Invalid learning rate: -1"),
        (partial(torch.optim.SGD, lr=0.1, momentun=0.9), "SGD(lr=0.1, momentun=0.9) fails at stage 0: TypeError: "),
        (
            delock.recipes.SGD(0.1, nesterov=True),
            "SGD(lr=0.1, momentum=0.0, weight_decay=0.0, nesterov=True) fails at stage 0: ValueError: ",
        ),
        (raises(ZeroDivisionError("mine")), "raises.<locals>.act fails at stage 0: ZeroDivisionError: mine (test_own_code.py, line "),
    ],
    ids=["value", "keyword", "recipe", "own"],
)
def test_an_optimizer_factory_that_fails_is_named_with_its_arguments_and_the_stage(optimizer: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        fit(optimizer=optimizer)
    assert str(caught.value).startswith(f"the optimizer factory {says}")
    assert str(caught.value).endswith("; correct its arguments")


def test_an_optimizer_factory_that_fails_in_a_process_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"^the optimizer factory SGD\(lr=-1\) fails at stage [01]: ValueError: Invalid learning rate: -1; "
    ):
        fit(torch.tanh, optimizer=partial(torch.optim.SGD, lr=-1), workers="processes")


def test_a_schedule_factory_that_fails_is_named() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step=3)
    with pytest.raises(UsageError, match=r"^the schedule factory StepLR\(step=3\) fails at stage 0: TypeError: .*; correct its arguments$"):
        fit(schedule=schedule)


class Mine(Exception):
    """The user's own."""


def boom(*_: Any) -> Any:
    raise Mine


class Spoilt:
    """Batches of which the last one cannot be read."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        yield from batches(1)
        boom()


def on_a_record(event: object) -> None:
    if not isinstance(event, delock.records.Started):
        boom()


def late(step: int) -> float:
    return boom() if step else 1.0


def scheduled(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, late)


class Second:
    """A metric that raises in the second evaluation of a run; the trial before the run does not count."""

    calls: ClassVar[list[int]] = []

    def __call__(self, *given: Any) -> float:
        self.calls.append(1)
        return boom() if len(self.calls) > 1 else 0.0


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"callbacks": [boom]}, "a callback"),
        ({"callbacks": [on_a_record]}, "a callback"),
        ({"test": batches(1), "metrics": {"hits": Second()}, "epochs": 2}, "the metric 'hits'"),
        ({"test": Spoilt()}, "the test data"),
        ({"data": Spoilt()}, "the training data"),
        ({"schedule": scheduled}, "the schedule"),
    ],
    ids=["Started", "a record", "metric", "test data", "training data", "schedule"],
)
def test_what_own_code_raises_comes_out_of_a_run_in_one_process_as_it_is(options: dict[str, Any], where: str) -> None:
    with pytest.raises(Mine) as caught:
        fit(**options)
    assert caught.value.__notes__ == [f"raised within {where}, which Delock called"]


def test_what_a_callback_raises_comes_out_of_processes_as_it_is() -> None:
    with pytest.raises(Mine):
        fit(
            torch.tanh, model=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)), callbacks=[on_a_record], workers="processes"
        )


@pytest.mark.parametrize(("returned", "kind"), [("x", "a str"), (None, "None"), (torch.ones(2), "a Tensor of shape (2,)")])
def test_a_metric_that_is_no_number_is_told_so(returned: Any, kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        fit(test=batches(1), metrics={"hits": lambda out, y: returned})
    assert str(caught.value) == f"the metric 'hits' returned {kind}, but it must return one number for a batch"


@pytest.mark.parametrize(("heads", "kind"), [(nn.Linear(8, 3), "a Linear"), ({0: nn.Linear(8, 3)}, "a dict"), (3, "an int")])
def test_heads_that_are_no_list_are_told_which_stages_want_one(heads: Any, kind: str) -> None:
    text, _ = refused(method="dgl", heads=heads)
    assert text == f"heads is {kind}, but it must be the name of a head, or a list with a module for each of the stages 0"


# ---- what cannot be sent to a process ----------------------------------------------------------------------------------------------


class Holds(nn.Linear):
    """A layer with something in it."""

    def __init__(self, handle: Any) -> None:
        super().__init__(4, 4)
        self.handle = handle


def hooked() -> nn.Module:
    lock, layer = Lock(), nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: print(lock))
    return layer


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Holds({"deep": [1, Lock()]}), r"model\.1\.0\.handle\['deep'\]\[1\]: cannot pickle '_thread\.lock' object"),
        (lambda: Holds(sys.stdout.buffer), r"model\.1\.0\.handle.*: cannot pickle"),
        (lambda: Holds(TextIOWrapper(BytesIO())), r"model\.1\.0\.handle: cannot pickle '_io.TextIOWrapper'"),
        (hooked, r"the variable `lock` of the lambda in line \d+: "),
    ],
    ids=["lock", "stream", "file", "hook"],
)
def test_a_model_that_cannot_be_sent_to_a_process_names_the_attribute(make: Callable[[], nn.Module], place: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(make()), nn.Linear(4, 3)))
    before = model[0].weight.clone()
    remedy = r"\. Open or make it where it is used, .*, or use workers=\"inline\"\.$"
    with pytest.raises(UsageError, match="^what stage 0 needs cannot be sent to its process: " + place + ".*" + remedy):
        fit(model=model, workers="processes")
    assert torch.equal(before, model[0].weight)
    fit(model=model)
