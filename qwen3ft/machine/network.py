"""The network interface by which this host reaches others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.logs import get_logger
from qwen3ft.text.commands import shell_line

logger = get_logger("network")

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Name the interface over which ranks exchange gradients; without them that is loopback."""

_SHOW_INTERFACES = ("ip", "-brief", "address")


def machine_name() -> str:
    """Return a name that two machines, or two containers of one, do not share."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # of Linux; hosts may have one name
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


@contextmanager
def listening_on(interface: str) -> Iterator[None]:
    """Let ranks that are started meanwhile listen on an interface, not on loopback.

    Interfaces that the user's variables name are kept.
    """
    missing = [name for name in INTERFACE_VARIABLES if name not in os.environ]
    # NCCL takes a name without "=" for the beginning of one, and gloo for the whole.
    own = dict(zip(INTERFACE_VARIABLES, (interface, f"={interface}"), strict=True))
    os.environ.update({name: own[name] for name in missing})
    logger.info("ranks listen on %s", interface)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def interface_for_ranks(url: str) -> str:
    """Return the interface that the user's variable names, else the one that leads to a server.

    Args:
        url: Address of a server that all hosts reach.

    Raises:
        EnvironmentNotReadyError: the named one is not there; or the server is reached over
            loopback, from a public address, or not at all.
    """
    named = os.environ.get(INTERFACE_VARIABLES[0])
    if named is None:
        return find_interface(url)
    if not psutil.net_if_addrs().keys() >= set(named.split(",")):  # gloo takes several
        raise _no_interface(f"{INTERFACE_VARIABLES[0]} is {named!a}, which is not there")
    return named


def find_interface(url: str) -> str:
    """Return the name of the interface over which a server is reached; nothing is sent to it."""
    host = urlsplit(url).hostname or url
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError as error:
        raise _no_interface(f"{host} cannot be reached ({error})") from error
    interfaces = psutil.net_if_addrs()
    found = [name for name, given in interfaces.items() if own in {each.address for each in given}]
    address_of_own = ipaddress.ip_address(own.partition("%")[0])
    if not found or address_of_own.is_loopback:
        raise _no_interface("the server is reached over loopback, where no other host is")
    if address_of_own.is_global:  # whoever reaches the ports can disturb the training
        raise _no_interface(f"the server is reached over {found[0]} from {own}, a public address")
    return found[0]


def _no_interface(problem: str) -> EnvironmentNotReadyError:
    interfaces = psutil.net_if_addrs()
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    usable = [name for name in interfaces if name in up and _is_private(interfaces[name])]
    command = ("export", f"{INTERFACE_VARIABLES[0]}={usable[0]}") if usable else _SHOW_INTERFACES
    return EnvironmentNotReadyError(
        f"The network between the hosts is not known: {problem}.",
        why="Ranks listen on the interface that leads to the Prefect server, unless "
        f"{INTERFACE_VARIABLES[0]}, set for the worker or command that starts the run, names "
        "another. Whoever reaches their ports can disturb the training: let that be nobody else.",
        next_command=shell_line(*command),
        interfaces=usable,
    )


def _is_private(addresses: Iterable[Any]) -> bool:
    """Return True if an interface leads somewhere, and none of its addresses is public."""
    families = (socket.AF_INET, socket.AF_INET6)
    given = [each.address.partition("%")[0] for each in addresses if each.family in families]
    found = [ipaddress.ip_address(address) for address in given]
    leads = any(not each.is_loopback and not each.is_link_local for each in found)
    return leads and not any(each.is_global for each in found)
