"""The measured cost of layers, and the cuts that minimise the most expensive stage."""

import copy
import itertools
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import _get_current_dispatch_mode

from delock.api import fit
from delock.errors import UsageError
from delock.nets import build
from delock.options import Placement
from delock.partition.balance import balance
from delock.partition.layers import layers
from delock.partition.measure import LayerCost, measure
from delock.partition.work import CPU, Work
from delock.recipes import SGD

from harness import same_state

pytestmark = pytest.mark.usefixtures("own_random")

# --- costs ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_random")
def test_measuring_counts_and_leaves_everything_as_it_was():
    model = build("cnn", classes=10, in_channels=1, image_size=8, dropout=0.5).eval()
    found, x = layers(model), torch.randn(4, 1, 8, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = measure(found, x, torch.arange(4), cross_entropy, repeats=1)
    assert same_state(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert [c.params for c in costs] == [sum(p.numel() for p in a.module.parameters()) for a in found]
    assert [c.out_bytes for c in costs] == [4 * 4 * n for n in (32 * 64, 64 * 16, 64 * 16, 128 * 4, 128 * 4, 128, 128, 10)]
    assert all(c.forward_s > 0 and c.backward_s > 0 for c in costs)
    assert costs[0].total_s == costs[0].forward_s + costs[0].backward_s


@pytest.mark.usefixtures("own_random")
def test_measured_time_follows_the_work():
    found = layers([nn.Linear(400, 400), nn.Linear(400, 20), nn.Linear(20, 1)])
    costs = measure(found, torch.randn(400, 400), torch.zeros(400, 1), nn.functional.mse_loss, repeats=5)
    assert costs[0].total_s > costs[2].total_s
    assert costs[1].out_bytes == 400 * 20 * 4


@pytest.mark.usefixtures("own_random")
def test_work_is_counted_by_the_operations():
    """Products of matrices forward and twice backward, the bytes of all operations, and nothing for a view; the same every time."""
    found = layers([nn.Linear(8, 16, bias=False), nn.Unflatten(1, (4, 4)), nn.Flatten(), nn.ReLU(), nn.Linear(16, 1, bias=False)])
    x, y = torch.randn(4, 8), torch.zeros(4, 1)
    one, two = ([cost.work for cost in measure(found, x, y, nn.functional.mse_loss, repeats=1, counts=True)] for _ in range(2))
    assert one == two
    seen = Work()
    weight = found[0].module.weight
    with seen:
        out = weight.detach() @ x.t()
        out.t().reshape(4, 4, 4)
    assert seen.multiply_adds == 16 * 8 * 4
    assert seen.bytes == 4 * (16 * 8 + 4 * 8 + 16 * 4)
    assert one[1] < one[3] < one[0]
    assert [cost.work for cost in measure(found, x, y, nn.functional.mse_loss, repeats=1)] == [0.0] * 5


class Hides(nn.Module):
    """Runs nothing under a dispatch mode."""

    def forward(self, x):
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("not under a mode")
        return 2 * x


def test_work_that_cannot_be_seen_is_that_of_the_bytes():
    found = layers([nn.Linear(3, 2), Hides()])
    costs = measure(found, torch.randn(4, 3), torch.zeros(4, 2), nn.functional.mse_loss, repeats=1, counts=True)
    assert costs[1].work == 6 * 4 * 2 * 4 * CPU


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("how", ["counted", "measured"])
def test_the_cut_follows_what_is_asked_for(monkeypatch, how):
    """The first layer has the most work, and the last one is made to take the most time."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    clock = itertools.accumulate(itertools.chain.from_iterable([0, 1, 0, 1 + 98 * (n >= 6)] for n in itertools.count()))
    monkeypatch.setattr(sys.modules["delock.partition.measure"], "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    data = [(torch.randn(8, 4), torch.zeros(8, 2))]
    options = {"placement": Placement(balance=how)} if how == "measured" else {}
    result = fit(model, data, loss=nn.functional.mse_loss, method="bp", optimizer=SGD(0.1), stages=2, epochs=1, workers="inline", **options)
    assert result.started.cuts == ((2,) if how == "counted" else (3,))


@pytest.mark.usefixtures("own_random")
def test_the_median_of_the_repeats_is_taken(monkeypatch):
    clock = itertools.accumulate([0, 1, 0, 2, 0, 9, 0, 3, 0, 5, 0, 7])  # (forward, backward) = (1, 2), (9, 3), (5, 7)
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(sys.modules["delock.partition.measure"], "time", fake)  # the package's `measure` is the function
    (cost,) = measure(layers([nn.Linear(2, 1)]), torch.ones(3, 2), torch.ones(3, 1), nn.functional.mse_loss, repeats=3)
    expected = LayerCost(forward_s=5, backward_s=3, out_bytes=12, params=3, shape=(1,), outputs=(((3, 1), torch.float32),))
    assert replace(cost, memory=None) == expected


class Tokens(nn.Module):
    """(tokens, mask) -> (embedded, mask): integers and booleans in, one floating and one boolean tensor out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, x):
        tokens, mask = x
        return self.embed(tokens), mask


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = []

    def forward(self, x):
        h, mask = x
        assert h.requires_grad
        assert not mask.requires_grad
        return self.linear(h) * mask[..., None], mask


@pytest.mark.usefixtures("own_random")
def test_integers_tuples_and_pytrees_of_targets_are_measured():
    found = layers([Tokens(), Mix(), Mix()])
    tokens, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    targets = {"y": torch.zeros(2, 5, 8), "weights": [torch.ones(2, 5)]}

    def loss(out, targets):
        return ((out[0] - targets["y"]).square().mean(-1) * targets["weights"][0]).sum()

    costs = measure(found, (tokens, mask), targets, loss)
    assert [c.out_bytes for c in costs] == [2 * 5 * 8 * 4 + 10] * 3
    assert all(c.backward_s > 0 for c in costs)


@pytest.mark.usefixtures("own_random")
def test_what_does_not_learn_has_no_backward_and_in_place_atoms_are_served():
    frozen = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    kept = x.clone()
    costs = measure(layers([nn.ReLU(inplace=True), frozen, nn.Linear(4, 4), nn.ReLU(inplace=True)]), x, kept, nn.functional.mse_loss)
    assert [c.backward_s > 0 for c in costs] == [False, False, True, True]
    assert torch.equal(x, kept)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ([nn.Linear(3, 3), nn.Linear(4, 4)], r"layer 1 \(1, Linear\) fails on its input \(2, 3\) float32: .*mat1"),
        (
            [nn.LSTM(3, 3), nn.Linear(3, 3)],
            r"layer 0 \(0, LSTM\) returns a tuple of 2 \(Tensor, tuple\), and only a tensor or a tuple of tensors can",
        ),
        ([nn.Conv2d(1, 1, 3), nn.Flatten()], r"layer 0 \(0, Conv2d\) fails on its input \(2, 3\) float32"),
    ],
)
def test_an_atom_that_does_not_fit_is_named(model, says):
    with pytest.raises(UsageError, match=says):
        measure(layers(model), torch.randn(2, 3), torch.randn(2, 3), nn.functional.mse_loss)


# --- balance --------------------------------------------------------------------------------------------------------------------


def parts_of(values, cuts):
    return [values[a:b] for a, b in itertools.pairwise([0, *cuts, len(values)])]


def by_hand(costs, K, params):
    """The best over all cuts, by trying them all."""

    def value(cuts):
        sums = [sum(part) for part in parts_of(costs, cuts)]
        bare = sum(not any(part) for part in parts_of(params, cuts))
        return bare, max(sums), sum(s * s for s in sums)

    return min(value(cuts) for cuts in itertools.combinations(range(1, len(costs)), K - 1)), value


def test_balance_is_exact():
    draw = random.Random(0)
    for _ in range(150):
        n = draw.randint(1, 9)
        K = draw.randint(1, n)
        costs = [float(draw.choice([0, 1, 2, 3, 5, 8, 20])) for _ in range(n)]
        params = [draw.choice([0, 0, 7]) for _ in range(n)]
        for given, counted in ((None, [1] * n), (params, params)):
            best, value = by_hand(costs, K, counted)
            cuts = balance(costs, K, given)
            assert cuts == balance(costs, K, given)
            assert value(cuts) == best, (costs, K, given)


def test_balance_known_cases():
    assert balance([1, 1, 1, 1], 1) == []
    assert balance([1, 1, 1, 1], 2) == [2]
    assert balance([1, 1, 1, 1], 4) == [1, 2, 3]
    assert balance([10, 1, 1, 1, 1], 3) == [1, 3]  # the largest stage is settled: the others are evened out
    assert balance([1, 9, 9], 2) == [2]
    assert balance([5, 5, 9], 2, [1, 1, 0]) == [1]  # better a dearer stage than one that has nothing to learn
    assert balance([5, 5, 9], 3, [1, 1, 0]) == [1, 2]  # legal where it cannot be helped
    assert balance([3, 3], 2, [0, 0]) == [1]
    assert balance([1, 1, 1], 2) == [1]  # a tie: the earlier cut


@pytest.mark.parametrize("K", [0, 4])
def test_balance_refuses_an_impossible_number_of_stages(K):
    with pytest.raises(UsageError, match=f"cannot make {K} stages of 3 layers: use 1 to 3 stages"):
        balance([1, 1, 1], K)
