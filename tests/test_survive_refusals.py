"""State that no checkpoint can keep is refused by name before the first update; what becomes so later is told, and ends no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import delock
from delock.errors import UsageError
from delock.records import CheckpointRecord, Event, StepRecord

from harness import same_state
from survivors import SGD, assert_same, data, network, train


class WithState(torch.optim.SGD):
    """SGD that also keeps something for every weight, from an update on."""

    def __init__(self, params: Any, make: Callable[[], Any], update: int = 1) -> None:
        super().__init__(params, lr=0.05)
        self.make, self.update, self.steps = make, update, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        self.steps += 1
        for group in self.param_groups:
            for weight in group["params"] if self.steps >= self.update else ():
                self.state[weight]["kept"] = self.make()


class Made:
    """A factor of the rate with a function in it."""

    def __init__(self) -> None:
        self.shape = lambda n: 0.9**n

    def __call__(self, n: int) -> float:
        return self.shape(n)


class Reader:
    """A loader whose place has something odd in it."""

    def __init__(self, odd: Any) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(data())

    def state_dict(self) -> dict[str, Any]:
        return {"place": {"order": self.odd}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


class Extra(nn.Module):
    """A layer that does nothing, with extra state."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Buffered(nn.Module):
    """A layer that does nothing, with a buffer or a parameter."""

    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        if isinstance(odd, nn.Parameter):
            self.odd = odd
        else:
            self.register_buffer("odd", odd)

    def forward(self, x: Tensor) -> Tensor:
        return x


def keeping(make: Callable[[], Any], update: int = 1) -> Callable[..., Optimizer]:
    return partial(WithState, make=make, update=update)


def factor(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, Made())


FUNCTION = "which a checkpoint cannot keep: it is made from code; keep numbers in its place"
OBJECT = "which a checkpoint cannot keep: keep numbers, texts, lists, dicts and tensors in its place"
CASES: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": keeping(set)}, f"the optimizer of stage 0, after its first step,['state'][0]['kept'] is a set, {OBJECT}"),
    ({"optimizer": keeping(lambda: len)}, f"['state'][0]['kept'] is a builtin_function_or_method, {FUNCTION}"),
    ({"optimizer": keeping(lambda: [1, {"a": b"bytes"}])}, f"['state'][0]['kept'][1]['a'] is a bytes, {OBJECT}"),
    (
        {"optimizer": keeping(lambda: torch.eye(2).to_sparse())},
        "['kept'] is a tensor of layout torch.sparse_coo, which a checkpoint cannot keep",
    ),
    ({"schedule": factor}, f"the optimizer of stage 0['schedule']['lr_lambdas'][0]['shape'] is a function, {FUNCTION}"),
    ({"train": Reader({1, 2})}, f"the state of the data loader['loader']['place']['order'] is a set, {OBJECT}"),
    (
        {"train": delock.data.Batches(Reader(print), weight=len)},
        f"['loader']['place']['order'] is a builtin_function_or_method, {FUNCTION}",
    ),
    ({"layer": Extra({"seen": {1}})}, f"the network of stage 1['3._extra_state']['seen'] is a set, {OBJECT}"),
    ({"layer": Extra({1.5: 0})}, "['3._extra_state'] has a float as a key, which a checkpoint cannot keep: use numbers or texts"),
    (
        {"layer": Buffered(torch.zeros(2, dtype=torch.float8_e8m0fnu))},
        "['3.odd'] is a tensor of float8_e8m0fnu, which a checkpoint cannot keep",
    ),
]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("given", "message"), CASES, ids=[message[-90:-45] for _, message in CASES])
def test_state_that_does_not_fit_is_refused_before_the_first_update(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    model, events = network(), list[Event]()
    if layer := given.get("layer"):
        model.insert(5, layer)
    before = {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}
    before = {name: one.clone() for name, one in before.items()}
    options = {"optimizer": SGD, **{name: one for name, one in given.items() if name in ("optimizer", "schedule")}}
    with pytest.raises(UsageError) as error:
        delock.fit(
            model,
            given.get("train", data()),
            loss=nn.functional.cross_entropy,
            method="fdg",
            cuts=[2],
            batches=8,
            workers="inline",
            checkpoint=delock.Checkpoint(tmp_path, every=3),
            callbacks=[events.append],
            **options,
        )
    assert message in str(error.value)
    assert not [event for event in events if isinstance(event, StepRecord)]
    assert same_state(before, {name: one for name, one in model.state_dict().items() if name in before})
    assert list(tmp_path.glob("batch-*")) == []


@pytest.mark.usefixtures("own_random")
def test_state_that_fits_at_first_ends_no_run(tmp_path: Path) -> None:
    events: list[Event] = []
    whole = train(optimizer=SGD_LATE)
    assert_same(train(tmp_path, keeps={"every": 6}, optimizer=SGD_LATE, callbacks=[events.append]), whole)
    written = [event for event in events if isinstance(event, CheckpointRecord)]
    good, bad = ([one for one in written if bool(one.problem) is wrong] for wrong in (False, True))
    assert [one.batches for one in good] == [6]
    assert {one.batches for one in bad} == {12, 18}
    assert {one.problem for one in bad} == {
        f"stage {k}: stage {k}['stage']['learner']['optimizer']['state'][0]['kept'] is a set, {OBJECT}" for k in range(3)
    }


SGD_LATE = keeping(set, 8)


@pytest.mark.usefixtures("own_random")
def test_another_network_is_refused(tmp_path: Path) -> None:
    train(tmp_path, keeps={"every": 5})
    with pytest.raises(UsageError, match=r"the module 0 was Linear\(.*out_features=8.*\) when the checkpoint .* and is Linear\(.*=9"):
        train(tmp_path, keeps={"resume": "newest"}, width=9)


@pytest.mark.usefixtures("own_random")
def test_a_network_with_other_weights_is_refused(tmp_path: Path) -> None:
    run(tmp_path, nn.Sequential(Buffered(nn.Parameter(torch.zeros(2))), *network()), every=3)
    with pytest.raises(
        UsageError,
        match=r"the module of stage 0 is not that of the checkpoint: 0.odd was of shape \(2,\) then, and is of shape \(3,\) now",
    ):
        run(tmp_path, nn.Sequential(Buffered(nn.Parameter(torch.zeros(3))), *network()), resume="newest")


class Own(nn.Module):
    """A model that is traced, and computes one of two things with the same weights."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.low, self.norm, self.out, self.twice = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), twice

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.norm(self.low(x)))
        return self.out(h * 2 if self.twice else h)


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def run(folder: Path, model: nn.Module, every: int | None = None, resume: str | None = None, **more: Any) -> None:
    given = {"cuts": None, "stages": 2, "batches": 8, "workers": "inline", "method": "fdg", "optimizer": SGD}
    given |= {"train": data(), "test": {"a": data(2, 1), "b": data(2, 2)}, **more}
    kept = delock.Checkpoint(folder, every=every, resume=resume)
    delock.fit(model, loss=nn.functional.cross_entropy, checkpoint=kept, **given)


def changed_activation() -> nn.Sequential:
    model = network()
    model[5] = nn.ReLU()
    return model


def deeper() -> nn.Sequential:
    return nn.Sequential(*network(), nn.Tanh())


CHANGES: list[tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any], str]] = [
    (network, changed_activation, {}, r"the module 5 was Tanh\(\) when .* was made, and is ReLU\(\) now"),
    (network, deeper, {}, r"the module 7 was not there when .* was made, and is Tanh\(\) now"),
    (Own, partial(Own, True), {}, "the model's forward does something else than when the checkpoint"),
    (network, network, {"train": delock.data.Batches(data(), weight=len)}, r"weight of the data was not given when .*, and is len now"),
    (network, network, {"metrics": {"hits": hits}}, r"metrics was \[\] when .* was made, and is \['hits'\] now"),
    (
        network,
        network,
        {"test": {"b": data(2, 2), "a": data(2, 1)}},
        r"test sets was \['a of 2', 'b of 2'\] when .*, and is \['b of 2', 'a of 2'\]",
    ),
    (network, network, {"test": data(4, 2)}, r"test sets was \['a of 2', 'b of 2'\] when .*, and is \[\]"),
]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("before", "after", "more", "message"), CHANGES)
def test_another_model_or_other_measures_are_refused(
    tmp_path: Path, before: Callable[[], nn.Module], after: Callable[[], nn.Module], more: dict[str, Any], message: str
) -> None:
    run(tmp_path, before(), every=3)
    with pytest.raises(UsageError, match=message):
        run(tmp_path, after(), resume="newest", **more)
    run(tmp_path, before(), resume="newest")


@pytest.mark.usefixtures("own_random")
def test_a_traced_model_goes_on_in_another_number_of_stages(tmp_path: Path) -> None:
    run(tmp_path, Own(), every=3)
    run(tmp_path, Own(), resume="newest", stages=3)
