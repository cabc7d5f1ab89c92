"""A server that is killed leaves no process behind, whichever engine it has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.served import require_engine
from support.trained_adapter import Trained
from support.vllm_program import PIDS_VARIABLE, place_vllm

from qwen3ft.records.serving import EngineName

pytestmark = pytest.mark.slow
"""A server is a process of its own here, with a worker that imports torch."""

SOON_SECONDS = 120.0
ROOT = Path(__file__).parents[2]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("engine", ["own", "llama.cpp", "vllm"])
def test_a_killed_server_leaves_nothing_behind(
    trained: Trained, tmp_path: Path, engine: EngineName
) -> None:
    """SIGKILL while the engine loads; vLLM and a process of its own ignore SIGTERM."""
    program = place_vllm(tmp_path / "environment", "0.32.0")
    pids = tmp_path / "pids"
    pids.touch()
    if engine != "vllm":
        require_engine(engine)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        PIDS_VARIABLE: str(pids),
    }
    command = [sys.executable, "-m", "qwen3ft"]
    subprocess.run([*command, "init"], cwd=tmp_path, env=environment, check=True)
    options = ("--engine", engine, "--adapter", str(trained.adapter), "--port", "0")
    budget = ("--set", "max_memory_gb=8")
    server = subprocess.Popen([*command, "serve", *options, *budget], cwd=tmp_path, env=environment)
    family: list[psutil.Process] = []

    def is_loading() -> bool:
        assert server.poll() is None
        family[:] = psutil.Process(server.pid).children(recursive=True)
        if engine == "vllm":
            return len(pids.read_text().split()) == 2
        return any(process.name() == "qwen3ft-serve" for process in family)

    try:
        wait_until(is_loading)
        family += [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        server.kill()
        wait_until(lambda: not any(map(is_alive, family)))
    finally:
        server.kill()
        server.wait()
        for process in filter(is_alive, family):
            process.kill()
