"""The network interface by which this host reaches others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.logs import get_logger
from qwen3ft.text.commands import shell_line

logger = get_logger("network")

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Name the interface over which ranks exchange gradients; without them that is loopback."""


def machine_name() -> str:
    """Return a name that two machines, or two containers of one, do not share."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # of Linux; hosts may have one name
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


@contextmanager
def interface_for_ranks(url: str) -> Iterator[None]:
    """Let ranks that are started meanwhile listen where `url` is reached from, not on loopback.

    Interfaces that the user's variables name are kept.

    Args:
        url: Address of a server that all hosts reach.

    Raises:
        EnvironmentNotReadyError: it is reached over loopback, or not at all.
    """
    missing = [name for name in INTERFACE_VARIABLES if name not in os.environ]
    if INTERFACE_VARIABLES[0] in missing:
        interface = find_interface(url)
    else:
        interface = os.environ[INTERFACE_VARIABLES[0]]
    # NCCL takes a name without "=" for the beginning of one, and gloo for the whole.
    own = dict(zip(INTERFACE_VARIABLES, (interface, f"={interface}"), strict=True))
    os.environ.update({name: own[name] for name in missing})
    logger.info("ranks listen on %s", interface)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def find_interface(url: str) -> str:
    """Return the name of the interface over which a server is reached; nothing is sent to it."""
    host = urlsplit(url).hostname or url
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError as error:
        raise _no_interface(host, f"{host} cannot be reached ({error})") from error
    interfaces = psutil.net_if_addrs()
    found = [name for name, given in interfaces.items() if own in {each.address for each in given}]
    address_of_own = ipaddress.ip_address(own.partition("%")[0])
    if not found or address_of_own.is_loopback:
        raise _no_interface(host, "it is reached over loopback, where no other host is")
    if address_of_own.is_global:  # whoever reaches the ports can disturb the training
        raise _no_interface(host, f"it is reached over {found[0]} from {own}, a public address")
    return found[0]


def _no_interface(host: str, why: str) -> EnvironmentNotReadyError:
    others = [name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"]
    return EnvironmentNotReadyError(
        f"The network between the hosts is not known: {why}.",
        why=f"Ranks listen on the interface that leads to the Prefect server, here {host}, unless "
        f"{INTERFACE_VARIABLES[0]} names another.",
        next_command=shell_line(
            *("export", f"{INTERFACE_VARIABLES[0]}={others[0] if others else 'eth0'}")
        ),
        interfaces=others,
    )
