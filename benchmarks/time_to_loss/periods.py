"""Measures seconds per batch: of eight emulated stages, of two real ones on two cores, and of these over a link of 100 Mbit/s."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import delock
from delock.methods import Method
from delock.nets import gpt
from delock.optim.stage_facts import StageFacts, for_stage
from delock.records import Event, StepRecord
from delock.timeline import Costs, Emulation, predict

sys.path.append(str(Path(__file__).resolve().parent.parent / "slow_link"))
from namespaces import End, inside
from two_stages import BATCH, CONTEXT, OPTIMIZERS, WARM, WIDTH

FEATURES, STEPS, PATIENCE = 256, 30, 300


# ---- emulated ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Holds the seconds per batch of one stage: forward, backward, and a step of its optimizer."""

    forward: float
    backward: float
    update: float


def block(optimizer: str, repeats: int = 30) -> Stage:
    """Measures a stage of one block, with one thread: medians of `repeats` batches."""
    torch.set_num_threads(1)
    model = gpt(65, depth=1, width=WIDTH, context=CONTEXT, seed=0).block0
    learner = for_stage(OPTIMIZERS[optimizer], StageFacts(0, 8, 1.0, 1))([(f"block0.{name}", w) for name, w in model.named_parameters()])
    x = torch.randn(BATCH, CONTEXT, WIDTH, requires_grad=True)
    found: list[tuple[float, ...]] = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        y = model(x)
        marks.append(time.perf_counter())
        y.backward(torch.ones_like(y))
        marks.append(time.perf_counter())
        learner.step()
        marks.append(time.perf_counter())
        learner.zero_grad()
        found.append(tuple(b - a for a, b in pairwise(marks)))
    return Stage(*(sorted(column)[repeats // 2] for column in zip(*found, strict=True)))


@dataclass(frozen=True)
class Waiting:
    """Makes SGD whose step takes that many seconds more, as the optimizer of the stage that is emulated would."""

    seconds: float

    def __call__(self, params: Any) -> Optimizer:
        made = torch.optim.SGD(params, lr=0.0)
        made.register_step_post_hook(partial(_wait, self.seconds))
        return made


def _wait(seconds: float, *_: Any) -> None:
    time.sleep(seconds)


def emulated(method: Method, K: int, stage: Stage) -> float:
    """Returns seconds per batch of K stages that wait as long as `stage` works, in a process each, with real messages."""
    made: tuple[Tensor, Tensor] = torch.randn(64, FEATURES), torch.randint(10, (64,))
    ends: list[float] = []
    delock.fit(
        [nn.Linear(FEATURES, FEATURES) for _ in range(K - 1)] + [nn.Linear(FEATURES, 10)],
        delock.data.as_loader([made] * STEPS),
        loss=cross_entropy,
        method=method,
        optimizer=Waiting(stage.update),
        cuts=list(range(1, K)),
        batches=STEPS,
        placement=delock.Placement(pin=False),
        simulation=delock.Simulation(emulate=Emulation(stage.forward, stage.backward)),
        report=delock.Report(log_every=1),
        callbacks=[lambda event: _note(ends, event)],
    )
    return (ends[-1] - ends[WARM]) / (STEPS - 1 - WARM)


def _note(ends: list[float], event: Event) -> None:
    if isinstance(event, StepRecord):
        ends.append(event.seconds)


def simulated(method: Method, forward: Sequence[float], backward: Sequence[float], update: Sequence[float]) -> float:
    """Returns seconds per batch by the simulator, from seconds per batch of every stage."""
    share = 1 / method.micro_batches
    ops = [tuple(share * seconds for seconds in column) for column in (forward, backward)]
    return predict(method, len(forward), Costs(*ops, update=tuple(update))).period


# ---- two real stages -----------------------------------------------------------------------------------------------------------------


def real(name: str, parts: int, optimizer: str, batches: int, ends: tuple[End, End] | None = None) -> dict[str, Any]:
    """Returns what rank 0 reports of a run in two stages, one core each; `ends`: in two network namespaces."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "reported.json"
        start = partial(_start, ends, port, (name, str(parts), optimizer, str(batches), str(out)))
        ranks = [start(rank) for rank in range(2)]
        try:
            codes = [rank.wait(timeout=PATIENCE) for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        if not out.is_file():
            raise RuntimeError(f"the ranks of {name} ended with {codes}, and no result")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _start(ends: tuple[End, End] | None, port: int, words: tuple[str, ...], rank: int) -> subprocess.Popen[bytes]:
    given = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0" if ends else str(rank), "LOCAL_WORLD_SIZE": "1" if ends else "2"}
    given |= {"MASTER_ADDR": ends[0].address if ends else "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(Path(__file__).with_name("two_stages.py")), *words]
    if ends:
        given["GLOO_SOCKET_IFNAME"] = ends[rank].interface
        line = inside(ends[rank], *line)
    return subprocess.Popen(line, env={**os.environ, **given})
