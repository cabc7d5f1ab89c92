"""Servers that others wrote give the tested answers, if their environments are on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VENVS = Path(os.environ.get("QWEN3FT_SERVING_VENVS", "~/.cache/qwen3ft-serving")).expanduser()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [[], ["--thinking"]], ids=["answers", "thinks first"])
def test_every_client_gives_every_tested_answer(tmp_path: Path, options: list[str]) -> None:
    """vLLM, transformers, PEFT, llama.cpp, MLflow, and Ollama's template, by plain requests."""
    if not (VENVS / "vllm" / "bin" / "vllm").is_file():
        pytest.skip("needs the environments that `python -m benchmarks.serving` makes")
    command = [sys.executable, "-m", "benchmarks.serving", "--work", str(tmp_path), *options]
    done = subprocess.run([*command, "--venvs", str(VENVS)], cwd=ROOT, check=False)
    assert done.returncode == 0
