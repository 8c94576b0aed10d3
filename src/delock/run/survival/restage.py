"""Begins stages from a checkpoint of other stages: weights, buffers and the optimizer's state are found by names in the unsplit model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delock.engine.feed import Feed
from delock.partition.layers import state_names
from delock.run.history import History
from delock.run.job import StageJob
from delock.run.survival import parts
from delock.run.survival.kept_state import KeptState
from delock.stage import Stage
from delock.stage.checkpoint import load_loss
from delock.stage.loading import load_module


def take_over(job: StageJob, stage: Stage, history: History, feed: Feed | None) -> None:
    """Lets a stage go on from a checkpoint of other stages. What belongs to their number, order or staleness begins anew."""
    assert job.begin is not None
    path, then = Path(job.begin.path), job.begin.manifest
    wanted, head = sources(job.conditions["cuts"], then.options["cuts"], job.k), job.k if stage.head else -1
    own = {job.names.get(name, name): name for name in state_names(stage.module)}
    kept, weights, volatile, own_head = KeptState(), dict[str, Any](), dict[str, Tensor](), False
    for k in sorted({*wanted, then.K - 1, *({head} & set(range(then.K)))}):
        state, rest = parts.load(path, k, {}, torch.device("cpu"))
        found = state["stage"]
        kept.add(found["learner"], rest["made"])
        weights |= {own[name]: one for name, one in found["module"].items() if name in own}
        volatile |= {own[name]: one for name, one in found["volatile"]["module"].items() if name in own}
        if stage.head and k == head and fits(stage.head.module.state_dict(), found["head"] or {}):
            own_head = True
            load_module(stage.head.module, found["head"], found["volatile"]["head"], f"head of stage {k}")
        if k == (then.K - 1 if job.k == job.K - 1 else head if own_head else -1):
            load_loss(stage, found)
        if feed and k == 0 and rest["data"] is not None:
            feed.load(rest["data"])
        if k == then.K - 1:
            seconds = rest["log"]["took"] - rest["log"]["seconds"]["evaluation"]
            history.take_over(rest["history"] if job.k == job.K - 1 else {}, then.batches, rest["history"]["earlier"] + seconds)
    load_module(stage.module, weights, volatile, f"network of stage {job.k}")
    stage.learner.advance(then.batches // job.method.batches_per_update)
    (kept if own_head else kept.without(f"heads.{job.k}.")).into(stage.learner)


def sources(cuts: Sequence[int | str], before: Sequence[int | str], k: int) -> list[int]:
    """Returns the stages between the cuts `before` that may have a layer of stage k between `cuts`; where names do not tell, all."""
    if any(isinstance(cut, str) for cut in (*cuts, *before)):
        return list(range(len(before) + 1))
    edges, old = [0.0, *map(float, cuts), math.inf], [0.0, *map(float, before), math.inf]
    return [j for j in range(len(before) + 1) if old[j] < edges[k + 1] and edges[k] < old[j + 1]]


def fits(head: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Returns True if two states of heads have the same tensors, by names and shapes."""
    one, other = ({name: value.shape for name, value in state.items() if isinstance(value, Tensor)} for state in (head, saved))
    return one == other
