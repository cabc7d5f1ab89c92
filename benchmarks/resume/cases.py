"""One case: settings, a fault, and what differs between the resumed run and an undisturbed one."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.resume.project import Project
from deployments import services
from qwen3ft.config import parse_config
from qwen3ft.disk.files import sha256_file
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.run_state import ending_of
from qwen3ft.tracking.cursor import outstanding, parent_run_id
from qwen3ft.tracking.journal import journal_path

CASES_OF_SETTINGS = 2
"""Cases that are compared with one undisturbed run, which takes half as long as one of them."""

NOT_INTERRUPTED = "none"
"""Stage of a run whose fault lay where it did not get to."""

_SHORT_STEPS = (4, 7)
_LONG_STEPS = 30
"""Optimizer steps after which most adapters are promoted, if every answer is the same."""


def draw_settings(random: Random) -> dict[str, Any]:
    """Return settings: small enough to train in seconds, and not the defaults."""
    rank = random.choice([2, 4, 8])
    batch = random.choice([(4, 2), (8, 1), (2, 4), (8, 2)])
    short = random.randint(*_SHORT_STEPS), random.choice([1, 2, 3]), random.choice("abc")
    long = _LONG_STEPS, random.choice([6, 8]), "same"
    steps, every, data = random.choice([short, long])
    return {
        "model_name": "embedded",
        "data_paths": [f"data/{data}.jsonl"],
        "columns": {"question": "frage", "answer": "antwort"},
        "seed": random.randrange(1, 1000),
        "learning_rate": random.choice([2e-3, 4e-3, 6e-3]),
        "lora_r": rank,
        "lora_alpha": random.choice([1, 2, 4]) * rank,
        "batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "max_steps": steps,
        "evaluate_every_steps": every,
        "lr_scheduler": random.choice(["cosine", "linear"]),
        "warmup_fraction": random.choice([0.1, 0.2]),
        "weight_decay": random.choice([0.01, 0.1]),
        "max_grad_norm": random.choice([0.5, 2.0]),
        "early_stopping_patience": random.choice([2, 4]),
        "keep_checkpoints": random.choice([3, 4]),
        "max_sequence_length": random.choice([96, 128]),
        "held_out_fraction": random.choice([0.2, 0.25]),
        "near_duplicates": random.choice(["keep", "drop"]),
        "max_new_tokens": random.choice([12, 16]),
        "inference_rows": random.choice([20, 30]),
        "gate_min_rows": 10,
        "gate_confidence": random.choice([0.8, 0.9]),
        "max_ability_loss_rise": 8.0,
        "max_memory_gb": random.choice([3.0, 4.0]),
        "preflight": random.choice(["off", "off", "on"]),
        "max_attempts": 1,
        "output_dir": f"out/{random.choice('xy')}",
        "runs_dir": random.choice(["./runs", "./other runs"]),
    }


def draw_fault(random: Random, undisturbed: RunDir) -> str:
    """Return a fault that ends a run like this one at a stage from its start to its promotion."""
    end = random.choice(["kill", "error", "exit", "term"])
    lines = len(journal_path(undisturbed).read_text(encoding="utf-8").splitlines())
    steps = _steps_of(undisturbed)
    faults = [
        # these are spread over all stages
        *(f"{end}@point=journal.appended:hit={random.randrange(1, lines)}" for _ in range(3)),
        f"{random.choice(['kill', 'exit', 'nan'])}@step={random.randint(1, steps)}",
        f"{end}@point=step.done:hit={random.randint(1, steps)}",
        f"{end}@point={random.choice(['evaluation.logged', 'evaluation.marked'])}",
        f"{end}@point=checkpoint.committed",
        f"{end}@point=training.over",
        f"{end}@point=answers.begun",
        f"{end}@point=version.created",
        f"{random.choice(['error', 'full', 'kill'])}@point=folder.filled",
        f"{random.choice(['error', 'full', 'kill'])}@point=folder.listed",
    ]
    if _card(undisturbed)["outcome"] == "promoted":
        moves = random.sample(["move.begun", "move.prepared", "move.made"], 2)
        faults += [f"{end}@point={move}" for move in moves]
    return random.choice(faults)


@dataclass
class Case:
    """One run with drawn settings, and what became of it."""

    number: int
    fault: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    outcome: str = ""
    resumed_with: str = ""
    problems: list[str] = field(default_factory=list)
    evidence: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return the case as JSON values; its settings and evidence only if it failed."""
        shown = {
            "number": self.number,
            "fault": self.fault,
            "stage": self.stage,
            "outcome": self.outcome,
            "resumed_with": self.resumed_with,
            "problems": self.problems,
        }
        if self.problems:
            shown |= {"settings": self.settings, "evidence": self.evidence}
        return shown


def cases_of(project: Project, seed: int, settings_number: int) -> Iterator[Case]:
    """Draw settings, train them undisturbed, and yield the cases, each compared with that.

    Raises:
        TimeIsUpError: the campaign ended first.
    """
    random = Random(f"{seed} {settings_number}")
    settings = draw_settings(random)
    began = project.commands_so_far
    undisturbed, shown = project.train({**settings, "name": f"reference-{settings_number}"})
    is_whole = undisturbed is not None and ending_of(undisturbed) is not None
    for place in range(CASES_OF_SETTINGS):
        case = Case(settings_number * CASES_OF_SETTINGS + place)
        case.settings = {**settings, "name": f"case-{settings_number}-{place}"}
        if undisturbed is None or not is_whole:
            case.problems.append(f"the undisturbed run did not end: {shown[-500:]}")
            case.evidence = project.evidence(undisturbed, began)
        else:
            case.fault = draw_fault(random, undisturbed)
            run_case(project, case, undisturbed)
        yield case


def run_case(project: Project, case: Case, undisturbed: RunDir) -> None:
    """Train interrupted, resume, and note what differs from the undisturbed run.

    Raises:
        TimeIsUpError: the campaign ended first.
    """
    began = project.commands_so_far
    run, shown = project.train(case.settings, case.fault)
    if run is None:
        case.problems.append(f"the run did not begin: {shown[-500:]}")
    else:
        case.stage = stage_of(run)
        try:
            case.problems += _resume(project, case, run, shown, undisturbed)
        except (KeyError, OSError, TypeError, ValueError) as error:  # a record that is not there
            case.problems.append(f"what the run left cannot be read: {error!r}")
    if case.problems:
        case.evidence = project.evidence(run, began)


def _resume(
    project: Project, case: Case, run: RunDir, shown: str, undisturbed: RunDir
) -> list[str]:
    """Resume a run as printed, twice, and name what is not as it should be."""
    command = project.printed_command(run, shown)
    case.resumed_with = shlex.join(["qwen3ft", *command])
    done = project.command(*command)
    if done.status:
        return [f"{case.resumed_with} ended with {done.status}: {done.output[-500:]}"]
    if outstanding(run):
        project.command("sync")  # as the run's last line says
    case.outcome = _card(run)["outcome"]
    wanted, found = result_of(project, undisturbed), result_of(project, run)
    problems = [
        f"{name}: {found[name]} after the interruption, {wanted[name]} without"
        for name in wanted
        if found[name] != wanted[name]
    ]
    problems += settings_problems(project, run, case.settings, changed_by(command))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = project.command(*command)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    if "already completed" not in again.output or after != before:
        problems.append(f"resumed once more: {again.output[-300:]}")
    return problems


def result_of(project: Project, run: RunDir) -> dict[str, Any]:
    """Return what must not depend on an interruption."""
    card = _card(run)
    folder = project.root / str(card["adapter_path"])
    plan = {line["name"]: line["value"] for line in card["plan"]["settings"]}
    return {
        "outcome": card["outcome"],
        "scores": (card["base_score"], card["tuned_score"]),
        "losses": (card["held_out_loss_before"], card["held_out_loss_after"]),
        "settings on the card": plan,
        "adapter": sha256_file(folder / "adapter_model.safetensors"),
    }


def changed_by(command: list[str]) -> dict[str, str]:
    """Return the settings that a printed command changes, such as the folder of a full disk."""
    pairs = itertools.pairwise(command)
    changes = [word.partition("=") for before, word in pairs if before == "--set"]
    return {name: value for name, _, value in changes}


def settings_problems(
    project: Project, run: RunDir, wanted: dict[str, Any], changes: dict[str, str]
) -> list[str]:
    """Name the places in which a run's settings differ from those that were asked for."""
    expected = parse_config({**wanted, **changes}).model_dump(mode="json")
    adapter = project.root / str(_card(run)["adapter_path"]) / "provenance.json"
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
    layout = project.stack.layout()
    address = f"{layout.url('mlflow')}/api/2.0/mlflow/runs/get?run_id={parent_run_id(run)}"
    parent = services.request_json(layout.secret, address)
    if parent is None:
        return [*found, f"MLflow does not have the run: {address}"]
    params = {item["key"]: item["value"] for item in parent["run"]["data"]["params"]}
    return found + [
        f"{name} in MLflow: {params.get(name)!r}, not {str(value)!r}"
        for name, value in expected.items()
        # MLflow's parameters never change; a tag has the changes
        if params.get(name) != str(value) and name not in {"runs_dir", *changes}
    ]


def stage_of(run: RunDir) -> str:
    """Return the stage that an interrupted run had got to, by its files."""
    if ending_of(run) is not None:
        return NOT_INTERRUPTED
    if (run.path / "jobs" / "inference" / "outcome.json").exists():
        return "promote"
    if (run.path / "jobs" / "inference").exists():
        return "inference"
    if any(job.outcome.exists() for job in run.attempts()):
        return "save"
    if run.attempts():
        return "train"
    jobs = sorted(path.name for path in (run.path / "jobs").glob("*"))
    return jobs[-1] if jobs else "environment"


def _card(run: RunDir) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((run.path / "card.json").read_text(encoding="utf-8"))
    return card


def _steps_of(run: RunDir) -> int:
    """Return the optimizer steps that a run made."""
    lines = run.attempts()[-1].metrics.read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["step"]) for line in lines)


def _plain(name: str, value: Any) -> Any:
    return str(Path(value).name) if name == "runs_dir" else value
