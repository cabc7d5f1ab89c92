"""The product from Python: the examples of docs/python.md, the notebook, and runs read again."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.databases import place_databases

import qwen3ft
from qwen3ft.embedded import DATA_DIR
from qwen3ft.errors import ConfigError, ModelNotFoundError, RequestError
from qwen3ft.jobs.folders import write_record
from qwen3ft.records.run_card import RunCard

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
NAME = re.compile(r"\bqwen3ft\.(?!yaml)([A-Za-z_]+)")

# Like Jupyter's kernel, the cells share one namespace and run inside an event loop.
KERNEL = """
import asyncio, json, sys

cells = json.load(sys.stdin)

async def run():
    names = {}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), names)
    return names["run"]

run = asyncio.run(run())
assert run._repr_markdown_().startswith("# embedded"), run._repr_markdown_()
print(json.dumps({"outcome": run.outcome, "adapter": str(run.adapter)}))
"""


def examples(heading: str) -> list[str]:
    """Return the Python blocks of a section of the page."""
    _, _, rest = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")
    section = rest.partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def cells() -> list[str]:
    """Return the code cells of the notebook."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(folder: Path, code: list[str]) -> dict[str, Any]:
    """Run code in a folder, in a process of its own; return what came of its `run`."""
    dropped = {"PREFECT_HOME", "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        cwd=folder,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"},
        input=json.dumps(code),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the rows of the embedded model in `data`."""
    (tmp_path / "data").mkdir()
    for split in ("train", "dev", "test"):
        shutil.copy(DATA_DIR / f"{split}.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.slow  # trains, which a busy machine takes minutes for
@pytest.mark.timeout(900)
def test_the_examples_of_the_parts_run(folder: Path, cache_dir: Path, snapshot: Any) -> None:
    """The classes of the specification, one after the other, from rows to an answer."""
    (folder / ".qwen3ft").mkdir()
    (folder / ".qwen3ft" / "cache").symlink_to(cache_dir)  # the quantised model is in it
    names: dict[str, Any] = {}
    for block in examples("The parts"):
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["answer"]
    assert (folder / "only-the-tensors" / "adapter_model.safetensors").is_file()
    page = PAGE.read_text("utf-8")
    for name in ("EnvironmentManager", "MemoryOptimizer", "ModelManager", "LoRAAdapter"):
        assert f"**`{name}`**" in page
    for name in ("TrainingConfig", "DataPipeline", "TrainingEngine", "InferenceTester"):
        assert f"**`{name}`**" in page


def test_documents_use_public_names_only() -> None:
    """What the page, the notebook and the table of commands need is in `qwen3ft` itself."""
    code = "\n".join([*examples("A run"), *examples("The parts"), *cells()])
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not {name for name in imported if name and name.startswith("qwen3ft.")}
    assert set(NAME.findall(code)) <= set(qwen3ft.__all__)
    table = "".join(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `"))
    spans = re.findall(r"`([^`]+)`", table)
    called = {name for span in spans for name in re.findall(r"(?<![.\w])([A-Za-z_]+)\(", span)}
    assert called - {"run_deployment"} <= set(qwen3ft.__all__)


def test_a_run_is_read_again(folder: Path, make_config: Callable[..., Any]) -> None:
    """From its folder alone; the working folder and the environment are as before."""
    card = RunCard(title="embedded: kept", verdict="kept: no gain", adapter_path="/a/b")
    path = folder / "runs" / "some-run"
    path.mkdir(parents=True)
    write_record(path / "card.json", card)
    write_record(path / "config.json", make_config(seed=7))
    before = dict(os.environ)
    (folder / "data" / "below").mkdir()
    (folder / "qwen3ft.yaml").write_text("model_name: embedded\n")
    run = qwen3ft.Run.load("some-run", folder / "data" / "below")
    assert (run.outcome, run.verdict, run.config.seed) == ("kept", "kept: no gain", 7)
    assert (run.adapter, run.scores, run.folder) == (Path("/a/b"), {}, path)
    assert (Path.cwd(), dict(os.environ)) == (folder, before)


def test_other_users_can_read_nothing_that_python_writes(folder: Path) -> None:
    """Rows, bad rows and digests have the modes that the commands give them."""
    before = os.umask(0o022)
    try:
        (folder / "qwen3ft.yaml").write_text("model_name: embedded\ndata_paths: [data]\n")
        given = set(folder.rglob("*"))
        with qwen3ft.project() as config:
            qwen3ft.DataPipeline(config).check()
            qwen3ft.DataPipeline(config).load_qa_data_from_files()
        (folder / "notes").touch()
    finally:
        os.umask(before)
    made = {path: path.stat().st_mode & 0o777 for path in set(folder.rglob("*")) - given}
    assert made.pop(folder / "notes") == 0o644
    assert len(made) > 10
    assert set(made.values()) <= {0o700, 0o600}, made


def test_a_moved_run_is_resumed_where_it_lies(
    folder: Path, make_config: Callable[..., Any]
) -> None:
    """As with the command; this one has its verdict already, so that it is only read."""
    path = folder / "moved" / "some-run"
    path.mkdir(parents=True)
    write_record(path / "card.json", RunCard(title="embedded: kept", verdict="kept: no gain"))
    write_record(path / "config.json", make_config(seed=7))
    run = qwen3ft.finetune({"runs_dir": "moved"}, resume="some-run")
    assert (run.outcome, run.folder) == ("kept", path)


def test_a_run_that_is_not_there_is_an_error(folder: Path) -> None:
    """Whether it never was, is in progress, or has a name that leads elsewhere."""
    (folder / "runs" / "begun").mkdir(parents=True)
    with pytest.raises(RequestError, match="There is no run gone"):
        qwen3ft.Run.load("gone")
    with pytest.raises(RequestError, match="Run begun has no card"):
        qwen3ft.Run.load("begun")
    with pytest.raises(ConfigError):
        qwen3ft.Run.load("../data")


def test_settings_of_a_project_are_those_of_its_file(folder: Path) -> None:
    """Without a file they are this machine's."""
    with qwen3ft.project() as config:
        assert config.is_embedded
    (folder / "qwen3ft.yaml").write_text("model_name: embedded\nlora_r: 3\n")
    with qwen3ft.project() as config:
        assert config.lora_r == 3


def test_paths_are_relative_to_where_they_are_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settings file and an adapter's folder, in a folder below the project's."""
    (folder / "qwen3ft.yaml").write_text("model_name: embedded\n")
    (folder / "data" / "mine.yaml").write_text("lora_r: 0\n")
    (folder / "data" / "adapter").mkdir()
    monkeypatch.chdir(folder / "data")
    with pytest.raises(ConfigError, match="lora_r"):
        qwen3ft.finetune("mine.yaml")
    with (
        pytest.raises(ModelNotFoundError, match=str(folder / "data" / "adapter")),
        qwen3ft.open_chat("./adapter"),
    ):
        pass


@pytest.mark.slow  # whole runs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", [cells, lambda: examples("A run")], ids=["notebook", "page"])
def test_the_notebook_and_the_page_run(folder: Path, source: Callable[[], list[str]]) -> None:
    """Cell after cell in a new process, as in Jupyter, to an adapter that was promoted."""
    (folder / "qwen3ft.yaml").write_text(
        "model_name: embedded\ndata_paths: [data]\nbatch_size: 16\n"
        "gradient_accumulation_steps: 1\nlearning_rate: 3.0e-3\nlora_r: 16\nlora_alpha: 32\n"
        "max_sequence_length: 128\nmax_new_tokens: 16\nmax_ability_loss_rise: 2.0\n"
    )
    place_databases(folder)
    found = run_cells(folder, source())
    assert found["outcome"] == "promoted"
    assert Path(found["adapter"]).is_dir()
