"""Cuts that keep every stage within a limit of memory: against all cuts there are, each with the real prediction."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import delock
from cut_models import Net, batches, chain, started
from delock.data.iterable import as_loader
from delock.errors import UsageError
from delock.methods import METHODS, Method
from delock.options import Checkpoint, Placement
from delock.partition.balance import balance
from delock.partition.balance_within import balance_within, smallest_need
from delock.recipes import Adam
from delock.run.choose_cuts import cut_network
from delock.run.measured_network import MeasuredNetwork
from delock.run.prepare import measured_network
from delock.run.request import Request
from delock.run.stage_memory import StageNeeds, needed

pytestmark = pytest.mark.usefixtures("own_random")

# --- the search ---------------------------------------------------------------------------------------------------------------------


def cuts_of(n: int, K: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, n), K - 1))


def stages_of(cuts: tuple[int, ...], n: int) -> list[tuple[int, int, int]]:
    return [(k, a, b) for k, (a, b) in enumerate(itertools.pairwise([0, *cuts, n]))]


@pytest.mark.parametrize("seed", range(120))
def test_the_cuts_are_the_best_of_those_that_fit(seed: int) -> None:
    """Fewest stages without parameters, then the cheapest most expensive stage, then the smallest sum of squares."""
    draw = random.Random(seed)
    n, K = draw.randint(1, 8), draw.randint(1, 5)
    costs, params = [draw.randint(0, 4) for _ in range(n)], [draw.choice([0, 1, 9]) for _ in range(n)]
    allowed = {(k, a, b) for k in range(K) for a in range(n) for b in range(a + 1, n + 1) if draw.random() < 0.6}
    fitting = [cuts for cuts in cuts_of(n, K) if allowed.issuperset(stages_of(cuts, n))] if n >= K else []

    def value(cuts: tuple[int, ...]) -> tuple[int, int, int]:
        own = [(sum(costs[a:b]), sum(params[a:b])) for _, a, b in stages_of(cuts, n)]
        return sum(p == 0 for _, p in own), max(c for c, _ in own), sum(c * c for c, _ in own)

    found = balance_within(costs, K, lambda k, a, b: (k, a, b) in allowed, params)
    assert (found is None) == (not fitting)
    if found is not None:
        assert tuple(found) in fitting
        assert value(tuple(found)) == min(map(value, fitting))
        assert balance_within(costs, K, lambda k, a, b: True, params) == balance(costs, K, params)


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_need_is_that_of_all_cuts(seed: int) -> None:
    draw = random.Random(seed)
    n = draw.randint(1, 8)
    K = draw.randint(1, n)
    needs = {(k, a, b): draw.randint(1, 99) for k in range(K) for a in range(n) for b in range(a + 1, n + 1)}

    def most(cuts: Any) -> int:
        return max(needs[stage] for stage in stages_of(tuple(cuts), n))

    found = smallest_need(K, n, lambda k, a, b: needs[k, a, b] - 1, lambda k, a, b: needs[k, a, b])
    assert most(found) == min(map(most, cuts_of(n, K)))


def test_only_stages_that_may_be_part_of_the_answer_are_looked_at() -> None:
    asked = []

    def fits(k: int, a: int, b: int) -> bool:
        asked.append((k, a, b))
        return True

    assert balance_within([1.0] * 40, 4, fits, [1] * 40) == [10, 20, 30]
    assert len(set(asked)) < 250  # of 1,600


# --- the prediction -----------------------------------------------------------------------------------------------------------------


def measured(model: nn.Module, K: int, method: Method, **options: Any) -> MeasuredNetwork:
    wanted = {"optimizer": Adam(1e-3), "workers": "inline", **options}
    request = Request(model, as_loader(batches()), None, mse_loss, method, stages=K, batches=9, **wanted)
    return measured_network(request)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bp", {}),
        ("ddg", {"checkpoint": Checkpoint("unused")}),
        ("fdg", {"workers": "processes"}),
        ("2bw", {"workers": "processes", "placement": Placement(link="gloo")}),
        ("dgl", {}),
        ("interlocking", {"heads": "linear"}),
    ],
)
def test_any_layers_as_a_stage_need_what_the_run_with_these_cuts_predicts(method: str, options: dict[str, Any]) -> None:
    """For every stage of every three stages of a chain, with optimizer, versions of weights, heads and what links hold."""
    network = measured(chain(), 3, METHODS[method](), **options)
    for cuts in cuts_of(len(network.layers), 3):
        prepared = network.cut(cuts)
        needs = StageNeeds(network, prepared.slots())
        assert [needs.of(k, a, b) for k, (a, b) in enumerate(prepared.bounds())] == needed(prepared), cuts


@pytest.mark.parametrize(("make", "method"), [(chain, "ddg"), (partial(Net), "bp"), (partial(Net, marks=True), "fdg")])
def test_cuts_are_the_cheapest_that_keep_within_the_limits(make: Any, method: str) -> None:
    """For limits between the least with which there are cuts and those of the most even stages; below that the refusal says the needs."""
    network = measured(make(), 2, METHODS[method]())
    places = [i for i, layer in enumerate(network.layers) if i and (not network.marks or {layer.name, *layer.also} & set(network.marks))]
    runs = {cut: needed(network.cut((cut,))) for cut in places}
    work = network.work()
    most = {cut: max(sum(work[:cut]), sum(work[cut:])) for cut in places}
    least = min(max(needs) for needs in runs.values())
    for limit in sorted({max(needs) for needs in runs.values()}):
        prepared = cut_network(limited(network, limit), None)
        fitting = [cut for cut in places if max(runs[cut]) <= limit]
        assert max(needed(prepared)) <= limit
        assert most[prepared.cuts[0]] == min(most[cut] for cut in fitting)
    with pytest.raises(UsageError, match=rf"no cuts into 2 stages keep within stage_memory: .* would need .*{least / 1e3:.2f} KB"):
        cut_network(limited(network, least - 1), None)


def limited(network: MeasuredNetwork, *limits: int) -> MeasuredNetwork:
    return replace(network, request=replace(network.request, placement=Placement(stage_memory=limits)))


def test_a_limit_per_stage_moves_the_cut() -> None:
    network = measured(chain(), 2, METHODS["bp"]())
    low, high = needed(network.cut((1,))), needed(network.cut((4,)))
    assert cut_network(limited(network, low[0], high[0] + low[1]), None).cuts == (1,)
    assert cut_network(limited(network, high[0], low[0] + high[1]), None).cuts == (4,)


# --- what a user meets --------------------------------------------------------------------------------------------------------------


def test_fit_cuts_within_the_limit() -> None:
    free = started(chain(), stages=2)
    tight = started(chain(), stages=2, placement=Placement(stage_memory=["4K", "1M"]))
    assert tight.cuts < free.cuts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"stages": 2, "placement": Placement(stage_memory="3K")},
            r"no cuts into 2 stages keep within stage_memory: at the best ones \(\d\)",
        ),
        (
            {"cuts": ["blocks.0"], "placement": Placement(stage_memory="3K")},
            r"would need \d+.\d\d KB, \d+.\d\d KB, and stage_memory allows 3",
        ),
        ({"stages": 3, "placement": Placement(stage_memory=["1M", "2M"])}, "stage_memory has 2 limits, but there are 3 stages"),
        ({"method": "dgl-async", "workers": "processes"}, "that of free-running stages depends on the order"),
        ({"optimizer": lambda named: torch.optim.SGD([p for _, p in named], 0.1)}, "that of the optimizer is not known"),
        ({"execution": delock.Execution(compile=True)}, "that of compiled stages depends on the compiler"),
        ({"simulation": delock.Simulation(emulate="1:2")}, "emulated stages hold none"),
    ],
)
def test_what_cannot_be_kept_or_known_is_refused(options: dict[str, Any], says: str) -> None:
    model = Net() if "cuts" in options else chain()
    with pytest.raises(UsageError, match=says):
        started(model, **{"placement": Placement(stage_memory="1G"), **options})


@pytest.mark.parametrize(
    ("given", "counted"),
    [(5, 5), ("16G", 16 * 10**9), ("1.5gb", 1_500_000_000), ("900Mi", 900 * 2**20), ("2 TiB", 2 * 2**40), ("7", 7), ("3kib", 3072)],
)
def test_sizes_are_read(given: int | str, counted: int) -> None:
    assert Placement(stage_memory=given).limits(2) == (counted, counted)
    assert Placement(stage_memory=[given, 1]).limits(2) == (counted, 1)
    assert Placement().limits(2) is None


@pytest.mark.parametrize("given", [0, -1, "", "G", "16X", "1e9", "i", "0.1", "-5M", (1, "x"), "9" * 99])
def test_other_sizes_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"stage_memory is .*, but it must be a number of bytes, such as 16G"):
        Placement(stage_memory=given)
