"""Ranks start, report and end; bad input is refused, and no rank outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import delock
from delock.errors import UsageError
from delock.launch.cores import share_cores
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.run import carry_out, session

from ranks import Pids, alive, born_with, environment, greet, of_this_module, wait_until

# -- all is well -------------------------------------------------------------------------------------------------------------------


def test_events_and_results_arrive_in_order(pids: Pids) -> None:
    payloads = [torch.arange(3), {"a": (1, "b")}, None]
    results = run_processes(greet, payloads, on_event=pids)
    assert [(rank, total) for rank, total, _ in results] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(results[0][2], payloads[0])  # type: ignore[arg-type]
    assert [payload for _, _, payload in results[1:]] == payloads[1:]
    for rank in range(3):
        assert [event for of, event in pids.others if of == rank] == [("step", i) for i in range(3)]


def test_one_rank_and_none() -> None:
    assert run_processes(greet, ["x"]) == [(0, 0, "x")]
    assert run_processes(greet, []) == []


def test_ranks_see_the_environment_of_now_and_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run_processes(greet, [None])  # the fork server runs, with an environment in which the name below is not set
    monkeypatch.setenv("DELOCK_TEST_NAME", "now")
    [(value, threads, _)] = run_processes(environment, ["DELOCK_TEST_NAME"], threads=2)
    assert (value, threads) == ("now", 2)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system does not tell what a process was started with")
def test_ranks_are_born_with_a_heap_that_joins_small_blocks() -> None:
    """The C library reads its settings once, when a program starts; a rank and the caller see their own environment as it was."""
    before = os.environ.get("GLIBC_TUNABLES")
    [begun] = run_processes(born_with, [None])
    assert "GLIBC_TUNABLES=glibc.malloc.tcache_count=0" in begun
    assert "glibc.malloc.mxfast=0" in begun, "glibc may have put an end to the first setting, but the second is there"
    assert os.environ.get("GLIBC_TUNABLES") == before
    assert run_processes(environment, ["GLIBC_TUNABLES"])[0][0] == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to a core")
def test_ranks_are_bound_to_cores_of_their_own_if_there_are_enough() -> None:
    here = os.sched_getaffinity(0)
    assert share_cores(len(here) + 1, 1) == [None] * (len(here) + 1)
    shares = [share or set() for share in share_cores(len(here), 1)]
    assert set.union(*shares) == here
    assert sum(map(len, shares)) == len(here)
    [(_, _, bound)] = run_processes(environment, ["-"])
    assert bound == share_cores(1, 1)[0]
    [(_, _, free)] = run_processes(environment, ["-"], pin=False)
    assert free == here


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_pickled_is_named() -> None:
    lock = Lock()

    def local(rank: Rank, payload: object) -> None:
        lock.acquire()

    def entered(x: object) -> object:
        return local if lock else x

    with pytest.raises(UsageError, match=r"process: the variable `lock` of the function `local`: cannot pickle .*workers=\"inline\""):
        run_processes(local, [None])
    with pytest.raises(UsageError, match=r"stage 1 .*payload\['loss'\]\[0\]: cannot pickle .*lock.*into a module"):
        run_processes(greet, [None, {"loss": (lock, 1)}])
    with pytest.raises(UsageError, match=r"stage 0 .*: the variable `lock` of the function `local`: cannot pickle .*lock"):
        run_processes(greet, [{"at": [partial(entered, 1)]}])
    with pytest.raises(UsageError, match=r"payload\.keywords\['x'\]\.name: cannot pickle 'generator' object"):
        run_processes(greet, [partial(greet, x=SimpleNamespace(name=(i for i in range(3))))])


def test_what_is_defined_in_a_function_goes_by_value() -> None:
    class Local:
        kinds = (int, str)

        def __init__(self, base: int) -> None:
            self.base = base

        @cached_property
        def double(self) -> int:
            return 2 * self.base

    @lru_cache(maxsize=7)
    def more(x: int) -> int:
        return x + 1

    def target(rank: Rank, payload: Any) -> Any:
        kept = payload.double is payload.double and more.cache_parameters()["maxsize"]
        return [type(payload).kinds, isinstance(payload, Local), payload.base + rank.rank, payload.double, more(4), kept]

    assert run_processes(target, [Local(3), Local(5)]) == [[(int, str), True, 3, 6, 5, 7], [(int, str), True, 6, 10, 5, 7]]


def test_a_lambda_of_a_module_uses_the_globals_of_that_module() -> None:
    """A copy of them would be another state, and may be large."""
    assert run_processes(of_this_module(), [None]) == [True]


def test_an_unknown_or_absent_device_is_refused() -> None:
    with pytest.raises(UsageError, match="no device 'gpu'"):
        run_processes(greet, [None], device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU"):
            run_processes(greet, [None], device="cuda")


# -- the parent's end --------------------------------------------------------------------------------------------------------------


def start_blocking_program(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A program whose two ranks hang; returns when they do, with their pids."""
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from delock.launch.context import context
            if __name__ == "__main__":
                context()  # torch is imported in the fork server while this process imports it
                from ranks import block
                from delock.launch.processes import run_processes
                try:
                    run_processes(block, [0, 1], patience=0, on_event=lambda rank, event: print(event[1], flush=True))
                except KeyboardInterrupt:
                    sys.exit("interrupted")
            """
        )
    )
    program = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout is not None
    return program, [int(program.stdout.readline()) for _ in range(2)]


def test_ctrl_c_ends_all_ranks_quietly(tmp_path: Path) -> None:
    program, ranks = start_blocking_program(tmp_path)
    began = time.monotonic()
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to the ranks and the fork server too
    _, errors = program.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert (program.returncode, errors) == (1, "interrupted\n")
    wait_until(lambda: not any(map(alive, ranks)), 5)


@pytest.mark.parametrize("by", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ranks_do_not_outlive_their_parent(tmp_path: Path, by: signal.Signals) -> None:
    program, ranks = start_blocking_program(tmp_path)
    program.send_signal(by)
    program.communicate(timeout=20)  # ends when the ranks and the fork server have closed its pipes too
    wait_until(lambda: not any(map(alive, ranks)), 20)


def test_the_fork_server_can_be_started_before_torch_is_imported() -> None:
    code = "import sys, delock.launch.context as c; c.context(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("workers", "expected"), [("processes", ["server", "prepare"]), ("inline", ["prepare"])])
def test_the_fork_server_loads_while_a_run_is_prepared(workers: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def prepared(*_: object) -> None:
        seen.append("prepare")
        raise UsageError("it ends here")

    for where in (carry_out, session):
        monkeypatch.setattr(where, "context", lambda modules: seen.append("server"))
        monkeypatch.setattr(where, "prepare", prepared)
    model, batch = torch.nn.Linear(2, 2), (torch.zeros(2, 2), torch.zeros(2, 2))
    options: Any = {"loss": torch.nn.functional.mse_loss, "optimizer": torch.optim.SGD, "stages": 1, "workers": workers}
    with pytest.raises(UsageError, match="it ends here"):
        delock.fit(model, [batch], epochs=1, **options)
    with pytest.raises(UsageError, match="it ends here"), delock.session(model, batch, **options):
        pass
    assert seen == expected * 2


# -- the workers of a DataLoader ----------------------------------------------------------------------------------------------------


class Cores(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two samples, whose targets are the number of cores of the process that reads them; 0 if it was started in another way than here."""

    def __init__(self) -> None:
        self.how = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        cores = len(os.sched_getaffinity(0)) if multiprocessing.get_start_method() == self.how else 0
        return torch.zeros(1), torch.tensor(float(cores))


@pytest.mark.usefixtures("own_random")
def test_they_start_as_in_the_program_and_are_not_bound_to_the_core_of_a_stage() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    result = delock.fit(
        model,
        DataLoader(Cores(), 2, num_workers=1),
        loss=lambda outputs, targets: targets.mean() + 0 * outputs.sum(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        method="bp",
        stages=2,
        epochs=1,
    )
    assert result.losses == [len(os.sched_getaffinity(0))]
