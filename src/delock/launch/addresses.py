"""Finds a host name that means this host only, before gloo tells it to the other hosts."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

from delock.errors import UsageError


def refuse_loopback(world: int, local_world: int) -> None:
    """Raises UsageError if ranks on other hosts would be told to connect to a loopback address.

    gloo listens where this host's name leads to, or where GLOO_SOCKET_IFNAME says. Several "hosts" may all be this one: then the
    store's address is a loopback address.
    """
    if world <= local_world or os.environ.get("GLOO_SOCKET_IFNAME") or _loops(os.environ["MASTER_ADDR"]):
        return
    name = socket.gethostname()
    address = _bindable(name)
    if address is None or ip_address(address).is_loopback:
        found = f"leads to {address}" if address else "leads to no address of this host"
        raise UsageError(
            f"this host's name, {name}, {found}, where the other hosts cannot reach it: set GLOO_SOCKET_IFNAME to the interface of the "
            "network that joins the hosts, such as eth0, for torchrun on every host (`ip -brief address` lists the interfaces)"
        )


def _loops(host: str) -> bool:
    """Returns True for a literal loopback address. Another name may lead to one here, and elsewhere to this host."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _bindable(name: str) -> str | None:
    """Returns the first address of a name at which this host can listen, as gloo chooses it."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as listener:
                listener.bind(address)
                return str(address[0])
        except OSError:
            continue
    return None
