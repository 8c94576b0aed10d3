"""A rank without its store, or with a verdict on its run, ends by itself; a host that the others could not reach is refused."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from delock.errors import UsageError
from delock.launch import heartbeats as module
from delock.launch.addresses import refuse_loopback
from delock.launch.heartbeats import Heartbeats
from delock.launch.progress import Progress
from delock.launch.roll import Roll, Verdict

SERVER = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""
PATIENCE, LEEWAY, GRACE = 1.0, 0.5, 0.2
SOON = 15.0  # seconds that a test waits


class One:
    """Rank 1 of two, at an op in which it waits for stage 0."""

    def __init__(self, store: Store) -> None:
        self.left: queue.Queue[tuple[int, str]] = queue.Queue()
        progress = Progress()
        progress.at("F7", "epoch 2")
        progress.wait_for(0)
        self.beats = Heartbeats(1, 2, store, progress, PATIENCE, lambda culprit, message: self.left.put((culprit, message)), "the store")


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    """A store in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.05, "LEEWAY": LEEWAY, "GRACE": GRACE}.items():
        monkeypatch.setattr(module, name, seconds)


def client(server: subprocess.Popen[str]) -> TCPStore:
    assert server.stdout is not None
    return TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False, timeout=timedelta(seconds=60))


@pytest.mark.slow
def test_a_store_that_does_not_answer(server: subprocess.Popen[str]) -> None:
    one = One(client(server))
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    culprit, message = one.left.get(timeout=SOON)
    assert PATIENCE < time.monotonic() - began < PATIENCE + SOON
    assert culprit == 1
    assert message.startswith("stage 1 has had no answer from the store for ")
    assert message.endswith("; it stops in F7 (epoch 2), where it waits for stage 0")
    server.kill()  # so the thread that waits in C++ ends
    one.beats.close()


@pytest.mark.slow
def test_a_store_that_goes_on_in_time(server: subprocess.Popen[str]) -> None:
    one = One(client(server))
    one.beats.be_patient(600.0)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(queue.Empty):
        one.left.get(timeout=PATIENCE + 2 * LEEWAY)
    os.kill(server.pid, signal.SIGCONT)
    assert not one.beats.judge(), "the store answers again"
    one.beats.close()
    assert one.left.empty()


def test_a_store_that_is_gone(server: subprocess.Popen[str]) -> None:
    one = One(client(server))
    server.kill()
    culprit, message = one.left.get(timeout=SOON)
    one.beats.close()
    assert culprit == 1
    assert message.startswith("stage 1 stops in F7 (epoch 2), because it has lost the store: ")


def test_a_verdict_ends_a_rank_that_does_not_end_by_itself() -> None:
    store = HashStore()
    one = One(store)
    assert Roll(0, 2, store).claim(0, "stage 0 failed in F9: ValueError: five") == Verdict(0, 0, "stage 0 failed in F9: ValueError: five")
    assert one.left.get(timeout=SOON) == (0, "stage 1 stops in F7 (epoch 2), because stage 0 failed in F9: ValueError: five")
    one.beats.close()


def test_a_rank_told_to_end_finds_the_dead() -> None:
    store = HashStore()
    one = One(store)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        store.set("place/0", store.get("place/1").decode().replace(str(os.getpid()), str(process.pid), 1))
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie, as until torchrun looks
        assert one.beats.judge() == Verdict(0, 1, "stage 0 has died: its process is gone; it was last heard of before its first op")
    one.beats.close()


@pytest.mark.parametrize("how", ["lives", "has left"])
def test_a_rank_told_to_end_finds_nobody_dead(how: str) -> None:
    store = HashStore()
    one = One(store)
    pid = os.getpid() if how == "lives" else 99999999  # more than there may be
    store.set("place/0", store.get("place/1").decode().replace(str(os.getpid()), str(pid), 1))
    if how == "has left":
        store.set("left/0", "")
    assert one.beats.judge() is None
    assert store.check(["left/1"])
    one.beats.close()


# -- addresses ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host called node7 that leads to 127.0.1.1, as Debian has it."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **options: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))])
    return monkeypatch


def test_a_host_name_that_leads_to_loopback_is_refused(named: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"this host's name, node7, leads to 127\.0\.1\.1, .* set GLOO_SOCKET_IFNAME to the interface"):
        refuse_loopback(4, 1)


def test_a_host_name_without_an_address_is_refused(named: pytest.MonkeyPatch) -> None:
    named.setattr(socket, "getaddrinfo", lambda *words, **options: [])
    with pytest.raises(UsageError, match="node7, leads to no address of this host"):
        refuse_loopback(4, 1)


@pytest.mark.parametrize(
    ("world", "local", "variables"),
    [(4, 4, {}), (4, 1, {"GLOO_SOCKET_IFNAME": "eth0"}), (4, 1, {"MASTER_ADDR": "localhost"}), (4, 1, {"MASTER_ADDR": "127.0.0.1"})],
)
def test_where_it_does_no_harm(named: pytest.MonkeyPatch, world: int, local: int, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        named.setenv(name, value)
    refuse_loopback(world, local)
