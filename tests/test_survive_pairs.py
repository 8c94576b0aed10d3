"""Every pair of options, every method, every kind of state: a run that goes on is the one that was never interrupted, to the last bit."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from delock.errors import DelockError
from delock.records import CheckpointRecord, Event

from harness import in_the_same_processes
from leftovers import children, soon
from odd_layers import Case
from pairs import METHODS, OPTIONS, K, covering, few, inline, keep_all, made, plain, resumed, same

FDG = "FDG(beta=0.5, at='stash', order='backward-first'"
ONCE_BROKEN = [
    *(plain(FDG, odd=odd) for odd in ("Late", "Growing", "Extra")),
    *(plain(FDG, optimizer="nadamw", dtype=torch.float64), plain(FDG, optimizer="noisy", dropout=True)),
    *(plain("BP", data=data, at=0.45) for data in ("ordered", "torchdata")),  # at the end of an epoch
    plain("DGL", odd="Complex", optimizer="amsgrad", feedback=True, schedule="cycle", norm=True, at=0.98),  # a head's first batch
    plain("DDG(micro_batches=3", data="one left", at=0.45),  # of a version, empty parts alone are in flight
]
FAST = few(18)
PARTS = 16  # tests that share the slow cases


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here waits for a disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def goes_on(case: Case, folder: Path) -> None:
    """A run with checkpoints, and one that goes on from one of them, are the run without."""
    whole = inline(made(case))
    events: list[Event] = []
    same(inline(made(case, keep_all(folder)), events), whole)
    written = [event for event in events if isinstance(event, CheckpointRecord)]
    assert written
    assert [event.problem for event in written if event.problem] == []
    same(inline(resumed(case, folder, case["at"])), whole)


def complaints(cases: Sequence[Case]) -> Iterator[str]:
    """Runs them all, and says which have failed."""
    before = children()
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                goes_on(case, Path(folder))
            except (AssertionError, DelockError, RuntimeError) as error:
                yield f"{case}: {type(error).__name__} {error}"
    gc.collect()
    soon(lambda: reaped() and not children() - before)


def reaped() -> bool:
    """Waits for workers of torchdata that have ended, which nobody else does."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return True


@pytest.mark.usefixtures("own_random")
@pytest.mark.filterwarnings("ignore:'set_vital'")
@pytest.mark.parametrize(
    "case", [*FAST, *ONCE_BROKEN], ids=lambda case: f"{case['method']}-{case['odd']}-{case['optimizer']}-{case['data']}"
)
def test_a_run_goes_on_as_it_was(case: Case, tmp_path: Path) -> None:
    goes_on(case, tmp_path)


def test_the_quick_cases_have_all_methods_and_kinds_of_state() -> None:
    for name in ("family", "odd", "optimizer", "schedule"):
        assert {case[name] for case in FAST} == set(OPTIONS[name]), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_goes_on_as_it_was(part: int) -> None:
    assert {case["method"] for case in covering()} == set(METHODS)
    assert list(complaints(covering()[part::PARTS])) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_random")
def test_processes_go_on_as_they_were(tmp_path: Path) -> None:
    cases = dict(enumerate(few(10, seed=1)))
    first = in_the_same_processes({i: made(case, keep_all(tmp_path / str(i))) for i, case in cases.items()})
    again = in_the_same_processes({i: resumed(case, tmp_path / str(i), case["at"]) for i, case in cases.items()})
    for i, case in cases.items():
        whole = inline(made(case))
        assert len(whole) == K
        same(first[i], whole)
        same(again[i], whole)
