"""Batches whose parts weigh by what counts in them: means over parts are means over the batch, and what has no weight gives no gradient."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import delock
from delock import recipes
from delock.data import Batches, as_loader
from delock.engine.feed import Feed
from delock.errors import UsageError
from delock.links.message import Message
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, GPipe, Interlocking, Method, OneFOneB
from delock.nets import bits, gpt, nats, tokens
from delock.ops import Evaluate, Forward
from delock.plan import unroll
from delock.records import Result
from delock.run.job import StageJob, StageResult
from delock.stage import Stage

from harness import CPU, assert_equal, enough, in_the_same_processes, inline, jobs, whole_and_resumed
from workloads import Samples, conv_net, sgd

VOCABULARY, CONTEXT = 11, 6
Pairs = list[tuple[Tensor, Tensor]]


def texts(*counted: Sequence[int], seed: int = 0) -> Pairs:
    """Batches of made-up tokens. A list per batch says, for every sample, how many of its first targets count."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for numbers in counted:
        drawn = torch.randint(VOCABULARY, (len(numbers), CONTEXT + 1), generator=g)
        ignored = torch.arange(CONTEXT) >= torch.tensor(numbers)[:, None]  # (B, T)
        made.append((drawn[:, :-1], drawn[:, 1:].masked_fill(ignored, -100)))
    return made


UNEVEN = texts([6, 1, 2, 0, 3, 5, 1], [1, 1, 6, 6, 2, 3], [0, 0, 0, 4, 6])  # the last: in three parts, one without a token


def trained(data: Any, method: Method, *, test: Any = None, K: int = 3, rate: float = 0.2, **options: Any) -> tuple[list[Tensor], Result]:
    """The weights of a GPT in float64, and the result of training it for an epoch in one process."""
    model = gpt(VOCABULARY, depth=2, width=8, heads=2, context=CONTEXT).double()
    made = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    given = {"optimizer": made, "epochs": 1, "cuts": [1, 2][: K - 1], "workers": "inline", "metrics": {"bits": bits}} | options
    result = delock.fit(model, data, test, loss=nats, method=method, **given)  # type: ignore[arg-type]
    return [w.detach() for w in model.parameters()], result


def gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- equal to the undivided batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [BP(3), GPipe(3), GPipe(5), OneFOneB(3), GPipe(8)], ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_uneven_tokens_in_parts_equal_the_undivided_batch(method: Method, clip: float | None) -> None:
    whole, a = trained(UNEVEN, BP(), clip=clip)
    parts, b = trained(Batches(UNEVEN, weight=tokens), method, clip=clip)
    assert gap(whole, parts) < 1e-13
    assert a.losses == pytest.approx(b.losses, rel=1e-13)


def test_samples_do_not_equal_it() -> None:
    """So weights are needed, and the test above can fail."""
    whole, parts = (trained(UNEVEN[:2], method)[0] for method in (BP(), OneFOneB(2)))
    assert gap(whole, parts) > 1e-3


@pytest.mark.parametrize("method", [BP(), BP(3), GPipe(4), FDG(), ADL(2)], ids=str)
def test_where_every_token_counts_nothing_changes(method: Method) -> None:
    """To the last bit, as n_j T / (n T) is n_j / n in floating point, too."""
    full = texts([6] * 7, [6] * 5)
    (plain, a), (weighed, b) = trained(full, method), trained(Batches(full, weight=tokens), method)
    assert same(plain, weighed)
    assert a.losses == b.losses


# -- nothing that counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [BP(), BP(2), GPipe(2), DDG(), FR(), FDG(), ADL(1), DSP()], ids=str)
def test_a_batch_without_tokens_is_an_update_without_gradient(method: Method) -> None:
    """One stage; the weights are those of the run without it, momentum too, and its loss is left out of the mean."""
    one, empty, two = texts([2, 3, 6], [0, 0, 0], [5, 1, 1])
    short, a = trained(Batches([one, two], weight=tokens), method, K=1)
    long, b = trained(Batches([one, empty, two], weight=tokens), method, K=1, test=[one])
    assert same(short, long)
    assert [a.losses[0], a.losses[1]] == [b.losses[0], b.losses[2]]
    assert math.isnan(b.losses[1])
    assert [stage.updates for stage in b.stages] == [3]
    assert b.evaluations[0].train_loss == pytest.approx((a.losses[0] * 11 + a.losses[1] * 7) / 18, rel=1e-14)


@pytest.mark.parametrize("K", [1, 3])
def test_adl_takes_the_mean_over_all_batches(K: int) -> None:
    """One without a token is one of the group, with a gradient of zero."""
    one, empty, two = texts([2, 3, 6], [0, 0, 0], [5, 1, 1])
    a, _ = trained(Batches([one, two], weight=tokens), ADL(2), K=K, rate=0.2)
    b, _ = trained(Batches([one, empty, two], weight=tokens), ADL(3), K=K, rate=0.3)
    assert gap(a, b) < 1e-14


@pytest.mark.parametrize(
    "make", [recipes.scadamw(), recipes.scsgd(0.1), recipes.muon(), recipes.error_feedback(partial(torch.optim.SGD, lr=0.1))]
)
def test_optimizers_leave_weights_without_gradient_alone(make: Any) -> None:
    data = texts([2, 3, 6], [5, 5, 5], *[[0, 0, 0]] * 4)
    (a, _), (b, result) = (trained(Batches(some, weight=tokens), DDG(), optimizer=make) for some in (data[:2], data))
    assert same(a[-1:], b[-1:])  # of the last stage, whose weights no later gradient reaches
    assert all(x.isfinite().all() for x in b)
    assert [stage.updates for stage in result.stages] == [6] * 3


class Unlabelled(Samples):
    """Labels of samples of class 0 to 4 are left out, of a part of the second batch and of the third batch all."""

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        for b, (x, y) in enumerate(super().epoch(e)):
            y = y.masked_fill(y < 5, -100)
            if b == 1:
                y[:3] = -100
            yield x, torch.full_like(y, -100) if b == 2 else y


def unlabelled(method: Method, K: int = 3, **options: Any) -> list[StageJob]:
    made = jobs("conv", K, method, **options)
    data = Batches(Unlabelled("image", 35, 8, torch.float32), weight=tokens)
    length = replace(made[0].length, batches=2 * len(data), every=len(data))
    made = [replace(job, loss=cross_entropy, length=length, per_epoch=len(data), weighed=True) for job in made]
    made[0] = replace(made[0], train=data)
    return made


METHODS: list[Method] = [
    *(BP(), BP(3), GPipe(3), OneFOneB(3), DDG(), FR(), FDG(0.5, "mixed"), FDG(order="backward-first"), ADL(2), ADL(3, at="mixed"), DSP()),
    *(DGL(), Interlocking(2), Interlocking(3, combine="mean", send="late")),
]


@pytest.fixture(scope="module")
def there() -> dict[Any, list[StageResult]]:
    return in_the_same_processes({method: unlabelled(method) for method in METHODS})


def comparable(results: list[StageResult]) -> list[StageResult]:
    """NaN is not equal to itself: a batch without a loss has None."""
    return [replace(one, losses=[None if math.isnan(loss) else loss for loss in one.losses]) for one in results]  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_processes_equal_one_process(method: Method, there: Any) -> None:
    """A part and a batch without labels, batch norm, dropout, momentum, an uneven last batch."""
    here = inline(unlabelled(method))
    assert_equal(comparable(here), comparable(there[method]))
    for one in here:
        tensors = [*one.state.values(), *one.head.values()]
        assert all(torch.isfinite(x).all() for x in tensors)
        assert one.report.updates == -(-10 // method.batches_per_update)
        tracked = [x for name, x in one.state.items() if name.endswith("num_batches_tracked")]
        assert all(x == 10 * method.micro_batches for x in tracked), "batch norm must see what does not count"
    data = Unlabelled("image", 35, 8, torch.float32)
    assert [math.isnan(loss) for loss in here[-1].losses] == [tokens(y) == 0 for e in range(2) for _, y in data.epoch(e)]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("method", "stop"), enough(itertools.product((GPipe(3), FR(), FDG(), FDG(at="mixed"), ADL(3)), (1, 3)), together=1), ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(method: Method, stop: int) -> None:
    whole, second, losses = whole_and_resumed(lambda: unlabelled(method), stop)
    assert all(
        same([*a.stage.body.weights.values()], [*b.stage.body.weights.values()]) for a, b in zip(whole.engines, second.engines, strict=True)
    )
    assert [str(loss) for loss in losses] == [str(loss) for loss in whole.losses]


@pytest.mark.usefixtures("own_random")
def test_the_error_of_a_part_without_weight_is_zero() -> None:
    """It is sent as any other, so that the stage below need not know."""
    stages = [Stage(module, k, 2, optimizer=sgd, loss=cross_entropy) for k, module in enumerate(conv_net(2, torch.float32))]
    steps = unroll(BP(), 2, 1).columns
    x, y = next(iter(Samples("image", 8, 8, torch.float32).epoch(0)))
    sent = stages[0].forward(steps[0][0], Message(x, torch.full_like(y, -100), weight=0.0, samples=8))
    assert sent.weight == 0
    stages[1].forward(steps[1][0], sent)
    stages[1].prepare(steps[1][1])
    done = stages[1].backward(steps[1][1], None)
    assert done.error
    assert torch.equal(done.error.values[0], torch.zeros_like(sent.values))
    assert stages[1].learner.grads == [None] * len(stages[1].learner.grads)


# -- what is reported ---------------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, data: Pairs, measure: Callable[[Tensor, Tensor], Any]) -> float:
    """The mean over all tokens that count."""
    total = sum(float(measure(model(x).detach(), y)) * tokens(y) for x, y in data if tokens(y))
    return total / sum(tokens(y) for _, y in data)


@pytest.mark.parametrize("wrapped", [True, False])
def test_evaluations_weigh_by_the_same_count(wrapped: bool) -> None:
    """The test data's own weight, or that of the training data; a batch without a token is left out."""
    data, test = texts([2, 3, 6], [1, 6, 6], [4]), texts([1, 0], [6, 6, 6], [0, 0], [2])
    model = gpt(VOCABULARY, depth=1, width=8, heads=2, context=CONTEXT).double()
    result = delock.fit(
        model, Batches(data, weight=tokens), Batches(test, weight=tokens) if wrapped else test, loss=nats, metrics={"bits": bits},
        method="fdg", cuts=[1], optimizer=partial(torch.optim.SGD, lr=0.1), epochs=1, workers="inline",
    )  # fmt: skip
    (record,) = result.evaluations
    model.eval()
    assert record.test_loss == pytest.approx(by_hand(model, test, nats), rel=1e-13)
    assert record.metrics["bits"] == pytest.approx(by_hand(model, test, bits), rel=1e-13)
    counts = [11, 13, 4]
    assert record.train_loss == pytest.approx(sum(n * loss for n, loss in zip(counts, result.losses, strict=True)) / 28, rel=1e-14)


def test_an_evaluation_without_a_token_has_no_measures() -> None:
    with pytest.warns(UserWarning, match=r"the last evaluation has no test loss, as where weight\(targets\) is 0 for all of the test data"):
        _, result = trained(texts([2, 2]), BP(), test=Batches(texts([0], [0]), weight=tokens))
    (record,) = result.evaluations
    assert math.isnan(record.test_loss)
    assert math.isnan(record.metrics["bits"])
    assert record.train_loss == result.losses[0]


def test_a_run_in_which_nothing_counts_says_so() -> None:
    with pytest.warns(UserWarning, match=r"nothing counted in training, so no weight has changed: weight\(targets\) was 0 for every batch"):
        trained(Batches(texts([0], [0]), weight=tokens), BP())


def test_histograms_of_staleness_leave_out_empty_parts_alone() -> None:
    """Seven parts of batches of 7, 6 and 5; parts with samples that do not count are in."""
    _, result = trained(Batches(UNEVEN, weight=tokens), GPipe(7))
    assert [stage.staleness for stage in result.stages] == [{0: 18}] * 3


# -- the loader ---------------------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_loader() -> None:
    inner = DataLoader([(torch.tensor(float(i)), torch.tensor(i)) for i in range(10)], batch_size=4, shuffle=True)
    plain, weighed = as_loader(inner, 3), as_loader(Batches(inner, weight=tokens), 3)
    assert isinstance(weighed, Batches)
    assert (len(weighed), weighed.sizes()) == (3, [4, 4, 2])
    for e in (1, 0):
        assert all(torch.equal(x, u) for (x, _), (u, _) in zip(plain.epoch(e), weighed.epoch(e), strict=True))
    unsized = type("Unsized", (), {"__iter__": lambda self: iter(texts([1], [2], [3]))})()
    assert len(as_loader(Batches(unsized, weight=tokens), batches_per_epoch=2)) == 2


def test_weights_of_parts() -> None:
    feed = Feed(as_loader(Batches(UNEVEN, weight=tokens)), as_loader(texts([1, 0])), 3, CPU)
    got = [[feed(Forward(3 * b + j)) for j in range(3)] for b in range(3)]
    assert [[m.weight for m in parts] for parts in got] == [[9 / 18, 3 / 18, 6 / 18], [2 / 19, 12 / 19, 5 / 19], [0, 4 / 10, 6 / 10]]
    assert [[(m.samples, m.count) for m in parts] for parts in got][2] == [(2, 0), (2, 4), (1, 6)]
    assert feed(Evaluate(0)).count == 1
    assert Feed(as_loader(UNEVEN), None, 3, CPU)(Forward(0)).count == 3


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda y: -1, "returned -1, but it must return one number, 0 or more"),
        (lambda y: float("nan"), "returned nan"),
        (lambda y: torch.tensor(math.inf), "returned inf"),
        (lambda y: (y != -100).sum(1), r"returned a tensor of shape (3,)"),
        (lambda y: None, "returned None"),
        (lambda y: "6", "returned '6'"),
        (lambda y: (y != -100).double().mean(), "of the parts of batch 0 adds up to 1.41667, but that of the whole batch is 0.611111"),
    ],
)
def test_a_weight_that_is_none(weight: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        trained(Batches(texts([2, 3, 6]), weight=weight), GPipe(2))
    assert says in str(caught.value)


def test_a_weight_that_is_no_function() -> None:
    with pytest.raises(UsageError, match="the weight of batches is a float, but it must be a function of the targets"):
        Batches(texts([2]), weight=0.5)  # type: ignore[arg-type]


def test_a_batch_without_samples() -> None:
    empty = (torch.zeros(0, CONTEXT, dtype=torch.int64), torch.zeros(0, CONTEXT, dtype=torch.int64))
    with pytest.raises(UsageError, match="batch 1 has no samples"):
        trained([*texts([2]), empty], GPipe(2))


def test_the_model_is_as_before_where_a_weight_is_refused() -> None:
    model = gpt(VOCABULARY, depth=1, width=8, heads=2, context=CONTEXT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError):
        delock.fit(model, Batches(texts([2]), weight=lambda y: -1), loss=nats, optimizer=sgd, stages=2, epochs=1, workers="inline")  # type: ignore[arg-type]
    assert same([*before.values()], [*model.state_dict().values()])
