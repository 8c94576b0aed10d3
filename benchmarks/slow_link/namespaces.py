"""Joins two network namespaces by a veth pair, with or without a limit on its rate; needs Linux, root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TBF = ("burst", "32kbit", "latency", "400ms")


class NotPermitted(Exception):
    """Raised if this machine does not permit such a link; the message gives the reason."""


@dataclass(frozen=True)
class End:
    """Holds one side: its namespace, its interface, its address."""

    namespace: str
    interface: str
    address: str


@contextmanager
def joined() -> Iterator[tuple[End, End]]:
    """Yields two ends that reach only each other, and always removes them afterwards. Raises NotPermitted."""
    refuse()
    own = f"delock{os.getpid()}"
    ends = (End(f"{own}a", "slow0", "10.213.7.1"), End(f"{own}b", "slow1", "10.213.7.2"))
    try:
        for end in ends:
            command("ip", "netns", "add", end.namespace)
        a, b = ends
        pair = ("type", "veth", "peer", "name", b.interface, "netns", b.namespace)
        command("ip", "-n", a.namespace, "link", "add", a.interface, *pair)
        for end in ends:
            command("ip", "-n", end.namespace, "address", "add", f"{end.address}/24", "dev", end.interface)
            for interface in ("lo", end.interface):
                command("ip", "-n", end.namespace, "link", "set", interface, "up")
        yield ends
    finally:
        for end in ends:  # the pair goes with them
            subprocess.run(["ip", "netns", "delete", end.namespace], capture_output=True, check=False)


def limit(ends: tuple[End, End], rate: str | None) -> None:
    """Limits both directions to `rate`, written as tc does, such as 100mbit; None removes the limit."""
    for end in ends:
        place = ("-n", end.namespace, "qdisc")
        if rate is None:
            subprocess.run(["tc", *place, "delete", "dev", end.interface, "root"], capture_output=True, check=False)
        else:
            command("tc", *place, "replace", "dev", end.interface, "root", "tbf", "rate", rate, *TBF)


def inside(end: End, *words: str) -> list[str]:
    """Returns the command line that runs another one in a namespace."""
    return ["ip", "netns", "exec", end.namespace, *words]


def refuse() -> None:
    """Raises NotPermitted if the link cannot work."""
    if not sys.platform.startswith("linux"):
        raise NotPermitted("network namespaces are there on Linux only")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotPermitted(f"there is no `{tool}` here: install iproute2")
    if os.geteuid():
        raise NotPermitted("only root may make network namespaces: run it with sudo, in a container also with CAP_NET_ADMIN, CAP_SYS_ADMIN")


def command(*words: str) -> None:
    """Runs a command; raises NotPermitted with its complaint if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.returncode}")
