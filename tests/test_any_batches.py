"""Batches as users have them: dicts, arrays, streams, several test sets, and all else that `Batches` is told of."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import delock
from delock.checkpoints.directory import manifest_of, newest_first
from delock.data import Batches, as_loader
from delock.data.arrays import tensor_of
from delock.errors import UsageError
from delock.options import Checkpoint
from streams import PER_ITERATION, Placed, Rows, Unsized, made

from harness import same_state

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PAIRS = [made(n, 9) for n in range(3)]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def plainly(batches: Any) -> nn.Sequential:
    """The network after training on these batches with plain PyTorch."""
    model = network()
    optimizer = SGD(model.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double().mean()


def fit(train: Any, test: Any = None, **options: Any) -> tuple[nn.Sequential, Any]:
    model = network()
    given = {"loss": cross_entropy, "optimizer": SGD, "method": "bp", "cuts": [2], "workers": "inline", "metrics": {"hits": hits}} | options
    given = given if {"epochs", "batches"} & given.keys() else given | {"epochs": 1}
    return model, delock.fit(model, train, test, **given)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    return same_state(a.state_dict(), b.state_dict())


# ---- forms of a batch --------------------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    """A batch that is an object."""

    x: Tensor
    y: Tensor


def first_entry(batch: Any) -> Any:
    return batch[0]


FORMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: [{"x": x, "labels": y} for x, y in PAIRS],
    "label in front": lambda: [{"label": y, "any_name": x} for x, y in PAIRS],
    "arrays": lambda: [{"x": x.numpy(), "target": y.numpy()} for x, y in PAIRS],
    "mapping": lambda: [UserDict(x=x, targets=y) for x, y in PAIRS],
    "pair of arrays": lambda: [(x.numpy(), y.numpy()) for x, y in PAIRS],
    "pair with a dict": lambda: [({"x": x}, y) for x, y in PAIRS],
    "numbers": lambda: [(x.numpy(), y.tolist()) for x, y in PAIRS],
    "names": lambda: Batches([{"a": x, "b": y, "id": ["?"] * 4} for x, y in PAIRS], inputs="a", targets="b"),
    "places": lambda: Batches([(y, "?", x) for x, y in PAIRS], inputs=[2], targets=0),
    "the place of targets": lambda: Batches([(x, y) for x, y in PAIRS], targets=-1),
    "attributes": lambda: Batches([Graph(x, y) for x, y in PAIRS], inputs=["x"], targets="y"),
    "functions": lambda: Batches([[x, y, None] for x, y in PAIRS], inputs=first_entry, targets=lambda batch: batch[1].numpy()),
    "in two steps": lambda: Batches(Batches([{"a": x, "b": y, "c": y} for x, y in PAIRS], targets="b"), inputs="a", samples=lambda b: 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_as_plain_pytorch(form: str) -> None:
    model, result = fit(FORMS[form](), FORMS[form]())
    assert same(model, plainly(PAIRS))
    with torch.no_grad():
        wanted = [float(cross_entropy(model(x), y)) for x, y in PAIRS]
    assert result.evaluations[0].test_loss == pytest.approx(sum(wanted) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([torch.ones(2, 6)], r"a Tensor, not a pair \(inputs, targets\) or a dict: say what is in it with delock.data.Batches"),
        ([(torch.ones(2, 6), torch.ones(2), torch.ones(2))], "is a tuple of 3, not a pair"),
        ([{"x": torch.ones(2, 6), "y": torch.ones(2)}], "no entry 'labels' among 'x', 'y', so what the targets are is not known"),
        ([{"x": 1, "labels": torch.ones(2), "label": torch.ones(2)}], "the entries 'labels', 'label', so what the targets are"),
        ([{"x": torch.ones(2, 6), "m": torch.ones(2), "labels": torch.ones(2)}], r"inputs 'x', 'm', but a chain .* inputs=\['x'\]"),
        ([{"x": "text", "labels": torch.ones(2)}], "the inputs of batch 0 of epoch 0 of the data are a str, not a tensor"),
        ([{"labels": torch.ones(2)}], "the inputs of batch 0 of epoch 0 of the data are a tuple, not a tensor"),
        (Batches([{"x": torch.ones(2, 6)}], inputs="x", targets="z"), "batch 0 of epoch 0 of the data has 'x', and no entry 'z', which"),
        (Batches([(torch.ones(2, 6), 1)], inputs=[0], targets=2), "is a tuple of 2, and no entry 2, which Batches names"),
        (Batches([(torch.ones(2, 6), [0, 1])], samples=lambda batch: 2.5), "returned 2.5, but it must return how many samples"),
        (Batches([(torch.ones(2, 6), [0, 1])], samples=lambda batch: torch.ones(3)), "returned a Tensor, but it must"),
        ({"x": torch.ones(2, 6)}, "data must be an iterable of batches, such as a DataLoader, not dict"),
    ],
)
def test_what_cannot_be_guessed_is_refused(data: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fit(data)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Batches says nothing of the batches"),
        ({"inputs": 0.5}, "the inputs of Batches are 0.5, but they must be names"),
        ({"targets": []}, r"the targets of Batches are \[\], but they must be names"),
        ({"samples": 4}, "the samples of Batches are a int, but they must be a function"),
    ],
)
def test_choices_of_another_kind_are_refused(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Batches([], **options)


def test_a_chain_needs_a_loss() -> None:
    with pytest.raises(UsageError, match="loss is missing, and a chain of modules computes none"):
        fit(PAIRS, loss=None)


def noisy(batch: Any) -> Tensor:
    noise: Tensor = batch[0] + torch.rand(()) + float(np.random.rand())
    return noise


@pytest.mark.usefixtures("own_random")
def test_functions_of_the_user_draw_the_same_numbers_every_time() -> None:
    one, two = (as_loader(Batches(PAIRS, inputs=noisy), seed) for seed in (1, 2))
    wanted = [[x for x, _ in one.epoch(e)] for e in (0, 1)]
    torch.rand(3), np.random.rand(3)
    again = [[x for x, _ in one.epoch(e)] for e in (1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(wanted[0] + wanted[1], again[1] + again[0], strict=True))
    assert not torch.equal(wanted[0][0], wanted[1][0])
    assert not torch.equal(wanted[0][0], next(iter(two.epoch(0)))[0])


# ---- numpy -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_arrays_become_tensors_without_a_copy_where_torch_can() -> None:
    base = np.arange(12.0).reshape(3, 4)
    assert tensor_of(base).data_ptr() == base.ctypes.data
    assert tensor_of(base[:, ::2]).stride() == (4, 2)
    locked = base.copy()
    locked.flags.writeable = False
    for array in (locked, base[::-1], base.astype(">f8"), base.astype(np.float16), base > 3, np.float32(2.5), np.int64(7)):
        assert tensor_of(array).tolist() == np.asarray(array).tolist()
    assert tensor_of(np.float32(2.5)).dtype == torch.float32
    with pytest.raises(UsageError, match="an array of object cannot become a tensor"):
        tensor_of(np.array([None]))


def test_numbers_in_targets() -> None:
    """Lists of numbers, and a number that is all there is; others stay as they are, for the loss."""
    x = torch.ones(2, 6)
    given = {
        "list": [1, 2],
        "array": np.ones(2),
        "scalar": np.float64(3),
        "number": 3,
        "name": "n",
        "of": ([True, False], ["a"]),
        "no": None,
    }
    ((_, found),) = as_loader([(x, given)]).epoch(0)
    assert (found["number"], found["name"], found["no"], found["of"][1]) == (3, "n", None, ["a"])
    kinds = {"list": torch.int64, "array": torch.float64, "scalar": torch.float64}
    assert {name: found[name].dtype for name in kinds} == kinds
    assert found["of"][0].dtype == torch.bool
    ((_, alone),) = as_loader([(x, 2.5)]).epoch(0)
    assert torch.equal(alone, torch.tensor(2.5))


# ---- data without a length ---------------------------------------------------------------------------------------------------------


def streamed(batches: int) -> list[tuple[Tensor, Tensor]]:
    return [made(b % PER_ITERATION, b // PER_ITERATION) for b in range(batches)]


@pytest.mark.parametrize("make", [Unsized, Placed, lambda: DataLoader(Rows(), 4)], ids=["own", "placed", "DataLoader"])
def test_a_stream_begins_anew_when_it_ends(make: Any) -> None:
    data = make()
    model, result = fit(data, batches=7)
    assert same(model, plainly(streamed(7)))
    assert [e.batches for e in result.evaluations] == [7]  # of the training loss alone
    if isinstance(data, Unsized):
        assert data.told[-3:] == [0, 1, 2]


def test_a_stream_is_evaluated_at_the_end_unless_eval_every_says_otherwise() -> None:
    _, once = fit(Unsized(), PAIRS, batches=7)
    _, often = fit(Unsized(), PAIRS, batches=7, eval_every=2)
    assert [e.batches for e in once.evaluations] == [7]
    assert [e.batches for e in often.evaluations] == [2, 4, 6, 7]
    assert once.evaluations[-1].test_loss == often.evaluations[-1].test_loss
    assert once.evaluations[0].epoch == 1.0


def torchdata() -> Any:
    return StatefulDataLoader(Rows(), 4)


@pytest.mark.parametrize("make", [Unsized, Placed, torchdata])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_stream_goes_on_from_a_checkpoint(make: Any, at: int, tmp_path: Path) -> None:
    """Also at the end of an iteration; in a run that became longer. With a place none is read again but the one before the start."""
    fit(make(), batches=at + 1, checkpoint=Checkpoint(tmp_path, every=at))
    data = make()
    model, result = fit(data, batches=7, checkpoint=Checkpoint(tmp_path, every=at, resume="newest"))
    assert same(model, plainly(streamed(7)))
    assert len(result.losses) == 7
    if isinstance(data, Placed):
        assert data.reads == 1 + 7 - at


class Spent:
    """A stream that has nothing more after its first iteration."""

    def __init__(self) -> None:
        self.left = list(PAIRS)

    def __iter__(self) -> Iterator[Any]:
        while self.left:
            yield self.left.pop()


def test_streams_that_cannot_be_read_so_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the data \(Unsized\) has no length, so .* give fit batches in place of epochs"):
        fit(Unsized(), epochs=1)
    with pytest.raises(UsageError, match="epoch 1 of the data has no batch: let __iter__ begin anew"):
        fit(Spent(), batches=7)
    with pytest.raises(UsageError, match="can be read only once"):
        fit(iter(PAIRS), batches=2)


def test_test_data_without_a_length_is_counted() -> None:
    class Sometimes:
        def __iter__(self) -> Iterator[Any]:
            return iter(PAIRS)

    (_, counted), (_, listed) = fit(PAIRS, Sometimes(), epochs=2), fit(PAIRS, PAIRS, epochs=2)
    assert [(e.batches, e.test_loss, e.metrics) for e in counted.evaluations] == [
        (e.batches, e.test_loss, e.metrics) for e in listed.evaluations
    ]


# ---- several test sets -------------------------------------------------------------------------------------------------------------


def half(targets: Tensor) -> float:
    return len(targets) / 2 + float((targets == 0).sum())


def test_every_named_set_is_evaluated_as_it_would_be_alone() -> None:
    valid, other = PAIRS[:2], [(x[:3], y[:3]) for x, y in PAIRS]
    sets = {"valid": valid, "other": Batches(other, weight=half), "arrays": [{"x": x.numpy(), "labels": y.numpy()} for x, y in valid]}
    _, together = fit(PAIRS, sets, epochs=2, eval_every=2)
    assert len(together.evaluations) == 3
    for name, alone in sets.items():
        _, single = fit(PAIRS, alone, epochs=2, eval_every=2)
        for one, all_ in zip(single.evaluations, together.evaluations, strict=True):
            assert all_.metrics[f"{name}/loss"] == one.test_loss
            assert all_.metrics[f"{name}/hits"] == one.metrics["hits"]
            assert all_.train_loss == one.train_loss
    assert all(e.test_loss == e.metrics["valid/loss"] for e in together.evaluations)
    assert len(together.evaluations[0].metrics) == 6


def test_the_best_is_judged_by_the_first_set_or_by_the_one_named(tmp_path: Path) -> None:
    sets = {"valid": PAIRS[:1], "other": PAIRS[1:]}
    for i, best in enumerate(("max:hits", "min:other/loss", "min:valid/loss")):
        options = Checkpoint(tmp_path / str(i), every=2, keep=9, best=best)
        _, result = fit(PAIRS, sets, epochs=2, eval_every=1, checkpoint=options)
        measures = manifest_of(newest_first(tmp_path / str(i))[0]).measures
        (known,) = (e for e in result.evaluations if e.metrics["other/loss"] == measures["other/loss"])
        assert measures == {"loss": known.test_loss, "hits": known.metrics["valid/hits"], **known.metrics}
    with pytest.raises(UsageError, match="best goes by 'valid/f1', but evaluations have loss, hits, valid/loss, valid/hits, other/loss"):
        fit(PAIRS, sets, checkpoint=Checkpoint(tmp_path / "none", best="max:valid/f1"))


@pytest.mark.parametrize("at", [2, 3])
def test_an_evaluation_of_several_sets_goes_on_from_a_checkpoint(at: int, tmp_path: Path) -> None:
    sets = {"valid": PAIRS[:2], "other": PAIRS}
    options = {"batches": 6, "eval_every": 2, "method": "fdg"}
    fit(PAIRS, sets, **options | {"batches": at + 2}, checkpoint=Checkpoint(tmp_path, every=at))
    _, resumed = fit(PAIRS, sets, **options, checkpoint=Checkpoint(tmp_path, every=at, resume="newest"))
    _, whole = fit(PAIRS, sets, **options)
    assert [(e.batches, e.metrics) for e in resumed.evaluations] == [(e.batches, e.metrics) for e in whole.evaluations]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({}, "test is an empty dict"),
        ({"a/b": PAIRS}, "a test set is called 'a/b', but its name must be a text without a slash"),
        ({"a": PAIRS, "b": [(torch.ones(0, 6), torch.ones(0))]}, "the test data 'b' has no samples, so an evaluation has no mean"),
        ({"a": PAIRS, "b": []}, "at least one batch"),
    ],
)
def test_sets_that_are_none_are_refused(sets: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fit(PAIRS, sets)


# ---- samples -----------------------------------------------------------------------------------------------------------------------


def test_in_processes_all_of_it_is_the_same() -> None:
    """A stream of dicts of arrays in parts, counted by a rule, and two test sets."""
    train = Batches(Arrays(), inputs="x", targets="y", samples=counted, weight=len)
    sets = {"valid": PAIRS[:2], "other": Batches(Arrays(), inputs=["x"], targets="y")}
    options = {"batches": 7, "method": "gpipe", "eval_every": 3}
    (here, a), (there, b) = (fit(train, copy.deepcopy(sets), **options, workers=workers) for workers in ("inline", "processes"))
    assert same(here, there)
    assert a.losses == b.losses
    assert [e.metrics for e in a.evaluations] == [e.metrics for e in b.evaluations]
    assert a.evaluations[0].metrics.keys() == {"valid/loss", "valid/hits", "other/loss", "other/hits"}


class Arrays(Unsized):
    """Dicts of arrays, with an entry that nobody wants."""

    def __iter__(self) -> Iterator[Any]:
        return ({"x": x.numpy(), "y": y.numpy(), "id": "?"} for x, y in super().__iter__())


def counted(batch: dict[str, Any]) -> int:
    return len(batch["y"])


class Filling(nn.Module):
    """Returns an entry without a tensor in evaluation alone, as models for text do with a cache; or another constant."""

    def __init__(self, constant: object) -> None:
        super().__init__()
        self.a, self.b, self.constant = nn.Linear(4, 4), nn.Linear(4, 2), constant

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.relu(self.a(x))
        return {"logits": self.b(h + h.tanh()), **({} if self.training else {"cache": self.constant})}


@pytest.mark.usefixtures("own_random")
def test_an_entry_that_is_none_may_be_missing_in_the_other_mode() -> None:
    data = [(torch.randn(4, 4), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
    options: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.1), "method": "bp", "epochs": 1, "workers": "inline"}

    def loss(out: dict[str, Any], y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out["logits"], y) + (0 if out["cache"] is None else 1)

    delock.fit(Filling(object()), data, data, loss=loss, **options)
    with pytest.raises(UsageError, match="in different structures"):
        delock.fit(Filling(3), data, data, loss=loss, **options)
