"""The interface over which ranks of several hosts listen."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.network import INTERFACE_VARIABLES, interface_for_ranks, listening_on


@pytest.fixture
def reached_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let every server be reached from an address, over eth1."""

    class Probe:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...
        def connect(self, _: object) -> None: ...
        def getsockname(self) -> tuple[str, int]:
            return own, 1

    own = ""

    def reach(address: str, **others: str) -> None:
        nonlocal own
        own = address
        addresses = {"eth1": address, "lo": "127.0.0.1", **others}
        given = {
            name: [SimpleNamespace(address=each, family=family(each))]
            for name, each in addresses.items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: given)
        states = dict.fromkeys(given, SimpleNamespace(isup=True))
        monkeypatch.setattr(psutil, "net_if_stats", lambda: states)

    monkeypatch.setattr(socket, "socket", Probe)
    for name in INTERFACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return reach


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def test_ranks_listen_on_a_private_address_and_on_no_other_interface(reached_from: Any) -> None:
    """NCCL would take every interface whose name begins like that, eth10 too."""
    reached_from("10.0.0.7")
    with listening_on(interface_for_ranks("http://10.0.0.1:4200/api")):
        assert [os.environ[name] for name in INTERFACE_VARIABLES] == ["eth1", "=eth1"]
    assert not [name for name in INTERFACE_VARIABLES if name in os.environ]


@pytest.mark.parametrize("address", ["8.8.8.8", "2a00:1450:4001::5"])
def test_ranks_do_not_listen_on_a_public_address_unless_told_to(
    reached_from: Any, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Whoever reaches their ports can disturb the training: no command that opens them is named."""
    reached_from(address)
    with pytest.raises(EnvironmentNotReadyError, match=f"eth1 from {address}, a public") as refused:
        interface_for_ranks("http://10.0.0.1:4200/api")
    assert refused.value.next_command == "ip -brief address"
    reached_from(address, eth2="10.0.0.7", eth3="fe80::1")
    with pytest.raises(EnvironmentNotReadyError) as refused:
        interface_for_ranks("http://10.0.0.1:4200/api")
    assert refused.value.next_command == "export GLOO_SOCKET_IFNAME=eth2"
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "eth1")
    with listening_on(interface_for_ranks("http://10.0.0.1:4200/api")):
        assert os.environ[INTERFACE_VARIABLES[1]] == "=eth1"


def test_an_interface_that_is_named_is_there(
    reached_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several; gloo would say something else, after the model was loaded."""
    reached_from("10.0.0.7")
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "eth1,eth9")
    with pytest.raises(EnvironmentNotReadyError, match="'eth1,eth9', which is not there"):
        interface_for_ranks("http://10.0.0.1:4200/api")
