"""Ranks start, report, fail, hang and end; whatever happens, no process is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from delock.errors import StageFailed, UsageError
from delock.launch.cores import share_cores
from delock.launch.processes import run_processes
from delock.launch.progress import Progress
from delock.launch.rank import Rank
from delock.launch.torchrun import under_torchrun
from delock.launch.watchdog import POLL, Watchdog

import programs

PROGRAM = Path(__file__)  # scripts of the tests below import the targets from here


class Pids(list[int]):
    """on_event that notes the pids the ranks emit, and everything else beside."""

    def __init__(self) -> None:
        self.others: list[tuple[int, object]] = []

    def __call__(self, rank: int, event: object) -> None:
        match event:
            case ("pid", int(pid)):
                self.append(pid)
            case _:
                self.others.append((rank, event))


@pytest.fixture
def pids() -> Iterator[Pids]:
    """Afterwards none of the processes that told their pid is alive."""
    told = Pids()
    yield told
    assert told, "no rank told its pid"
    assert [pid for pid in told if alive(pid)] == []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tell_pid(rank: Rank) -> None:
    rank.emit(("pid", os.getpid()))


# -- targets -----------------------------------------------------------------------------------------------------------------------


def greet(rank: Rank, payload: Any) -> tuple[int, int, Any]:
    tell_pid(rank)
    for i in range(3):
        rank.emit(("step", i))
    ranks = torch.tensor([rank.rank])
    dist.all_reduce(ranks)
    return rank.rank, int(ranks), payload


def raise_in_one(rank: Rank, how: str) -> None:
    """Rank 1 raises; the others block in a receive from it that never comes."""
    tell_pid(rank)
    rank.progress.at("F12", "epoch 1, batch 3")
    dist.barrier()
    if rank.rank != 1:
        rank.progress.wait_for(1)
        dist.recv(torch.empty(3), 1)
    match how:
        case "error":
            raise ZeroDivisionError("the culprit's own words")
        case "usage":
            raise UsageError("the batch holds one sample; give it two")
        case "leave":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            a_loop_without_end()
    rank.progress.wait_for(0)
    dist.recv(torch.empty(3), 0)


def a_loop_without_end() -> None:
    while True:
        time.sleep(0.01)


def block(rank: Rank, payload: object) -> None:
    tell_pid(rank)
    rank.progress.at("F0")
    a_loop_without_end()


def environment(rank: Rank, name: str) -> tuple[str | None, int, set[int]]:
    return os.environ.get(name), torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def born_with(rank: Rank, payload: object) -> str:
    return Path("/proc/self/environ").read_text()


def slow_set_up(rank: Rank, seconds: float) -> int:
    tell_pid(rank)
    if rank.rank == 0:
        time.sleep(seconds)  # stands for the decoding of a data set
    rank.progress.at("F0")
    rank.progress.wait_for(1 - rank.rank)
    dist.barrier()
    return rank.rank


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


# -- failures ----------------------------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_is_told_with_its_op_and_traceback(pids: Pids) -> None:
    began = time.monotonic()
    with pytest.raises(StageFailed) as caught:
        run_processes(raise_in_one, ["error"] * 3, on_event=pids)
    message = str(caught.value)
    assert message.startswith("stage 1 failed in F12 (epoch 1, batch 3): ZeroDivisionError: the culprit's own words")
    assert "in raise_in_one" in message
    assert time.monotonic() - began < 30


def test_a_usage_error_is_raised_with_its_words_alone(pids: Pids) -> None:
    with pytest.raises(UsageError, match=r"^the batch holds one sample; give it two$"):
        run_processes(raise_in_one, ["usage"] * 2, on_event=pids)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "stage 1 was killed by SIGKILL (the system does so when memory runs out) in F12 (epoch 1, batch 3)"),
        ("segv", "stage 1 was killed by SIGSEGV in F12 (epoch 1, batch 3)"),
        ("leave", "stage 1 ended with exit code 3 in F12 (epoch 1, batch 3)"),
    ],
)
def test_a_rank_that_dies_is_named_though_its_peers_raise_first(how: str, words: str, pids: Pids) -> None:
    with pytest.raises(StageFailed, match="^" + re.escape(words)) as caught:
        run_processes(raise_in_one, [how] * 3, on_event=pids)
    assert ("in raise_in_one" in str(caught.value)) == (how == "segv")  # a fatal signal leaves the Python stack


def test_a_rank_that_hangs_shows_its_stack(pids: Pids) -> None:
    with pytest.raises(StageFailed) as caught:
        run_processes(raise_in_one, ["hang"] * 2, on_event=pids, patience=1.0)
    message = str(caught.value)
    assert message.startswith("stage 1 hangs in F12 (epoch 1, batch 3): it has not moved for 1 s")
    assert "stage 0 waits for stage 1 in F12" in message
    assert "in a_loop_without_end" in message
    assert "die_with_parent" not in message
    assert "multiprocessing" not in message


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_rank_is_told_as_stopped(pids: Pids) -> None:
    with pytest.raises(StageFailed, match=r"^stage 1 is stopped by a signal in F12"):
        run_processes(raise_in_one, ["stop"] * 2, on_event=pids, patience=1.0)


def test_ranks_that_wait_for_each_other_are_told(pids: Pids) -> None:
    with pytest.raises(StageFailed, match=r"^stage 0 waits for stage 1 in F12(.|\n)*stage 1 waits for stage 0 in F12"):
        run_processes(raise_in_one, ["wait"] * 2, on_event=pids, patience=1.0)


def test_setting_up_may_take_longer_than_patience(pids: Pids) -> None:
    assert run_processes(slow_set_up, [1.5] * 2, on_event=pids, patience=0.5) == [0, 1]


def test_an_error_of_on_event_ends_the_run() -> None:
    told: list[int] = []

    def stumble(rank: int, event: Any) -> None:
        told.append(event[1])
        raise KeyError("not ready")

    with pytest.raises(KeyError, match="not ready"):
        run_processes(block, [None], on_event=stumble)
    assert not alive(told[0])


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} cannot be used .*; give another one, or 0"):
            run_processes(greet, [None], port=port)
    assert run_processes(greet, [None], port=port) == [(0, 0, None)]  # free again, and used
    assert run_processes(greet, [None], port=port) == [(0, 0, None)]  # and given back
    with pytest.raises(UsageError, match="port 99999"):
        run_processes(greet, [None], port=99999)


def test_what_cannot_be_pickled_is_named() -> None:
    def local(rank: Rank, payload: object) -> None: ...

    class Net(torch.nn.Linear):
        pass

    with pytest.raises(UsageError, match=r"the target: .*local.*workers=\"inline\""):
        run_processes(local, [None])
    with pytest.raises(UsageError, match=r"stage 1 .*payload\['loss'\]\[0\]: .*lambda.*top level of a module"):
        run_processes(greet, [None, {"loss": (lambda x: x, 1)}])
    with pytest.raises(UsageError, match=r"payload\._modules\['1'\]: .*Net"):
        run_processes(greet, [torch.nn.Sequential(torch.nn.ReLU(), Net(2, 2))])


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
            sys.path.insert(0, {str(PROGRAM.parent)!r})
            from test_launch import block, run_processes
            if __name__ == "__main__":
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


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_do_not_outlive_their_parent(tmp_path: Path, by: signal.Signals) -> None:
    program, ranks = start_blocking_program(tmp_path)
    program.send_signal(by)
    program.communicate(timeout=20)  # ends when the ranks and the fork server have closed its pipes too
    wait_until(lambda: not any(map(alive, ranks)), 20)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Processes of which this one is no parent can only be polled."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


def test_a_script_without_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        "from test_launch import greet, run_processes\nfrom delock.launch.context import context\ncontext()\nrun_processes(greet, [1, 2])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr
    assert done.stderr.count("Traceback") == 1  # the parent's


def test_what_is_defined_in_a_notebook_is_told_so() -> None:
    code = "from delock.launch.processes import run_processes\ndef target(rank, payload): pass\nrun_processes(target, [1, 2])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search(r"UsageError: a stage's process cannot rebuild what it was sent: .*'target'.*workers=\"inline\"", done.stderr)


# -- progress and watch ------------------------------------------------------------------------------------------------------------


def test_progress_reads_as_written() -> None:
    memory = bytearray(Progress.SIZE)
    writer, reader = Progress(memory), Progress(memory)
    assert not reader.read().born
    writer.born()
    assert str(reader.read()) == "before its first op"
    writer.at("F" + "1" * 50, "é" * 50)  # longer than the record keeps
    assert reader.read().op == "F" + "1" * 31
    assert reader.read().batch == "é" * 48
    writer.at("B3", "epoch 1")
    writer.wait_for(2)
    at = reader.read()
    assert (str(at), at.waits_for, at.moves) == ("in B3 (epoch 1)", 2, 4)
    writer.go_on()
    assert reader.read().waits_for is None


def nothing_stops(rank: int) -> str:
    return ""


def test_aside_an_op_nobody_is_late() -> None:
    progress = Progress()
    progress.at("F12")
    progress.wait_for(1)
    with progress.aside():
        assert not progress.read().begun
    assert (str(progress.read()), progress.read().waits_for) == ("in F12", 1)
    assert Progress(bytearray(progress.raw())).read() == progress.read()


def test_the_watch_blames_nobody_while_its_own_process_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("delock.launch.watchdog.time.monotonic", lambda: now[0])
    record = Progress()
    record.at("F0")
    watch = Watchdog([record], 2.0, nothing_stops)
    looks = []
    for step in (0.0, 0.25, 3600.0, 0.25, 0.25, 0.25, 0.25, 0.25):  # a long on_event, or Ctrl-Z, in the middle
        now[0] += step
        looks.append(watch.look([0]))
    assert looks == [[]] * 7 + [[0]]


def test_the_fork_server_can_be_started_before_torch_is_imported() -> None:
    code = "import sys, delock.launch.context as c; c.context(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# -- torchrun ----------------------------------------------------------------------------------------------------------------------

UNDER_TORCHRUN = f"""
import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
from test_launch import greet, raise_in_one
from delock.launch.torchrun import run_torchrun, under_torchrun

assert under_torchrun()
if sys.argv[1] == "greet":
    for run in range(2):  # one program may train twice
        events = []
        results = run_torchrun(greet, lambda rank: f"for {{rank}}", on_event=lambda rank, event: events.append((rank, event)))
        assert (results is None) == (os.environ["RANK"] != "0")
        if results is not None:
            print("results", results)
            for rank in range(2):
                print("events", rank, [event for of, event in events if of == rank and event[0] != "pid"])
        else:
            assert not events
else:
    run_torchrun(raise_in_one, lambda rank: sys.argv[1], patience=2.0)
"""


def torchrun(tmp_path: Path, what: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    return programs.torchrun(script, what)


def test_torchrun_gives_rank_0_all_events_and_results(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "greet")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("results [(0, 1, 'for 0'), (1, 1, 'for 1')]") == 2
    for rank in range(2):
        assert lines.count(f"events {rank} [('step', 0), ('step', 1), ('step', 2)]") == 2


def test_a_failing_rank_under_torchrun_is_told_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "error")
    assert done.returncode != 0
    assert "error: stage 1 failed in F12 (epoch 1, batch 3): ZeroDivisionError: the culprit's own words" in done.stderr
    assert "error: stage 0" not in done.stderr


def test_a_rank_that_hangs_under_torchrun_shows_its_stack(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "hang")
    assert done.returncode != 0
    assert done.stderr.count("error: stage ") == 1
    assert "error: stage 1 hangs in F12 (epoch 1, batch 3): it has not moved for 2 s\nstage 0 waits for stage 1 in F12" in done.stderr
    assert "in a_loop_without_end" in done.stderr


def test_this_process_is_not_under_torchrun() -> None:
    assert not under_torchrun()


def test_who_waited_for_a_rank_that_is_done_now_has_time_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("delock.launch.watchdog.time.monotonic", lambda: clock[0])
    records = [Progress(), Progress()]
    looks = Watchdog(records, 1.0, nothing_stops)
    for record in records:
        record.born()
    records[1].at("F0")
    records[1].wait_for(0)  # stage 0 sets itself up for a long time

    def after(seconds: float, at_work: list[int]) -> list[int]:
        for _ in range(round(seconds / POLL)):
            clock[0] += POLL
            found = looks.look(at_work)
        return found

    assert after(5.0, [0, 1]) == []
    records[0].at("F0")  # does what stage 1 waits for, and is done
    assert after(POLL, [1]) == []
    assert after(1.0, [1]) == [1]
