"""The feed of stage 0: batches by their running number, split into parts, from wherever a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.data.iterable import as_loader
from delock.data.loader import samples
from delock.engine.feed import Feed
from delock.errors import UsageError
from delock.links.message import Message
from delock.ops import Evaluate, Forward

CPU = torch.device("cpu")


class Numbered:
    """Epochs of batches whose entries say which they are: 1000 epoch + 100 batch + sample. Counts what is read of it."""

    def __init__(self, sizes: list[int]) -> None:
        self.of = sizes
        self.epochs: list[int] = []
        self.read = 0

    def __len__(self) -> int:
        return len(self.of)

    def sizes(self) -> list[int]:
        return self.of

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Any]]:
        self.epochs.append(e)
        for b, n in enumerate(self.of):
            self.read += 1
            x = 1000.0 * e + 100 * b + torch.arange(n)
            yield x, {"y": x + 0.5}


def feed(train: Any, parts: int = 1, test: Any = None) -> Feed:
    return Feed(train, test, parts, CPU)


def first(message: Message) -> list[float] | None:
    return None if message.values is None else message.values.tolist()


def test_batches_run_on_across_epochs() -> None:
    train = Numbered([2, 2, 1])
    source = feed(train)
    got = [first(source(Forward(b))) for b in range(7)]
    assert got == [[0, 1], [100, 101], [200], [1000, 1001], [1100, 1101], [1200], [2000, 2001]]
    assert train.epochs == [0, 1, 2]
    assert train.read == 7, "a batch was read twice, or ahead"


@pytest.mark.parametrize("begin", range(7))
@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_goes_on_from_any_batch(begin: int, parts: int) -> None:
    """As after a checkpoint: what a new feed gives first does not depend on having given what came before."""
    whole, later = feed(Numbered([2, 3, 1]), parts), feed(train := Numbered([2, 3, 1]), parts)
    messages = [whole(Forward(b)) for b in range(9 * parts)]
    for b in range(begin * parts, 9 * parts):
        got = later(Forward(b))
        assert first(got) == first(messages[b])
        assert (got.weight, got.samples) == (messages[b].weight, messages[b].samples)
    assert train.epochs[0] == begin // 3


def test_a_whole_batch_has_weight_one_and_all_its_labels() -> None:
    message = feed(Numbered([3]))(Forward(0))
    assert (message.weight, message.samples) == (1.0, 3)
    assert message.targets["y"].tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_are_those_of_tensor_split_weighted_by_their_samples(n: int, parts: int) -> None:
    source = feed(Numbered([n, n]), parts)
    for batch in range(4):
        messages = [source(Forward(batch * parts + j)) for j in range(parts)]
        whole = 1000.0 * (batch // 2) + 100 * (batch % 2) + torch.arange(n)
        for message, part in zip(messages, whole.tensor_split(parts), strict=True):
            assert (message.samples, message.weight) == (len(part), len(part) / n)
            if len(part):
                assert torch.equal(message.values, part)
                assert torch.equal(message.targets["y"], part + 0.5)
            else:
                assert message.values is None
        assert sum(message.weight for message in messages) == pytest.approx(1)


def test_a_batch_is_read_once_for_all_its_parts() -> None:
    source = feed(train := Numbered([4, 4]), 4)
    for b in range(8):
        source(Forward(b))
    assert train.read == 2


def test_trees_are_split_sample_by_sample() -> None:
    """A target without a row per sample goes to every part whole."""
    rows, tokens = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    targets = {"boxes": [rows, (tokens, None)], "scale": torch.tensor(2.0), "classes": torch.arange(7), "name": "x", "k": 3}
    source = feed(as_loader([((rows, tokens), targets)]), 2)
    for j, (start, stop) in enumerate([(0, 2), (2, 4)]):
        message = source(Forward(j))
        x, t = message.values
        assert isinstance(message.values, tuple)
        assert torch.equal(x, rows[start:stop])
        assert torch.equal(t, tokens[start:stop])
        assert torch.equal(message.targets["boxes"][0], rows[start:stop])
        assert torch.equal(message.targets["boxes"][1][0], tokens[start:stop])
        assert message.targets["boxes"][1][1] is None
        assert (message.targets["scale"].item(), message.targets["name"], message.targets["k"]) == (2.0, "x", 3)
        assert torch.equal(message.targets["classes"], torch.arange(7))


@pytest.mark.parametrize(
    "entry",
    [
        [torch.zeros(k, 4) for k in (1, 2, 3, 3)],
        [torch.zeros(k, 4) for k in (1, 2, 3, 4)],
        [{"boxes": torch.zeros(2, 4)}] * 4,
        ["a", "b", "c", "d"],
    ],
    ids=["ragged", "one of as many rows", "dicts", "names"],
)
def test_a_list_with_an_entry_for_every_sample_is_no_row(entry: list[Any]) -> None:
    """It would go to every part whole; without parts, or as a tuple, it may."""
    whole, tokens = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    for targets in ({"y": tokens, "of": entry}, entry):
        with pytest.raises(UsageError, match="batch 0 has 4 samples, and a list in its targets has 4 entries, which would go whole"):
            feed(as_loader([(whole, targets)]), 2)(Forward(0))
        assert feed(as_loader([(whole, targets)]))(Forward(0)).samples == 4
    assert feed(as_loader([(whole, {"y": tokens, "of": tuple(entry)})]), 2)(Forward(0)).samples == 2


def test_inputs_in_a_list_become_a_tuple() -> None:
    class Lists(Numbered):
        def epoch(self, e: int) -> Iterator[tuple[Any, Any]]:
            for x, y in super().epoch(e):
                yield [x, x + 1], y

    values = feed(Lists([2]))(Forward(0)).values
    assert isinstance(values, tuple)
    assert [x.tolist() for x in values] == [[0, 1], [1, 2]]


def test_evaluations_count_by_themselves_and_leave_training_where_it_is() -> None:
    train, test = Numbered([2, 2, 2]), Numbered([3, 1])
    source = feed(train, 2, test)
    assert first(source(Forward(0))) == [0]
    assert first(source(Forward(1))) == [1]
    evaluation = [source(Evaluate(i)) for i in range(2)]
    assert [first(message) for message in evaluation] == [[0, 1, 2], [100]]
    assert [(message.weight, message.samples) for message in evaluation] == [(1.0, 3), (1.0, 1)]  # never split
    assert evaluation[0].targets["y"].tolist() == [0.5, 1.5, 2.5]
    assert first(source(Forward(2))) == [100]
    assert [first(source(Evaluate(i))) for i in (2, 3)] == [[0, 1, 2], [100]]  # the same again: it is one test set
    assert first(source(Forward(3))) == [101]
    assert train.read == 2


def test_a_run_goes_on_in_the_middle_of_an_evaluation() -> None:
    source = feed(Numbered([1]), 1, Numbered([1, 1, 1]))
    assert [first(source(Evaluate(i))) for i in (4, 5, 6)] == [[100], [200], [0]]


@pytest.mark.parametrize("inputs", [torch.tensor(3.0), ()], ids=["scalar", "empty"])
def test_a_batch_without_rows_is_refused(inputs: Any) -> None:
    with pytest.raises(UsageError, match="one row per sample"):
        samples(inputs)


def test_samples_are_the_rows_that_all_inputs_have() -> None:
    assert samples(torch.ones(3, 2)) == 3
    assert samples((torch.ones(4), torch.tensor(2.0), torch.ones(4, 2)), torch.ones(12)) == 4


@pytest.mark.parametrize("targets", [torch.ones(4), {"y": torch.ones(4, 2), "classes": torch.ones(7)}])
def test_where_the_rows_of_the_inputs_differ_the_targets_decide(targets: Any) -> None:
    assert samples((torch.ones(9, 9), torch.ones(4)), targets) == 4
    assert samples((torch.ones(4), torch.ones(9, 9)), targets) == 4


@pytest.mark.parametrize("targets", [None, torch.ones(36), (torch.ones(4), torch.ones(9))])
def test_rows_that_the_targets_leave_open_are_refused(targets: Any) -> None:
    with pytest.raises(UsageError, match=r"have 4 and 9 rows.*which one counts the samples is not known"):
        samples((torch.ones(9, 9), torch.ones(4)), targets)


def test_a_mask_in_front_is_not_split() -> None:
    mask, x, y = torch.ones(3, 3), torch.arange(4.0), torch.arange(4)
    source = feed(as_loader([((mask, x), y)]), 2)
    for j, own in enumerate(([0, 1], [2, 3])):
        message = source(Forward(j))
        assert (message.samples, message.count, message.weight) == (2, 2, 0.5)
        assert torch.equal(message.values[0], mask)
        assert message.values[1].tolist() == message.targets.tolist() == own


def test_targets_that_would_go_whole_to_every_part_are_refused() -> None:
    data = as_loader([(torch.ones(4, 3), torch.ones(12))])
    assert feed(data)(Forward(0)).samples == 4
    with pytest.raises(UsageError, match=r"batch 0 has 4 samples, but its targets have 12 rows.*flatten them in the loss"):
        feed(data, 2)(Forward(0))
