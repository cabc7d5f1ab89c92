"""Interrupt runs with random settings at random stages, and resume them as printed.

    python -m benchmarks.resume --runs 200 --lanes 2 --out FILE

Settings are drawn by a seed and are not the defaults. A run with them is trained once undisturbed.
Then some cases of it are trained, each with a fault planted somewhere between its first line of the
journal and its promotion (`qwen3ft.faults`), and continued with the command that the terminal or
the card prints, and nothing else. All must end alike: the verdict, the scores and the adapter's
bytes, with the settings asked for in config.json, in MLflow and in the adapter. Last, resuming once
more must change nothing. Servers of their own are started below `--work` and stopped at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.machine import ROOT, machine, write_json
from deployments import services
from deployments.stack import Stack
from qwen3ft import faults
from qwen3ft.config import parse_config
from qwen3ft.embedded import DATA_DIR
from qwen3ft.files import sha256_file
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.run_state import ending_of
from qwen3ft.tracking.cursor import parent_run_id

CASE_SECONDS = 1800.0
"""Longest command; a machine under load is slow."""

ROWS = 160

JOURNAL_LINES = 24
"""Lines of the journal that a run has at least: from its start to its card."""

STEPS = 4
"""Fewest optimizer steps of a case."""

CASES_OF_SETTINGS = 4
"""Cases that are compared with one undisturbed run: it takes as long as they do."""

NOT_INTERRUPTED = "none"
"""Stage of a run whose fault lay where it did not get to, such as a promotion that it lost."""


def draw_settings(random: Random) -> dict[str, Any]:
    """Return settings: small enough to train in seconds, and not the defaults."""
    rank = random.choice([2, 4, 8])
    batch = random.choice([(4, 2), (8, 1), (2, 4), (8, 2)])
    return {
        "model_name": "embedded",
        "data_paths": [f"data/{random.choice('abc')}.jsonl"],
        "columns": {"question": "frage", "answer": "antwort"},
        "seed": random.randrange(1, 1000),
        "learning_rate": random.choice([1e-3, 2e-3, 4e-3]),
        "lora_r": rank,
        "lora_alpha": random.choice([1, 2, 4]) * rank,
        "batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "max_steps": random.randrange(STEPS, STEPS + 4),
        "evaluate_every_steps": random.choice([1, 2, 3]),
        "lr_scheduler": random.choice(["cosine", "linear"]),
        "warmup_fraction": random.choice([0.1, 0.2]),
        "weight_decay": random.choice([0.01, 0.1]),
        "max_grad_norm": random.choice([0.5, 2.0]),
        "early_stopping_patience": random.choice([2, 4]),
        "keep_checkpoints": random.choice([3, 4]),
        "max_sequence_length": random.choice([96, 128]),
        "held_out_fraction": random.choice([0.2, 0.25]),
        "near_duplicates": random.choice(["keep", "drop"]),
        "max_new_tokens": random.choice([4, 6, 8]),
        "inference_rows": random.choice([20, 30]),
        "gate_min_rows": 10,
        "gate_confidence": random.choice([0.8, 0.9]),
        "max_ability_loss_rise": 4.0,
        "max_memory_gb": random.choice([3.0, 4.0]),
        "preflight": random.choice(["off", "on"]),
        "max_attempts": 1,
        "output_dir": f"out/{random.choice('xy')}",
        "runs_dir": random.choice(["./runs", "./other runs"]),
    }


def draw_fault(random: Random, steps: int) -> str:
    """Return a fault that ends the run at a stage from its start to its promotion."""
    end = random.choice(["kill", "error", "exit", "term"])
    return random.choice(
        [
            f"{end}@point=journal.appended:hit={random.randrange(1, JOURNAL_LINES)}",
            f"{random.choice(['kill', 'exit', 'nan'])}@step={random.randrange(1, steps + 1)}",
            f"{end}@point={random.choice(['step.done', 'evaluation.logged', 'evaluation.marked'])}",
            f"{end}@point=checkpoint.{random.choice(['committed', 'pruned'])}",
            f"{end}@point=training.over",
            f"{end}@point={random.choice(['version.created', 'move.begun', 'move.prepared'])}",
            f"{end}@point=move.made",
            f"{random.choice(['error', 'full'])}@point=folder.filled",
            f"{random.choice(['error', 'full'])}@point=folder.listed",
        ]
    )


@dataclass
class Case:
    """One run with drawn settings, and what became of it."""

    number: int
    fault: str
    settings: dict[str, Any]
    undisturbed: RunDir
    stage: str = ""
    problems: list[str] = field(default_factory=list)


class Project:
    """A project folder with servers of its own, and its commands.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("configs", "prefect.yaml"):
            source = ROOT / "deployments" / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            (root / "deployments").mkdir(exist_ok=True, parents=True)
            copy(source, root / "deployments" / part)
        (root / "flows").symlink_to(ROOT / "flows")
        self._write_data()
        self.stack = Stack(root, {"prefect": 4900, "mlflow": 5900})

    def command(self, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
        """Run `qwen3ft ARGUMENTS` with a planted fault."""
        return subprocess.run(
            [sys.executable, "-m", "qwen3ft", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
            | ({faults.VARIABLE: fault} if fault else {}),
            capture_output=True,
            text=True,
            timeout=CASE_SECONDS,
        )

    def train(self, settings: dict[str, Any], fault: str = "") -> tuple[RunDir | None, str]:
        """Train, and return the run, if it began, and what was printed."""
        path = self.root / f"{settings['name']}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        done = self.command("train", "--config", str(path), fault=fault)
        begun = (self.root / settings["runs_dir"]).glob("*/config.json")
        mine = [each for each in begun if json.loads(each.read_text())["name"] == settings["name"]]
        run = RunDir(mine[0].parent.resolve()) if mine else None
        return run, done.stdout + done.stderr

    def _write_data(self) -> None:
        lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
        (self.root / "data").mkdir()
        for place, name in enumerate("abc"):
            rows = map(json.loads, lines[place * ROWS : (place + 1) * ROWS])
            text = [json.dumps({"frage": r["question"], "antwort": r["answer"]}) for r in rows]
            (self.root / "data" / f"{name}.jsonl").write_text("\n".join(text), encoding="utf-8")


def printed_command(project: Project, run: RunDir, shown: str) -> list[str]:
    """Return the words after `qwen3ft` of the command that resumes the run, as it was printed.

    A process that was killed printed none; the command that any card would have holds then.
    """
    path = run.path / "card.md"
    texts = [shown, path.read_text(encoding="utf-8") if path.exists() else ""]
    for text in texts:
        found = re.search(rf"qwen3ft run --resume {re.escape(run.path.name)}[^\n`|]*", text)
        if found is not None:
            return shlex.split(found[0].replace("\\", ""))[1:]
    os.chdir(project.root)  # by which the command knows whether the folder is the usual one
    return shlex.split(run.resume_command)[1:]


def result_of(project: Project, run: RunDir) -> dict[str, Any]:
    """Return what must not depend on an interruption."""
    card = json.loads((run.path / "card.json").read_text(encoding="utf-8"))
    folder = project.root / str(card["adapter_path"])
    return {
        "outcome": card["outcome"],
        "scores": (card["base_score"], card["tuned_score"]),
        "losses": (card["held_out_loss_before"], card["held_out_loss_after"]),
        "adapter": sha256_file(folder / "adapter_model.safetensors"),
    }


def settings_problems(project: Project, run: RunDir, wanted: dict[str, Any]) -> list[str]:
    """Name the places in which a run's settings differ from those that were asked for."""
    expected = parse_config(wanted).model_dump(mode="json")
    card = json.loads((run.path / "card.json").read_text(encoding="utf-8"))
    adapter = project.root / str(card["adapter_path"]) / "provenance.json"
    places = {
        "config.json": json.loads(run.config.read_text(encoding="utf-8")),
        "the adapter": json.loads(adapter.read_text(encoding="utf-8"))["config"],
    }
    found = [
        f"{name} in {place}: {values.get(name)!r}, not {value!r}"
        for place, values in places.items()
        for name, value in expected.items()
        if _plain(name, values.get(name)) != _plain(name, value)
    ]
    parent = services.request_json(
        project.stack.layout().secret,
        f"{project.stack.layout().url('mlflow')}/api/2.0/mlflow/runs/get"
        f"?run_id={parent_run_id(run)}",
    )
    params = {item["key"]: item["value"] for item in (parent or {})["run"]["data"]["params"]}
    found += [
        f"{name} in MLflow: {params.get(name)!r}, not {str(value)!r}"
        for name, value in expected.items()
        if params.get(name) != str(value) and name != "runs_dir"
    ]
    return found


def _plain(name: str, value: Any) -> Any:
    return str(Path(value).name) if name == "runs_dir" else value


def run_case(project: Project, case: Case) -> None:
    """Train interrupted, resume, and note what differs from the undisturbed run."""
    run, shown = project.train(case.settings, case.fault)
    if run is None:
        case.problems.append(f"the run did not begin: {shown[-500:]}")
        return
    case.stage = _stage(run) if ending_of(run) is None else NOT_INTERRUPTED
    command = printed_command(project, run, shown)
    done = project.command(*command)
    if done.returncode:
        case.problems.append(f"qwen3ft {shlex.join(command)}: {(done.stdout + done.stderr)[-500:]}")
        return
    wanted, found = result_of(project, case.undisturbed), result_of(project, run)
    case.problems += [
        f"{name}: {found[name]} after the interruption, {wanted[name]} without"
        for name in wanted
        if found[name] != wanted[name]
    ]
    case.problems += settings_problems(project, run, case.settings)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = project.command(*command)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    if "already completed" not in again.stdout or after != before:
        case.problems.append(f"resumed once more: {(again.stdout + again.stderr)[-300:]}")


def _stage(run: RunDir) -> str:
    """Return the stage that the run had got to, by its files."""
    if (run.path / "jobs" / "inference" / "outcome.json").exists():
        return "promote"
    if any(job.outcome.exists() for job in run.attempts()):
        return "save or inference"
    if run.attempts():
        return "train"
    jobs = sorted(path.name for path in (run.path / "jobs").glob("*"))
    return jobs[-1] if jobs else "environment"


def main() -> int:
    """Run the campaign; print and store what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1, help="cases at the same time")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="end after this long")
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="qwen3ft-resume-"))).resolve()
    until = time.monotonic() + 60 * options.minutes
    cases = campaign(work, options.runs, options.seed, until, options.lanes)
    good = sum(not case.problems for case in cases)
    stages = Counter(case.stage for case in cases)
    print(f"{good} of {len(cases)} runs ended as undisturbed; interrupted at: {dict(stages)}")
    if options.out:
        shown = [{"fault": c.fault, "stage": c.stage, "problems": c.problems} for c in cases]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)  # without that of the servers
        result = {"runs": len(cases), "good": good, "seed": options.seed, "stages": dict(stages)}
        result["cpu_seconds"] = round(used.ru_utime + used.ru_stime)
        write_json(options.out, {"machine": machine(), **result, "cases": shown})
    return 0 if good == len(cases) else 1


def campaign(work: Path, runs: int, seed: int, until: float, lanes: int = 1) -> list[Case]:
    """Run cases until there are enough or the time `until` has come."""
    project, cases = Project(work), list[Case]()

    def is_over() -> bool:
        return time.monotonic() > until or len(cases) >= runs

    def lane(settings_number: int) -> None:
        if is_over():
            return
        for case in cases_of(project, seed, settings_number):
            if is_over():
                return
            if not case.problems:
                run_case(project, case)
            cases.append(case)
            end = "; ".join(case.problems) or "as undisturbed"
            print(f"{case.number:4d} {case.fault} ({case.stage}): {end}", flush=True)

    try:
        project.stack.up()
        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(lane, range(-(-runs // CASES_OF_SETTINGS))))
    finally:
        project.stack.down()
    return sorted(cases, key=lambda case: case.number)


def cases_of(project: Project, seed: int, settings_number: int) -> Iterator[Case]:
    """Draw settings, train them undisturbed, and yield the cases to compare with that."""
    random = Random(f"{seed} {settings_number}")
    settings = draw_settings(random)
    undisturbed, shown = project.train({**settings, "name": f"reference-{settings_number}"})
    for number in range(CASES_OF_SETTINGS):
        name = f"case-{settings_number}-{number}"
        case = Case(
            settings_number * CASES_OF_SETTINGS + number,
            draw_fault(random, settings["max_steps"]),
            {**settings, "name": name},
            undisturbed or RunDir(project.root),
        )
        if undisturbed is None or not (undisturbed.path / "card.json").exists():
            case.problems.append(f"the undisturbed run did not end: {shown[-500:]}")
        yield case


if __name__ == "__main__":
    sys.exit(main())
