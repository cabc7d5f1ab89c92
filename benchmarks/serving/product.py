"""`qwen3ft serve` with each of its engines, asked like any other server.

It compares itself with the run's test before it answers. llama.cpp needs the extra `gguf` in this
environment; vLLM is found in its own.
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import partial

from benchmarks.serving.champion import Champion, settings_of
from benchmarks.serving.clients import ask_chat, server
from benchmarks.serving.venvs import Venvs
from qwen3ft.records.serving import EngineName


def serve(engine: EngineName, champion: Champion, venvs: Venvs) -> list[str]:
    """Ask `qwen3ft serve --engine` with this engine."""
    work = champion.export.parent
    project = work / "qwen3ft.yaml"
    project.write_text(json.dumps(settings_of(work)), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "qwen3ft", "serve", "--engine", engine]
    command += ["--adapter", str(champion.adapter)]
    path = f"{venvs.vllm / 'bin'}:{os.environ['PATH']}"
    extra = {"MLFLOW_TRACKING_URI": champion.tracking_uri, "PATH": path}
    with server(command, work, "/health", extra) as address:
        said = work.with_name("server.log").read_text(encoding="utf-8", errors="replace")
        print(*re.findall(r"[0-9.]+ % of \d+ answers as in its test", said))
        return ask_chat(address, champion.questions, "champion")


PRODUCT = {
    "qwen3ft serve, own decoder": partial(serve, "own"),
    "qwen3ft serve, llama.cpp": partial(serve, "llama.cpp"),
    "qwen3ft serve, vLLM": partial(serve, "vllm"),
}
