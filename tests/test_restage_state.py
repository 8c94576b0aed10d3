"""Stages that begin from a checkpoint of others: their state comes by names; what begins anew is said; other runs are refused."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

import delock
from delock.checkpoints.directory import newest_first, read, verified
from delock.data import as_loader
from delock.errors import UsageError
from delock.links.mailbox import Mailbox
from delock.methods import ADL, BP, DDG, DGL, FDG, FR, PACI, Method
from delock.optim.stage_facts import StageFacts
from delock.plan import RunLength, unroll
from delock.records import Event, Resumed
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.run.survival.left_out import missed
from delock.run.survival.resume import Begin
from delock.run.worker import Worker

from harness import CPU
from restaging import ADAM, CUTS, MOMENTUM, cross_entropy, data, kept_by_name, network, train

pytestmark = pytest.mark.usefixtures("own_random")


def workers(path: Path, K: int, **more: Any) -> list[Worker]:
    """The stages of a run that goes on from a checkpoint, before their first op."""
    options = delock.Checkpoint(path.parent, resume=path)
    given = {
        "optimizer": ADAM,
        "method": DDG(),
        "test": as_loader(data(2, 1)),
        "eval_every": 5,
        "workers": "inline",
        "cuts": CUTS[K],
        **more,
    }
    request = Request(given.pop("model", None) or network(), as_loader(data()), loss=cross_entropy, batches=99, checkpoint=options, **given)
    box = Mailbox()
    return [Worker(job, box.end(job.k), CPU, lambda event: None) for job in prepare(request, Begin(str(path), verified(path))).jobs()]


class Counting(Optimizer):
    """SGD that counts its steps in its groups, as some optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"], group["seen"] = group.get("steps", 0) + 1, group["seen"] + 2
            for weight in group["params"]:
                self.state[weight]["sum"] = self.state[weight].get("sum", 0) + weight.grad
                weight.data.sub_(weight.grad, alpha=group["lr"])


def nameless(named: list[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.Adam([weight for _, weight in named], lr=0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAM,
        MOMENTUM,
        nameless,
        delock.recipes.muon(lr=0.01),
        delock.recipes.scadamw(lr=0.01),
        delock.recipes.error_feedback(ADAM),
        Counting,
    ],
)
def test_a_weight_keeps_the_state_of_its_optimizer(tmp_path: Path, optimizer: Any) -> None:
    train(tmp_path, 4, 14, method="ddg", optimizer=optimizer, keeps={"every": 10})
    path = newest_first(tmp_path)[0]
    saved: dict[str, dict[str, Any]] = {}
    for k in range(4):
        learner = read(path, "optimizer", k)["learner"]
        names = [name for group in learner["names"] for name in group]
        saved |= {name: learner["optimizer"]["state"][i] for i, name in enumerate(names)}
    assert len(saved) == 10
    for worker in workers(path, 2, optimizer=optimizer):
        learner, held = worker.stage.learner, worker.stage.optimizer
        assert held is not None
        for name, weight in zip(learner.names, learner.weights, strict=True):
            expected = saved.pop(name)
            expected.pop("changes", None)
            assert held.state[weight].keys() == expected.keys()
            assert all(torch.equal(held.state[weight][key], expected[key]) for key in expected)
        if optimizer is Counting:
            steps = 10 - 3 + 2 * worker.job.k  # of the lowest of the stages that are joined
            assert [(group["steps"], group["seen"]) for group in held.param_groups] == [(steps, 2 * steps)]
    assert not saved


def said(folder: Path, K: int, **more: Any) -> tuple[str, ...]:
    """Returns the notes of a run that goes on in K stages."""
    events: list[Event] = []
    train(folder, K, 24, callbacks=[events.append], **more)
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    return resumed.notes


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    more = {"method": ADL(accumulate=4, order="forward-first"), "optimizer": delock.recipes.error_feedback(MOMENTUM), "eval_every": 3}
    train(tmp_path, 4, 14, keeps={"every": 10}, **more)
    assert said(tmp_path, 2, **more) == (
        "the run goes on in 2 stages cut at 5 instead of 4 stages cut at 2, 4, 6: weights and the optimizer's state are taken over by "
        "their names, and what a stage counts begins anew",
        "gradients that no update had applied are left out: those of batches 4 to 9 on stage 0, batches 4 to 9 on stage 1, batches 4 to 9 "
        "on stage 2, batches 4 to 9 on stage 3 of the 4 that there were",
        "the losses of batches 7 to 9 had not come",
        "evaluations behind batch 9 were under way, and are left out",
        "the first update applies the gradients of batches 10 to 11 alone",
        "error feedback begins anew: the changes that it compares were as old as gradients were",
    )


def test_nothing_is_left_out_of_a_synchronous_run(tmp_path: Path) -> None:
    train(tmp_path, 4, 14, method="1f1b", keeps={"every": 10})
    assert len(said(tmp_path, 2, method="1f1b")) == 1


def by_stage(named: list[tuple[str, nn.Parameter]], *, stage: StageFacts) -> Optimizer:
    return MOMENTUM(named) if stage.k == 0 else ADAM(named)


def test_state_of_another_optimizer_is_not_taken(tmp_path: Path) -> None:
    more = {"method": "bp", "optimizer": by_stage}
    train(tmp_path, 4, 14, keeps={"every": 10}, **more)
    below, above = (worker.stage.learner for worker in workers(newest_first(tmp_path)[0], 2, **{**more, "method": BP()}))
    assert [bool(below.optimizer.state.get(w)) for w in below.weights] == [True, True, *[False] * 4]  # type: ignore[union-attr]
    assert all(above.optimizer.state.get(w) for w in above.weights)  # type: ignore[union-attr]
    notes = said(tmp_path, 2, **more)
    assert notes[1:] == (
        "the optimizer's state of 2.weight, 2.bias, 3.weight and 1 more begins anew on stage 0: it was kept by another optimizer",
    )


def test_heads_go_on_where_they_fit(tmp_path: Path) -> None:
    widths = [5, 8, 6, 6, 8, 3]
    wide = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    train(tmp_path, 3, 14, wide, method="dgl", cuts=[1, 2], keeps={"every": 10})
    path = newest_first(tmp_path)[0]
    first, second, _ = workers(path, 3, model=wide, method=DGL(), cuts=[1, 4])
    saved, kept = load_file(path / "weights-0.safetensors"), kept_by_name(path)
    assert first.stage.head is not None
    assert second.stage.optimizer is not None
    heads = {f"heads.0.{name}": one for name, one in first.stage.head.module.state_dict().items()}
    assert heads
    assert all(torch.equal(one, saved[name]) for name, one in heads.items())
    moments = dict(zip(first.stage.learner.names, first.stage.learner.weights, strict=True))
    assert all(torch.equal(first.stage.optimizer.state[moments[name]]["exp_avg"], kept[name]["exp_avg"]) for name in heads)  # type: ignore[union-attr]
    assert not any(second.stage.optimizer.state.get(w) for w in second.stage.learner.weights[-len(heads) :])
    notes = said(tmp_path, 3, model=wide, method="dgl", cuts=[1, 4])
    assert [note for note in notes if "head" in note] == [
        "the head of stage 1 begins anew: the checkpoint has none of its shapes for that stage"
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": partial(torch.optim.Adam, lr=0.02)}, "lr of the optimizer was 0.01 when the checkpoint was made, and is 0.02 now"),
        ({"optimizer": MOMENTUM}, "the optimizer of stage 0 was Adam when the checkpoint was made, and is SGD now"),
        ({"method": "fdg"}, "method was ddg when .* was made, and is fdg now"),
        ({"model": nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))}, r"the module 0 was Linear\(in_features=5, out_features=8"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    train(tmp_path, 4, 14, method="ddg", keeps={"every": 10})
    with pytest.raises(UsageError, match=message):
        train(tmp_path, 2, 24, **{"method": "ddg", **more, **({"cuts": [1]} if "model" in more else {})})


def test_options_that_follow_from_the_stages_may_differ(tmp_path: Path) -> None:
    """2bw takes as many parts as its stages need: 6 for 7 stages, 4 for 2."""
    deep = nn.Sequential(nn.Linear(5, 8), *(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 3))
    _, before = train(tmp_path, 7, 14, deep, method="2bw", cuts=[1, 2, 3, 4, 5, 6], keeps={"every": 10})
    _, result = train(tmp_path, 2, 24, deep, method="2bw")
    assert result.losses[:10] == before.losses[:10]
    assert len(result.losses) == 24


@pytest.mark.parametrize(
    "method", [BP(), DDG(), FDG(order="backward-first"), ADL(3), DGL(), FR(micro_batches=2), PACI(3)], ids=lambda one: one.name
)
def test_batches_under_way(method: Method) -> None:
    """Those of a long run are those that no Update has come to, in a plan that is looked through from its beginning."""
    for first, batches in ((0, 5), (0, 61), (7, 62)):
        for k, column in enumerate(unroll(method, 3, RunLength(batches, first=first)).columns):
            updates = sum(type(step.op).__name__ == "Update" for step in column if step.tick < batches)
            M = method.batches_per_update
            applied = first // M * M + updates * M if updates else first
            assert missed(method, 3, first, batches)[k] == range(applied, batches)
