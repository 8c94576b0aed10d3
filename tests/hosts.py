"""Four hosts on one machine: network namespaces around a router, each with processes and a torchrun of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 29517
BEGIN = "mount -t tmpfs none /run && mkdir /run/netns && echo 1 > /proc/sys/net/ipv4/ip_forward && echo ready && exec cat"
FIRST = '"$@" & wait $!; echo "torchrun ended with $?"; exec cat'  # stays, so that a rank may outlive torchrun


class NotPermitted(Exception):
    """This machine permits no such hosts; the message says why."""


class Hosts:
    """`count` hosts in namespaces below one that this process holds; all of it is gone when the holder ends."""

    def __init__(self, holder: int, count: int) -> None:
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        self._inside = ["nsenter", "--target", str(holder), *user, "--mount", "--net"]
        self.count = count
        for host in range(count):
            self.ip("netns", "add", f"h{host}")
            self.ip("link", "add", "name", f"r{host}", "type", "veth", "peer", "name", "eth0", "netns", f"h{host}")
            self.ip("address", "add", f"{self.router(host)}/24", "dev", f"r{host}")
            self.ip("-n", f"h{host}", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            self.ip("link", "set", f"r{host}", "up")
            for interface in ("lo", "eth0"):
                self.ip("-n", f"h{host}", "link", "set", interface, "up")
            self.ip("-n", f"h{host}", "route", "add", "default", "via", self.router(host))

    def ip(self, *words: str) -> None:
        run(*self._inside, "ip", *words)

    def address(self, host: int) -> str:
        return f"10.213.{host}.2"

    def router(self, host: int) -> str:
        return f"10.213.{host}.1"

    def cut(self, a: int, b: int) -> None:
        """Loses all that two hosts send to each other, without a word to the sender."""
        for one, other in ((a, b), (b, a)):
            self.ip("rule", "add", "from", self.address(one), "to", self.address(other), "blackhole")

    def mend(self, a: int, b: int) -> None:
        for one, other in ((a, b), (b, a)):
            self.ip("rule", "delete", "from", self.address(one), "to", self.address(other), "blackhole")

    def unplug(self, host: int) -> None:
        """The router's end of a host's link goes down."""
        self.ip("link", "set", f"r{host}", "down")

    def plug(self, host: int) -> None:
        self.ip("link", "set", f"r{host}", "up")

    def start(self, host: int, script: Path, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts torchrun with a rank of this script; the log gets all that they say."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.count), "--node-rank", str(host)]
        torchrun += ["--nproc-per-node", "1", "--master-addr", self.address(0), "--master-port", str(PORT), str(script), *words]
        processes = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", FIRST, "sh"]
        command = [*self._inside, "ip", "netns", "exec", f"h{host}", *processes, *torchrun]
        with log.open("wb") as file:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
            )


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Raises NotPermitted. Afterwards the namespaces are gone, and with them every process that was started in them."""
    refuse()
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    command = ["unshare", *user, "--mount", "--net", "sh", "-c", BEGIN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline() != b"ready\n":
                raise NotPermitted(f"no namespaces here: {holder.stderr.read().decode().strip()}")
            yield Hosts(holder.pid, count)
        finally:
            holder.stdin.close()


def refuse() -> None:
    """Raises NotPermitted where it can be seen before."""
    if not sys.platform.startswith("linux"):
        raise NotPermitted("network namespaces are there on Linux only")
    for tool in ("ip", "unshare", "nsenter", "ps"):
        if shutil.which(tool) is None:
            raise NotPermitted(f"there is no `{tool}` here")


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.returncode}")


class Launched:
    """One program on all hosts: its logs, and the processes of its ranks and of its torchruns."""

    def __init__(self, net: Hosts, script: Path, *words: str) -> None:
        self.logs = [script.with_name(f"log{host}") for host in range(net.count)]
        self.first = [net.start(host, script, *words, log=log) for host, log in enumerate(self.logs)]
        self.ranks, self.torchruns = list[int](), list[int]()

    def log(self, host: int) -> str:
        return self.logs[host].read_text(errors="replace")

    def find(self) -> None:
        """Finds the ranks' processes, once all of them run."""
        trees = [list(descendants(first.pid)) for first in self.first]
        found = [[(pid, "torch.distributed.run" in words) for pid, words in tree if words.startswith(sys.executable)] for tree in trees]
        self.torchruns = [pid for pids in found for pid, agent in pids if agent]
        self.ranks = [pid for pids in found for pid, agent in pids if not agent]
        assert len(self.ranks) == len(self.torchruns) == len(self.first), trees

    def ended(self, host: int) -> bool:
        """Returns True if the rank of that host has ended, though nobody may have noticed."""
        return not running(self.ranks[host])

    def close(self) -> None:
        for first in self.first:
            for pid, _ in [*descendants(first.pid)][::-1]:
                if running(pid):
                    os.kill(pid, signal.SIGKILL)
            first.kill()
            first.communicate(timeout=20)


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Pids and command lines of the processes below one, the elder first."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
    family = {pid}
    for own, parent, words in sorted((int(line[0]), int(line[1]), line[2]) for line in lines):
        if parent in family:
            family.add(own)
            yield own, words


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
