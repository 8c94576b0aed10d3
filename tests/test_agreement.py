"""An instant that all stages agree on while they run: what each records there is what a run that was stopped there has."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest

from delock.engine.agreement import Agreement, Wish, reach
from delock.engine.engine import Engine, run_here
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, GPipe, Interlocking, Method, PipeDream2BW
from delock.plan import unroll, windows
from delock.run.job import StageJob

import papers
from harness import Held, enough, jobs, same_tree

METHODS: list[Method] = [
    *(BP(2), GPipe(3), DDG(), DDG(micro_batches=3), FR(), FDG(), FDG(micro_batches=2, ahead="part"), ADL(2), ADL(2, micro_batches=3)),
    *(papers.uneven_dsp(3), DSP(micro_batches=2), PipeDream2BW(3), DGL(), Interlocking(2)),
]


def made(method: Method, **more: Any) -> list[StageJob]:
    found = jobs("conv", 3, method)
    for job in found:
        for name, value in more.items():
            setattr(job, name, value)
    return found


def agree(engines: list[Engine], method: Method, at: int) -> dict[int, tuple[int, Any]]:
    """Lets stage 0 decide in its tick `at`; returns by stage the agreed tick and what it recorded, which fills during the run."""
    found: dict[int, tuple[int, Any]] = {}

    def act(k: int, tick: int, wish: Wish) -> None:
        assert wish is Wish.SAVE
        found[k] = (tick, engines[k].record(tick))

    for k, engine in enumerate(engines):
        due = at + 1 + reach(method, len(engines))
        wanted = lambda tick, due=due: Wish.SAVE if tick == due else Wish.NOTHING  # type: ignore[misc]  # noqa: E731
        engine.agreement = Agreement(method, k, len(engines), wanted, partial(act, k))
    return found


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("method", "at"), enough(itertools.product(METHODS, (0, 1, 4)), together=1), ids=str)
def test_what_is_recorded_on_the_way_is_what_a_stop_would_leave(method: Method, at: int) -> None:
    whole, stopped = Held(made(method)), Held(made(method))
    found = agree(whole.engines, method, at)
    for plan in whole.plans:
        run_here(plan, whole.engines)
    ticks = {tick for tick, _ in found.values()}
    assert len(found) == 3
    assert len(ticks) == 1
    before = [step.tick for column in unroll(method, 3, whole.workers[0].job.length).columns for step in column]
    tick = ticks.pop()
    assert at < tick <= max(before)
    for plan in list(windows(method, 3, whole.workers[0].job.length, 1))[:tick]:
        run_here(plan, stopped.engines)
    for k, engine in enumerate(stopped.engines):
        same_tree(_plain(found[k][1].state()), _plain(engine.state()))


def _plain(state: Any) -> Any:
    """The state without the word of the agreement, which travels with one activation."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items() if key != "agreed"}
    return [_plain(one) for one in state] if isinstance(state, list | tuple) else state
