"""Nobody but the user who trains can reach a run on one host: nothing listens, and who calls where ranks meet is looked at."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delock
from delock.errors import LinkError, UsageError
from delock.launch.private_folder import LOCK, PREFIX, private_folder
from delock.links import meeting
from delock.links.message import Message
from delock.links.shared_memory import RECORD, SharedChannel, SlotEvent
from delock.links.stream import StreamReceiver, StreamSender, StreamWays
from delock.stage.compiled import CACHE, HEADERS, _keep_private, _options, headers_dir

from messages import activation
from workloads import Samples, class_loss, sgd

pytestmark = [
    pytest.mark.usefixtures("own_random"),
    pytest.mark.skipif(meeting.here() is None, reason="no /proc, or no memory that processes share"),
]

NOBODY = 64999  # a user that no account has
LISTENING = "0A"  # TCP's state in /proc/net/tcp


class Look(nn.Module):
    """The identity, which notes in its third batch the sockets on which a process of this run listens, and the modes of its folders."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out, self.batch = out, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch == 3 and parent_process() is not None:
            family = [os.getpid(), os.getppid(), *children(os.getppid())]
            Path(self.out).write_text(json.dumps([one for pid in family for one in listening(pid)]))
        return x


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listening(pid: int) -> list[str]:
    """Internet sockets on which a process listens, and names without a file: what another user can reach."""
    own = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()}
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if f"socket:[{words[9]}]" in own and (words[3] == LISTENING or kind.startswith("udp")):
                found.append(f"{kind} {words[1]}")
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if f"socket:[{words[6]}]" in own and words[3] == "00010000" and (len(words) < 8 or words[7].startswith("@")):
            found.append(f"unix {words[7:]}")
    return found


def train(out: Path, **options: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 16), Look(str(out)), nn.Linear(16, 16), nn.Linear(16, 10))
    data = Samples("vector", 48, 8, torch.float32)
    delock.fit(model, data, loss=class_loss, cuts=[2, 3], optimizer=sgd, epochs=2, **options)


@pytest.mark.parametrize(
    ("method", "link"), [("fdg", "auto"), ("bp", "shared"), ("dgl-async", "auto"), ("1f1b", "auto"), ("dsp", "shared")]
)
def test_nothing_listens(tmp_path: Path, method: str, link: str) -> None:
    options = {"heads": "linear"} if method == "dgl-async" else {}
    train(tmp_path / "seen", method=method, placement=delock.Placement(link=link), **options)
    assert json.loads((tmp_path / "seen").read_text()) == []


def test_gloo_listens_where_it_is_asked_for(tmp_path: Path) -> None:
    """So the look above does see listeners. It is the loopback interface, and the ranks meet in a private file."""
    train(tmp_path / "seen", method="fdg", placement=delock.Placement(link="gloo"))
    found = json.loads((tmp_path / "seen").read_text())
    assert found
    assert all(one.startswith("tcp 0100007F:") for one in found)


AN_ATTACK = f"""
import json, os, socket, sys, tempfile
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
pids, names, done = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []

def attempt(what, act):
    try:
        act()
        done.append(what)
    except OSError:
        pass

def call(name):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(name)

for pid in pids:
    attempt(f"signal {{pid}}", lambda: os.kill(pid, 0))
    for what in ("mem", "environ", "maps"):
        attempt(f"read {{what}} of {{pid}}", lambda: open(f"/proc/{{pid}}/{{what}}", "rb").read(1))
    attempt(f"list the files of {{pid}}", lambda: os.listdir(f"/proc/{{pid}}/fd"))
    for descriptor in range(40):
        attempt(f"open file {{descriptor}} of {{pid}}", lambda: open(f"/proc/{{pid}}/fd/{{descriptor}}", "rb"))
for name in names:
    attempt(f"call {{name}}", lambda: call(name))
folders = [one.path for one in os.scandir(tempfile.gettempdir()) if one.name.startswith(("delock-run-", "pymp-"))]
assert folders, "there is no folder to attack"
for folder in folders:
    attempt(f"list {{folder}}", lambda: os.listdir(folder))
    attempt(f"write into {{folder}}", lambda: open(folder + "/store", "w"))
    attempt(f"rename {{folder}}", lambda: os.rename(folder, folder + "x"))
print(json.dumps(done))
"""


class Attacked(nn.Module):
    """The identity; in its third batch another user attacks the run, and it notes what that user has been able to do."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out, self.batch = out, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch == 3 and os.geteuid() == 0 and parent_process() is not None:
            server = os.getppid()
            pids = [server, *children(server), os.getppid()]
            names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
            ours = [name for name in names if any(part in name for part in ("pymp-", "delock", "listener-"))]
            words = [sys.executable, "-c", AN_ATTACK, json.dumps(pids), json.dumps(ours)]
            Path(self.out).write_text(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout)
        return x


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("method", ["fdg", "dgl-async"])
def test_another_user_can_neither_reach_nor_end_nor_change_a_run(tmp_path: Path, method: str) -> None:
    model = nn.Sequential(nn.Linear(12, 16), Attacked(str(tmp_path / "done")), nn.Linear(16, 16), nn.Linear(16, 10))
    data = Samples("vector", 48, 8, torch.float32)
    options: dict[str, Any] = {"heads": "linear"} if method == "dgl-async" else {}
    delock.fit(model, data, loss=class_loss, cuts=[2, 3], optimizer=sgd, epochs=2, method=method, **options)
    assert json.loads((tmp_path / "done").read_text()) == []


# -- where ranks of torchrun meet --------------------------------------------------------------------------------------------------


@contextmanager
def listening_rank(token: bytes) -> Iterator[tuple[bytes, list[Any]]]:
    """The address of a rank that waits for its neighbour; what it found is in the list afterwards."""
    found: list[Any] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen(8)
        waiting = Thread(target=lambda: found.append(meeting._accept(listener, token, 1)))
        waiting.start()
        yield listener.getsockname(), found
        waiting.join(20)


def test_a_caller_without_the_token_is_sent_away_and_the_next_one_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SPEAK", 0.2)
    token = secrets.token_bytes(meeting.TOKEN)
    with listening_rank(token) as (address, found):
        for said in (b"", b"x", bytes(meeting.TOKEN)):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(address)
                stranger.sendall(said)
                assert stranger.recv(1) == b""
        own = meeting._call(address, token)
    with own, found[0]:
        own.sendall(b"!")
        assert found[0].recv(1) == b"!"


AS_NOBODY = f"""
import os, socket, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
one = socket.socket(socket.AF_UNIX)
one.connect(bytes.fromhex(sys.argv[1]))
try:
    one.sendall(bytes.fromhex(sys.argv[2]))
    print(one.recv(1))
except OSError:
    print("sent away")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_sent_away_even_with_the_token() -> None:
    token = secrets.token_bytes(meeting.TOKEN)
    with listening_rank(token) as (address, found):
        words = [sys.executable, "-c", AS_NOBODY, address.hex(), token.hex()]
        assert subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout in ("b''\n", "sent away\n")
        own = meeting._call(address, token)
    own.close()
    found[0].close()


AN_IMPOSTOR = f"""
import os, socket, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
one = socket.socket(socket.AF_UNIX)
one.bind("")
one.listen(1)
print(one.getsockname().hex(), flush=True)
connection, _ = one.accept()
print(connection.recv(99))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_token_is_not_told_to_another_user() -> None:
    impostor = subprocess.Popen([sys.executable, "-c", AN_IMPOSTOR], stdout=subprocess.PIPE, text=True)
    assert impostor.stdout is not None
    with pytest.raises(LinkError, match="held by another user"):
        meeting._call(bytes.fromhex(impostor.stdout.readline()), b"secret")
    assert impostor.communicate(timeout=20)[0] == "b''\n"


@pytest.mark.parametrize("said", [b"{}", b'["a", "b"]', b'[1, "", ""]', b'{"__reduce__": 1}'])
def test_a_place_is_read_as_data(said: bytes) -> None:
    with pytest.raises(LinkError, match="not the place of a rank"):
        meeting._place(said)


# -- memory and streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["smaller", "larger", "unsealed", "a file"])
def test_memory_that_could_change_its_size_is_refused(tmp_path: Path, how: str) -> None:
    """Reading behind the end of a file that was made shorter ends a process."""
    here, there = socket.socketpair()
    own = SharedChannel(1, 2, here)
    size = {"smaller": 8192, "larger": 1024}.get(how, 4096)
    if how == "a file":
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, 4096)
    else:
        descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 4096)
    with here, there:
        socket.send_fds(there, [RECORD.pack(SlotEvent.SLOT, 0, size)], [descriptor])
        os.close(descriptor)
        with pytest.raises(LinkError, match=f"not {size} bytes for good"):
            own.receive()


def test_the_size_of_memory_is_for_good() -> None:
    here, there = socket.socketpair()
    with here, there:
        own, other = SharedChannel(1, 2, here), SharedChannel(0, 2, there)
        own.post(own.pack(activation(0), Message(torch.ones(5)))[0])
        _, [descriptor, *_], _, _ = socket.recv_fds(there, 64, 1)
        assert other.credits == 2
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        os.close(descriptor)


def test_a_way_says_what_has_arrived_and_who_is_gone() -> None:
    pairs = {peer: socket.socketpair() for peer in (0, 1)}
    ends: list[StreamWays] = []
    upper = Thread(target=lambda: ends.append(StreamWays(1, {0: pairs[0][1]})))
    upper.start()
    lower = StreamWays(0, {1: pairs[0][0]})
    upper.join(20)
    up, received = lower.sender(1), ends[0].receiver(0)
    down, heard = ends[0].sender(0), lower.receiver(1)
    up.send(torch.arange(9, dtype=torch.uint8))
    down.send(torch.empty(0, dtype=torch.uint8))
    assert received.receive().tolist() == list(range(9))
    assert heard.receive().tolist() == []
    up.flush()
    assert up.under_way == 0
    closing = Thread(target=up.close)
    closing.start()
    received.close()
    closing.join(20)
    ends[0].abandon()
    with pytest.raises(ConnectionError):
        heard.receive()
    for pair in pairs.values():
        for one in pair:
            one.close()


def test_a_sender_whose_peer_is_gone_says_so() -> None:
    here, there = socket.socketpair()
    with here:
        sender, receiver = StreamSender(here), StreamReceiver(there)
        sender.send(torch.ones(3, dtype=torch.uint8))
        receiver.connection.close()
        with pytest.raises(OSError, match=r"closed|reset"):
            sender.flush()


# -- folders -----------------------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_is_private_and_those_of_killed_programs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, unknown, foreign = (tmp_path / f"{PREFIX}{name}" for name in ("killed", "unknown", "foreign"))
    for folder in (killed, unknown):
        folder.mkdir()
    (killed / LOCK).touch()
    foreign.symlink_to(unknown)
    with private_folder() as first:
        assert Path(first).stat().st_mode & 0o777 == 0o700
        with private_folder() as second:
            assert Path(first).exists()
            assert sorted(tmp_path.iterdir()) == sorted([unknown, foreign, Path(first), Path(second)])
    assert sorted(tmp_path.iterdir()) == sorted([unknown, foreign])


@pytest.mark.parametrize("told", [True, False])
def test_compiled_headers_are_private_or_not_made(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """A torch that does not tell where it keeps them compiles without them."""
    from torch._inductor import codecache, list_options

    if not told:
        monkeypatch.delattr(codecache, HEADERS[0], raising=False)
    options = _options()
    assert options.keys() <= set(list_options())
    assert options.get("cpp_cache_precompile_headers", True) is (headers_dir() is not None)


@pytest.mark.parametrize("before", [None, "torchinductor_root"])
def test_compiled_code_is_kept_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """Also where torch has chosen a folder in /tmp, as it does when its compiler is loaded."""
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(CACHE, raising=False)
    if before:
        monkeypatch.setenv(CACHE, str(Path(tempfile.gettempdir(), before)))
    _keep_private()
    own = Path(os.environ[CACHE])
    assert own.is_relative_to(tmp_path / "cache")
    assert own.stat().st_mode & 0o777 == 0o700
    assert headers_dir() in (None, str(own / "precompiled_headers"))
    own.chmod(0o777)
    with pytest.raises(UsageError, match=r"others can write into .*compiled"):
        _keep_private()
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file" / "x"))
    with pytest.raises(UsageError, match="cannot be kept"):
        _keep_private()
