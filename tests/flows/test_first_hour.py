"""The first hour of a newcomer who is also clumsy: what is typed, and what is on the screen.

All lines are typed in one folder, in order, with one stack and few runs. Where an error ends one,
the command that it names next is typed as printed, and must work.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.databases import place_databases

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_SECONDS = 1200.0
"""Longest command, on a busy machine."""

TRAIN_STEPS = 80
"""Enough to beat the base model, in some seconds."""

# --- what is typed ---


@dataclass(frozen=True)
class Line:
    """A line that is typed, and what must come of it.

    Attributes:
        typed: The line; {names} stand for what earlier lines remembered.
        shows: Texts that must be on the screen.
        hides: Texts that must not.
        status: Exit code.
        remember: A name, and the pattern of what it stands for in later lines.
        follow: Type the next command of the error, too.
        interrupt: Press Ctrl-C once it trains.
    """

    typed: str
    shows: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    status: int = 0
    remember: tuple[str, str] = ("", "")
    follow: bool = True
    interrupt: bool = False


def ok(typed: str, *shows: str, hides: tuple[str, ...] = (), **more: object) -> Line:
    """Return a line that works."""
    return Line(typed, shows, hides, **more)  # type: ignore[arg-type]


def refused(typed: str, *shows: str, **more: object) -> Line:
    """Return a line that ends in an error of the project."""
    return Line(typed, ("What:", "Why:", "Next:", *shows), ("Traceback",), 1, **more)  # type: ignore[arg-type]


def misused(typed: str, *shows: str) -> Line:
    """Return a line that the shell's user got wrong, in the words of the command line."""
    return Line(typed, shows, ("Traceback",), 2)


RUN_ID = r"\b([0-9a-f]{8}-[0-9a-f-]{27})\b"

AN_HOUR = (
    # --- before there is a project ---
    ok("qwen3ft --version", "qwen3ft 0."),
    ok("qwen3ft -h", "Train", "Local servers", "--install-completion"),
    misused("qwen3ft rnu", "rnu"),
    misused("qwen3ft data", "check", "preview"),
    ok("qwen3ft plan --model 4b --budget 13 --gpu h200", "25,200 tokens/s", hides=("No CUDA",)),
    refused("qwen3ft status", "not inside a project folder", "qwen3ft init"),
    ok("qwen3ft init", "It was a project folder already"),  # the line before made it
    # --- settings ---
    ok("qwen3ft settings lora", "lora_r", "lora_alpha"),
    refused("qwen3ft settings lroa_r", "lora_r"),
    refused("qwen3ft plan --set lorar=3", "lora_r"),
    refused("qwen3ft plan --set lora_r=0", "lora_r"),
    refused("qwen3ft plan --set max_steps=", "max_steps"),
    misused("qwen3ft plan --set lora_r"),
    refused("qwen3ft plan --config no-such.yaml", "no-such.yaml"),
    ok("qwen3ft plan", "Fits:", "no estimate of speed for a CPU"),
    refused("qwen3ft plan --gpu Voodoo", "Voodoo"),
    refused("qwen3ft plan --model 14b --budget 1 --gpu h200", "GB"),
    refused("qwen3ft plan --model no/model", "no/model"),
    # --- data ---
    ok("qwen3ft data check", "Looking at", "read               1,130", "Training row 1"),
    ok("qwen3ft data preview --row 3", "<|im_end|>"),
    refused("qwen3ft data preview --row 100000", "1013"),
    refused("qwen3ft data check /nowhere/qa.jsonl", "does not exist"),
    refused("qwen3ft data check 'mine/empty file.jsonl'", "No usable row"),
    refused("qwen3ft data check mine/notes.pdf", "unsupported file type"),
    refused(
        "qwen3ft data check mine/long.jsonl",
        "60 of 60 rows",
        "would keep 95%",
        "--set max_sequence_length=",
    ),
    refused("qwen3ft data check mine/broken.jsonl", "max_bad_fraction"),
    refused("qwen3ft data check mine/odd-columns.jsonl", "columns"),
    ok("qwen3ft data check mine/mixed", "question = prompt, answer = response", "and in"),
    ok(
        "qwen3ft data check mine/separated.jsonl --set 'reasoning_separator=####' --json",
        '"would_start": true',
        '"reasoning_rows": 60',
    ),
    # --- servers ---
    ok("qwen3ft doctor", "memory", "GPU"),
    Line("qwen3ft status", ("down",), status=1),
    refused("qwen3ft follow", "Prefect server is down", "qwen3ft up"),  # brings them up
    ok("qwen3ft up", "prefect", "mlflow", "worker"),
    ok("qwen3ft status", "up  pid", "Prefect", "MLflow"),
    ok("qwen3ft env", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"),
    refused("qwen3ft schedule", "not registered", "qwen3ft deploy"),
    refused("qwen3ft schedule --cron '61 * * * *'", "not a valid schedule"),
    ok("qwen3ft schedule --on", "on"),
    ok("qwen3ft schedule --off", "off"),
    ok("cat qwen3ft.yaml", "model_name: embedded", hides=("active",)),
    # --- the first run, asked for by the error before it ---
    refused("qwen3ft follow", "No run of the deployment is in progress", "qwen3ft run"),
    ok("qwen3ft history", "champion 1", "promotion", remember=("first", f"of run {RUN_ID}")),
    ok("qwen3ft run --set when_unchanged=skip", "Nothing new"),
    ok("qwen3ft run --resume {first}", "already completed"),
    ok("prefect flow-run ls", "promoted: embedded", "nothing new: embedded"),
    ok("cat runs/{first}/card.md", "## Next steps", "In a new shell", "qwen3ft chat"),
    ok(
        "python -c 'import qwen3ft; run = qwen3ft.Run.load(\"{first}\"); print(run.outcome)'",
        "promoted",
    ),
    # --- using it ---
    ok("qwen3ft generate 'Which warranty does Pindrel have?'", "year"),
    refused("qwen3ft generate --adapter 99 'Hello?'", "99"),
    refused("qwen3ft promote 9", "There is no version '9'"),
    refused("qwen3ft rollback --reason curious", "no version"),
    refused("qwen3ft export data", "neither an empty folder"),
    # --- another task ---
    ok("qwen3ft history --set 'data_paths=[mine/separated.jsonl]'", "nothing is in use"),
    # --- runs that end badly, and go on ---
    refused("qwen3ft run --resume no-such-run", "There is no run no-such-run"),
    refused(
        # the next command finishes it in another folder
        "qwen3ft run --set seed=7 --set max_steps=4 --set output_dir=/dev/null/x",
        "What:  The run cannot write to /dev/null/x",
        "output_dir=",
        remember=("full", RUN_ID),
    ),
    ok("cat runs/{full}/config.json", '"seed": 7', '"max_steps": 4', hides=("/dev/null",)),
    Line(
        "qwen3ft train --set seed=5 --set max_steps=400",
        ("The run was cancelled", "Its checkpoints are kept", "qwen3ft run --resume"),
        ("Traceback", "Crash detected", "View run"),
        130,
        ("cancelled", rf"--resume {RUN_ID}"),
        follow=False,
        interrupt=True,
    ),
    ok("cat runs/{cancelled}/card.md", "cancelled by Ctrl-C", "qwen3ft run --resume {cancelled}"),
    refused("qwen3ft run --resume {cancelled} --set seed=6", "seed is 5", follow=False),
    # --- Prefect's own command ---
    Line(
        "prefect deployment run qwen3-finetune/default --param num_epochs=2", ("config",), status=1
    ),
    # --- leaving ---
    ok("qwen3ft clean --dry-run"),
    refused("qwen3ft clean --abandon no-such-run", "no-such-run"),
    ok("qwen3ft sync", "MLflow has every run"),
    ok("qwen3ft down"),
    Line("qwen3ft status", ("down",), status=1),
    ok("qwen3ft down"),
)


# --- typing it ---


class Hour:
    """A folder, what is remembered of earlier lines, and the last screen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, str] = {}
        dropped = ("PREFECT_HOME", "PYTHONDONTWRITEBYTECODE")
        kept = {name: text for name, text in os.environ.items() if name not in dropped}
        self.environment = {
            **kept,
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PWD": str(folder),
            "COLUMNS": "200",  # of a screen that shows the tables of other programs whole
        }

    def filled(self, text: str) -> str:
        """Return a text with what earlier lines remembered in place of its {names}."""
        for name, value in self.names.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def type(self, line: str, *, interrupt: bool = False) -> tuple[int, str]:
        """Type a line; return the exit code and the screen."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}" if interrupt else line],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a shell starts what runs in its background with Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        if interrupt:
            self._wait_for_training(process)
            process.send_signal(signal.SIGINT)
        screen, _ = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, screen

    def _wait_for_training(self, process: subprocess.Popen[str]) -> None:
        known = set(self.folder.glob("runs/*/attempts/01/metrics.jsonl"))
        end = time.monotonic() + LIMIT_SECONDS
        while not set(self.folder.glob("runs/*/attempts/01/metrics.jsonl")) - known:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)


def write_files(folder: Path) -> None:
    """Write what a newcomer has: good rows, bad rows, and things that are no rows."""
    mine = folder / "mine"
    (mine / "mixed").mkdir(parents=True)

    def rows(name: str, question: str, answer: str, text: str, count: int = 60) -> None:
        lines = [
            json.dumps({question: f"What is the name of number {n}?", answer: text.format(n)})
            for n in range(count)
        ]
        (mine / name).write_text("\n".join(lines))

    rows("separated.jsonl", "question", "answer", "First one, then another. #### {}")
    rows("long.jsonl", "question", "answer", "word after word " * 200 + "{}")
    rows("odd-columns.jsonl", "frage", "lösung", "It is {}.")
    rows("mixed/one.jsonl", "question", "answer", "It is {}.")
    rows("mixed/two.jsonl", "prompt", "response", "It is {}, said the other.", count=20)
    (mine / "empty file.jsonl").touch()
    (mine / "broken.jsonl").write_text("{oops\n" * 40)
    (mine / "notes.pdf").write_bytes(b"%PDF-1.7\n")


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hour]:
    """A newcomer's folder; what is up in the end is stopped."""
    folder = tmp_path_factory.mktemp("hour") / "my project"  # a shell would divide it
    folder.mkdir()
    write_files(folder)
    made = Hour(folder)
    yield made
    if (folder / ".qwen3ft" / "stack.json").exists():
        made.type("qwen3ft down")


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("line", AN_HOUR, ids=lambda line: line.typed.replace("/", "|"))
def test_a_line_of_the_first_hour(hour: Hour, line: Line) -> None:
    """It ends as it should, with these words on the screen, and what an error names next works."""
    status, screen = hour.type(hour.filled(line.typed), interrupt=line.interrupt)
    for text in line.shows:
        assert hour.filled(text) in screen, screen
    for text in line.hides:
        assert text not in screen, screen
    assert status == line.status, screen
    if line.remember[0]:
        found = re.search(line.remember[1], screen)
        assert found is not None, screen
        hour.names[line.remember[0]] = found[1]
    if status == 1 and "Next:" in screen and line.follow:
        command = screen.rsplit("Next:", 1)[1].strip()
        assert "\n" not in command
        status, after = hour.type(command)
        assert status == 0, f"$ {command}\n{after}"
        if command.endswith("qwen3ft init"):
            _make_it_short(hour.folder)


def _make_it_short(folder: Path) -> None:
    """Shorten the runs of the new project, and spare its servers the making of their tables."""
    place_databases(folder)
    with (folder / "qwen3ft.yaml").open("a") as stream:
        stream.write(f"max_steps: {TRAIN_STEPS}\n")


def test_an_hour_has_sixty_lines() -> None:
    """Fewer would be no hour."""
    assert len(AN_HOUR) >= 60
