"""Requests at a steady rate against `qwen3ft serve`: answers, refusals, waiting, CPU, memory.

    PYTHONPATH=tests python -m benchmarks.server.load [--rate 200] [--seconds 600] [--slots 32]
                                                      [--queue 64] [--cores 2]
                                                      [--adapter FOLDER] [--out FILE]

Serves an adapter by the command itself on its own engine, by default one that it trains on a copy
of the embedded model, and sends short questions at the given rate, whether earlier ones are
answered or not. A request's time counts from when it was due, so that a client that falls behind
shows. One request in a hundred is left by its client at once. With `--cores` the server has so many
cores of its own, and the client the others.

Exits with 1 if anything else than an answer or 429 with `Retry-After` came back, if requests remain
in progress at the end, if the memory of the server or its worker grew by more than 1 MiB a minute
(Theil-Sen, after the first quarter), if 1 % of the refusals took more than a second, or if answers
took longer in the mean than all slots and the full queue need at the rate of answers (Little's law:
what is above waited where nobody counts it).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from support.trained_adapter import train_adapter

from benchmarks.machine import ROOT, report
from qwen3ft.disk.files import read_json_lines
from qwen3ft.embedded import DATA_DIR
from qwen3ft.machine.leaks import theil_sen
from qwen3ft.units import MIB

MOST_MIB_PER_MINUTE = 1.0
MOST_REFUSAL_SECONDS = 1.0
LEAVES_EVERY = 100
LEAVES_AFTER_SECONDS = 0.01
TIMEOUT_SECONDS = 60.0
SAMPLE_SECONDS = 2.0


def main() -> int:
    """Run the load, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--cores", type=int, help="the server's own; without it all share all")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwen3ft-load-") as name:
        folder = Path(name).resolve()
        adapter = (asked.adapter or train_adapter(folder).adapter).resolve()
        limits = ("--slots", str(asked.slots), "--queue", str(asked.queue))
        started = time.monotonic()
        server = _start(folder / "project", ("--adapter", str(adapter), *limits), asked.cores)
        try:
            address = _wait_until_ready(server)
            ready_seconds = time.monotonic() - started
            load = Load(address, server.pid, asked.rate, asked.seconds)
            asyncio.run(load.run())
        finally:
            server.terminate()
            server.wait()
    cores = f"{asked.cores} of the server's own" if asked.cores else "shared"
    facts = {"cores": cores, "ready_seconds": round(ready_seconds, 1), **load.facts()}
    return report(facts, load.bars(asked.slots + asked.queue), asked.out)


def _start(folder: Path, options: Sequence[str], cores: int | None) -> subprocess.Popen[str]:
    """Start the server in a new project folder."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    folder.mkdir()
    command = [sys.executable, "-m", "qwen3ft"]
    subprocess.run([*command, "init"], cwd=folder, env=environment, check=True)
    usable = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if not 0 < cores < len(usable):
            sys.exit(f"--cores {cores}: there are {len(usable)}, and the client needs one.")
        os.sched_setaffinity(0, usable[:cores])  # its processes inherit it
    server = subprocess.Popen(
        [*command, "serve", "--engine", "own", "--port", "0", "--probe-rows", "0", *options],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.sched_setaffinity(0, usable[cores or 0 :])
    return server


def _wait_until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if found := re.search(r"^Ready: .* at (\S+)/v1$", line):
            # what it says later must not fill the pipe
            threading.Thread(target=sys.stderr.writelines, args=(server.stderr,)).start()
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
        self._url, self._address = f"{address}/v1/chat/completions", address
        self._rate, self._seconds = rate, seconds
        server = psutil.Process(pid)
        [worker, *_] = server.children(recursive=True)
        self._processes = {"client": psutil.Process(), "server": server, "worker": worker}
        self._questions = [row["question"] for row in read_json_lines(DATA_DIR / "test.jsonl")]
        self.statuses: Counter[str] = Counter()
        self.took_seconds: dict[str, list[float]] = {"200": [], "429": []}
        self.late_seconds: list[float] = []
        self.memory: dict[str, list[tuple[float, float]]] = {"server": [], "worker": []}
        self.left_in_progress = -1

    async def run(self) -> None:
        """Send all requests, wait for the last answers, and look at what is left."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            watching = asyncio.create_task(self._watch_memory())
            tasks: set[asyncio.Task[None]] = set()
            before, started = self._cpu_seconds(), time.monotonic()
            for number in range(int(self._rate * self._seconds)):
                due = started + number / self._rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.late_seconds.append(time.monotonic() - due)
                task = asyncio.create_task(self._ask(client, number, due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
            self.run_seconds = time.monotonic() - started
            self.cpu_seconds = {
                name: after - before[name] for name, after in self._cpu_seconds().items()
            }
            watching.cancel()
            async with client.get(f"{self._address}/metrics") as response:
                text = await response.text()
            [line] = re.findall(r"^qwen3ft_requests_in_progress (\S+)$", text, re.MULTILINE)
            self.left_in_progress = int(float(line))

    async def _ask(self, client: aiohttp.ClientSession, number: int, due: float) -> None:
        question = self._questions[number % len(self._questions)]
        body = {"messages": [{"role": "user", "content": question}]}
        leaves = number % LEAVES_EVERY == 0
        limit = aiohttp.ClientTimeout(LEAVES_AFTER_SECONDS if leaves else TIMEOUT_SECONDS)
        try:
            async with client.post(self._url, json=body, timeout=limit) as response:
                await response.read()
                status = str(response.status)
                if response.status == 429 and "retry-after" not in response.headers:
                    status = "429 without Retry-After"
        except TimeoutError:
            self.statuses["left" if leaves else "timeout"] += 1
            return
        except aiohttp.ClientError as error:
            self.statuses[type(error).__name__] += 1
            return
        self.statuses[status] += 1
        if status in self.took_seconds:
            self.took_seconds[status].append(time.monotonic() - due)

    def _cpu_seconds(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: taken.user + taken.system for name, taken in times.items()}

    async def _watch_memory(self) -> None:
        started = time.monotonic()
        while True:
            for name, points in self.memory.items():
                # in a thread: the system counts pages for milliseconds, and requests are due
                taken = await asyncio.to_thread(self._processes[name].memory_full_info)
                points.append((time.monotonic() - started, taken.uss / MIB))
            await asyncio.sleep(SAMPLE_SECONDS)

    def facts(self) -> dict[str, Any]:
        """Return all numbers."""
        growth = {name: round(value, 1) for name, value in self._growth_mib_per_minute().items()}
        sent, seconds = sum(self.statuses.values()), self.run_seconds
        cpu = self.cpu_seconds.items()
        return {
            "rate": self._rate,
            "seconds": round(seconds, 1),
            "statuses": dict(self.statuses),
            "requests_per_second": round(sent / seconds, 1),
            "answers_per_second": round(self._answers_per_second, 1),
            "answer_seconds": _spread(self.took_seconds["200"]),
            "refusal_seconds": _spread(self.took_seconds["429"]),
            "sent_late_seconds": _spread(self.late_seconds),
            "cpu_cores_used": {name: round(taken / seconds, 2) for name, taken in cpu},
            "cpu_ms_per_request": {name: round(1000 * taken / sent, 2) for name, taken in cpu},
            "left_in_progress": self.left_in_progress,
            "growth_mib_per_minute": growth,
            "last_mib": {name: round(points[-1][1], 1) for name, points in self.memory.items()},
        }

    def bars(self, most_in_progress: int) -> dict[str, bool]:
        """Return which bars held; `most_in_progress` is the number of slots and the queue."""
        answers, refusals = self.took_seconds["200"], self.took_seconds["429"]
        if not answers:
            return {"something was answered": False}
        mean_seconds = sum(answers) / len(answers)
        bound_seconds = most_in_progress / self._answers_per_second
        return {
            "only answers and 429 with Retry-After": set(self.statuses) <= {"200", "429", "left"},
            "nothing left in progress": not self.left_in_progress,
            f"at most {MOST_MIB_PER_MINUTE:.0f} MiB a minute": all(
                slope <= MOST_MIB_PER_MINUTE for slope in self._growth_mib_per_minute().values()
            ),
            f"99 % of refusals within {MOST_REFUSAL_SECONDS:.0f} s": not refusals
            or _spread(refusals)["p99"] <= MOST_REFUSAL_SECONDS,
            f"mean answer {mean_seconds:.2f} s within {bound_seconds:.2f} s": mean_seconds
            <= bound_seconds,
        }

    @property
    def _answers_per_second(self) -> float:
        return len(self.took_seconds["200"]) / self.run_seconds

    def _growth_mib_per_minute(self) -> dict[str, float]:
        slopes = {}
        for name, points in self.memory.items():
            later = points[len(points) // 4 :]
            slopes[name] = 60 * theil_sen([(round(1000 * at), mib) for at, mib in later]) * 1000
        return slopes


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the largest; empty for no values."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    places = {"median": len(ordered) // 2, "p99": int(0.99 * len(ordered)), "most": -1}
    return {name: round(ordered[place], 3) for name, place in places.items()}


if __name__ == "__main__":
    sys.exit(main())
