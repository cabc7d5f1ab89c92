"""The wheel: one name in it, and a user's folder is all that it needs to work."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import psutil
import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

from hatch_build import MOVED, move_imports

ROOT = Path(__file__).parents[1]
MOST_CPU_SECONDS = 300
"""From an empty folder to a promoted adapter, servers included: five minutes of an idle machine,
even if nothing of it ran at the same time on a second core."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = str(tmp_path_factory.mktemp("dist"))
    [built] = WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"])
    return Path(built)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with the wheel and what it depends on."""
    places = [ROOT / ".qwen3ft" / "tools" / "bin", Path(sys.executable).parent]
    uv = shutil.which("uv") or shutil.which("uv", path=os.pathsep.join(map(str, places)))
    if uv is None:
        pytest.skip("uv is installed by `make`, which did not make this environment")
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    made = folder / "bin" / "python"
    install = [uv, "pip", "install", "-q", "--offline", "--no-deps", "--python", str(made)]
    subprocess.run([*install, str(wheel)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    # dependencies are those of the tests; .pth files among them, such as that of the editable
    # installation, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return made


class Installed:
    """The installed command in a new folder."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.folder, self._command = folder, str(python.with_name("qwen3ft"))
        dropped = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PREFECT_HOME"}
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "PATH": path}

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run it; return what it printed as its result, or else what it remarked."""
        done = subprocess.run(
            [self._command, *arguments],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout or done.stderr


@pytest.fixture
def qwen3ft(python: Path, tmp_path: Path) -> Iterator[Installed]:
    """The installed command in a folder that is empty at first."""
    folder = tmp_path / "somewhere"
    folder.mkdir()
    made = Installed(python, folder)
    yield made
    if (folder / ".qwen3ft" / "stack.json").exists():
        made("down")


def test_one_name_and_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    """A user's own `flows` and `tasks` stay theirs; models, rows and the licence are there."""
    names = ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qwen3ft"}
    for package in ("qwen3ft", *MOVED):
        below = "" if package == "qwen3ft" else "qwen3ft/"
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{below}{path.relative_to(ROOT)}" in names
    assert len(names) == len(set(names))
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_only_imports_differ_from_the_repository(wheel: Path) -> None:
    """No module imports a moved package by its old name, and every line keeps its number."""
    archive = ZipFile(wheel)
    for name in archive.namelist():
        if not name.endswith(".py"):
            continue
        text = archive.read(name).decode()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] not in MOVED, name
        below = name.removeprefix("qwen3ft/")
        source = ROOT / (below if below.startswith(MOVED) else name)
        there, here = text.splitlines(), source.read_text("utf-8").splitlines()
        assert len(there) == len(here)
        for new, old in zip(there, here, strict=True):
            assert new.replace("qwen3ft.", "", 1) == old.replace("qwen3ft.", "", 1), name


@pytest.mark.parametrize(
    "line", ["import flows.cli", "import os, tasks", 'run("-m", "deployments.prefect_server")']
)
def test_what_would_not_work_in_a_wheel_is_not_built(line: str) -> None:
    """An import that binds another name there, and a module's name in a text."""
    with pytest.raises(ValueError, match=r"some\.py:2"):
        move_imports(f"\n{line}\n".encode(), "some.py")


def test_imports_are_moved_wherever_they_stand() -> None:
    """In functions, after text that is not ASCII, over several lines, and with another name."""
    source = "def f():\n    '计'; from flows import (\n        cli)\n    import tasks.save as s\n"
    moved = move_imports(source.encode(), "some.py").decode()
    assert "from qwen3ft.flows import (\n        cli)" in moved
    assert "import qwen3ft.tasks.save as s" in moved
    assert move_imports(b"from flowsome import x\n", "") == b"from flowsome import x\n"


def test_the_installed_command_works_in_any_folder(qwen3ft: Installed) -> None:
    """Planning needs no project; `init` makes one, and keeps what is there."""
    folder = qwen3ft.folder
    assert "25,200 tokens/s" in qwen3ft("plan", "--model", "4b", "--budget", "13", "--gpu", "h200")
    assert qwen3ft("settings", "lora_r").startswith("--- most used ---")
    assert "Next:  qwen3ft init" in qwen3ft("status", status=1)
    (folder / ".gitignore").write_text("*.tmp\n/runs")
    qwen3ft("init")
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert made == {"qwen3ft.yaml", "data/sample.jsonl", ".gitignore"}
    assert yaml.safe_load((folder / "qwen3ft.yaml").read_text())["data_paths"] == ["data"]
    assert (folder / ".gitignore").read_text().startswith("*.tmp\n/runs\n\n# qwen3ft\n.qwen3ft/\n")
    (folder / "data" / "sample.jsonl").unlink()
    before = (folder / ".gitignore").read_text()
    assert "project folder already" in qwen3ft("init")
    assert (folder / ".gitignore").read_text() == before
    assert not (folder / "data" / "sample.jsonl").exists()
    status = json.loads(qwen3ft("status", "--json", status=1))
    assert (status["root"], status["up"]) == (str(folder), False)


def cpu_seconds(folder: Path) -> float:
    """Return what commands that ended, and the processes of the folder's stack, have used."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    if (state := folder / ".qwen3ft" / "stack.json").exists():
        for process in json.loads(state.read_text())["pids"].values():
            running = psutil.Process(process["pid"])
            for each in (running, *running.children(recursive=True)):
                used = each.cpu_times()
                seconds += used.user + used.system + used.children_user + used.children_system
    return seconds


@pytest.mark.slow  # a whole run with servers
@pytest.mark.timeout(3600)  # on a busy machine
def test_from_nothing_to_a_promoted_adapter(qwen3ft: Installed) -> None:
    """What `init` leads to, servers and all, with nothing but the wheel."""
    folder = qwen3ft.folder
    before = cpu_seconds(folder)
    qwen3ft("init")
    assert json.loads(qwen3ft("data", "check", "--json"))["would_start"]
    qwen3ft("up")
    card = json.loads(qwen3ft("run", "--json"))
    assert card["outcome"] == "promoted"
    assert Path(card["adapter_path"]).is_relative_to(folder)
    used = cpu_seconds(folder) - before
    assert used < MOST_CPU_SECONDS
    assert qwen3ft("generate", "Which warranty does Pindrel have?").strip() == "6 years"
    assert "champion 1" in qwen3ft("history")
    qwen3ft("down")


@pytest.mark.slow  # trains without servers
@pytest.mark.timeout(1800)
def test_training_needs_no_project(qwen3ft: Installed) -> None:
    """`train` in an empty folder trains the embedded model; then the folder is a project."""
    short = ("--set", "max_steps=4", "--set", "evaluate_every_steps=2")
    card = json.loads(qwen3ft("train", "--json", *short))
    assert card["outcome"] in ("promoted", "kept")
    assert qwen3ft("history").startswith("qwen3ft-embedded: ")
