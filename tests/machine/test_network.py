"""The interface over which ranks of several hosts listen."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.network import INTERFACE_VARIABLES, interface_for_ranks


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

    def reach(address: str) -> None:
        nonlocal own
        own = address
        given = {"eth1": [SimpleNamespace(address=address)]}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: given)

    monkeypatch.setattr(socket, "socket", Probe)
    for name in INTERFACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return reach


def test_ranks_listen_on_a_private_address_and_on_no_other_interface(reached_from: Any) -> None:
    """NCCL would take every interface whose name begins like that, eth10 too."""
    reached_from("10.0.0.7")
    with interface_for_ranks("http://10.0.0.1:4200/api"):
        assert [os.environ[name] for name in INTERFACE_VARIABLES] == ["eth1", "=eth1"]
    assert not [name for name in INTERFACE_VARIABLES if name in os.environ]


@pytest.mark.parametrize("address", ["8.8.8.8", "2a00:1450:4001::5"])
def test_ranks_do_not_listen_on_a_public_address_unless_told_to(
    reached_from: Any, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Whoever reaches their ports can disturb the training."""
    reached_from(address)
    with (
        pytest.raises(EnvironmentNotReadyError, match=f"eth1 from {address}, a public address"),
        interface_for_ranks("http://10.0.0.1:4200/api"),
    ):
        pass
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "eth1")
    with interface_for_ranks("http://10.0.0.1:4200/api"):
        assert os.environ[INTERFACE_VARIABLES[1]] == "=eth1"
