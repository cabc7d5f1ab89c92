"""Requests at a steady rate against `qwen3ft serve`: answers, refusals, memory.

    python -m benchmarks.server.load [--rate 200] [--seconds 600] [--slots 32] [--out FILE]

Serves the champion of the project in the working folder by the command itself, and sends short
questions at the given rate, whether earlier ones are answered or not. One request in a hundred is
left by its client at once. Exits with 1 if anything else than an answer or 429 with `Retry-After`
came back, if requests remain in progress at the end, or if the memory of the server or its worker
grew by more than 1 MiB a minute (Theil-Sen, after the first quarter).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import machine, write_json
from qwen3ft.embedded import DATA_DIR
from qwen3ft.files import read_json_lines
from qwen3ft.machine.leaks import theil_sen
from qwen3ft.units import MIB

MOST_MIB_PER_MINUTE = 1.0
LEAVES_EVERY = 100
SAMPLE_SECONDS = 2.0


def main() -> None:
    """Run the load, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "qwen3ft", "serve", "--port", "0"]
    started = time.monotonic()
    server = subprocess.Popen(
        [*command, "--slots", str(arguments.slots)], stderr=subprocess.PIPE, text=True
    )
    try:
        address = _wait_until_ready(server)
        ready_seconds = time.monotonic() - started
        load = Load(address, server.pid, arguments.rate, arguments.seconds)
        asyncio.run(load.run())
    finally:
        server.terminate()
        server.wait()
    result = {"machine": machine(), "ready_seconds": round(ready_seconds, 1), **load.facts()}
    print(result)
    if arguments.out:
        write_json(arguments.out, result)
    sys.exit(load.is_bad())


def _wait_until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"^Ready: .* at (\S+)/v1$", line):
            return found[1]
    sys.exit("the server did not become ready")


class Load:
    """Requests at a rate, and what came back.

    Args:
        address: The server.
        pid: Its process.
        rate: Requests a second.
        seconds: Time for which they are sent.
    """

    def __init__(self, address: str, pid: int, rate: float, seconds: float) -> None:
        self._address, self._rate, self._seconds = address, rate, seconds
        self._process = psutil.Process(pid)
        self._questions = [row["question"] for row in read_json_lines(DATA_DIR / "test.jsonl")]
        self.statuses: Counter[str] = Counter()
        self.answer_seconds: list[float] = []
        self.memory: dict[str, list[tuple[float, float]]] = {"server": [], "worker": []}
        self.left_in_progress = -1

    async def run(self) -> None:
        """Send all requests, wait for the last answers, and look at what is left."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(
            base_url=self._address, limits=limits, timeout=60, trust_env=False
        ) as client:
            watching = asyncio.create_task(self._watch_memory())
            tasks: set[asyncio.Task[None]] = set()
            started = time.monotonic()
            for number in range(int(self._rate * self._seconds)):
                delay = started + number / self._rate - time.monotonic()
                if delay > 0:
                    await asyncio.sleep(delay)
                task = asyncio.create_task(self._ask(client, number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            self.sent_seconds = time.monotonic() - started
            await asyncio.gather(*tasks)
            watching.cancel()
            text = (await client.get("/metrics")).text
            [line] = re.findall(r"^qwen3ft_requests_in_progress (\S+)$", text, re.MULTILINE)
            self.left_in_progress = int(float(line))

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        question = self._questions[number % len(self._questions)]
        body = {"messages": [{"role": "user", "content": question}]}
        started = time.monotonic()
        leaves = number % LEAVES_EVERY == 0
        try:
            response = await client.post(
                "/v1/chat/completions", json=body, timeout=0.01 if leaves else 60
            )
        except httpx.TimeoutException:
            self.statuses["left" if leaves else "timeout"] += 1
            return
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return
        status = str(response.status_code)
        if response.status_code == 429 and "retry-after" not in response.headers:
            status = "429 without Retry-After"
        self.statuses[status] += 1
        if response.status_code == 200:
            self.answer_seconds.append(time.monotonic() - started)

    async def _watch_memory(self) -> None:
        started = time.monotonic()
        while True:
            [worker, *_] = self._process.children(recursive=True)
            for name, process in (("server", self._process), ("worker", worker)):
                taken = process.memory_full_info().uss / MIB
                self.memory[name].append((time.monotonic() - started, taken))
            await asyncio.sleep(SAMPLE_SECONDS)

    def facts(self) -> dict[str, Any]:
        """Return all numbers."""
        seconds = sorted(self.answer_seconds)
        growth = {name: round(value, 1) for name, value in self._growth_mib_per_minute().items()}
        return {
            "rate": self._rate,
            "sent_per_second": round(sum(self.statuses.values()) / self.sent_seconds, 1),
            "seconds": round(self.sent_seconds, 1),
            "statuses": dict(self.statuses),
            "median_answer_seconds": round(seconds[len(seconds) // 2], 3),
            "p99_answer_seconds": round(seconds[int(0.99 * len(seconds))], 3),
            "left_in_progress": self.left_in_progress,
            "growth_mib_per_minute": growth,
            "last_mib": {name: round(points[-1][1], 1) for name, points in self.memory.items()},
        }

    def is_bad(self) -> bool:
        """Return True if a bar is missed."""
        others = set(self.statuses) - {"200", "429", "left"}
        grows = any(slope > MOST_MIB_PER_MINUTE for slope in self._growth_mib_per_minute().values())
        return bool(others or grows or self.left_in_progress)

    def _growth_mib_per_minute(self) -> dict[str, float]:
        slopes = {}
        for name, points in self.memory.items():
            later = points[len(points) // 4 :]
            slopes[name] = 60 * theil_sen([(round(1000 * at), mib) for at, mib in later]) * 1000
        return slopes


if __name__ == "__main__":
    main()
