"""A cancelled run ends with a card, and says how to go on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from support.cancellation import CONFIG, LIMIT_SECONDS, TrainProject, wait_for
from support.reported_run import make_facts

from qwen3ft.operations.run_state import ending_of
from qwen3ft.report.build import build_card
from qwen3ft.tracking.run_metrics import card_tags


@pytest.mark.parametrize("stages", [{}, {"environment": 1.0}, {"environment": 1.0, "train": 9.0}])
def test_a_cancelled_run_has_a_verdict_and_the_resume_line(stages: dict[str, float]) -> None:
    """Whatever it had got to; it has no error."""
    nothing: dict[str, Any] = {"verdict": None, "report": None, "saved": None, "trained": None}
    facts = make_facts(**nothing, cancelled_by="SIGTERM", seconds_by_stage=stages)
    card = build_card(facts)
    assert (card.outcome, card.failure) == ("cancelled", None)
    assert card.verdict.startswith("cancelled by SIGTERM")
    assert ("stage train" in card.verdict) == ("train" in stages)
    assert "qwen3ft run --resume night-1" in [step.command for step in card.next_steps]
    assert card_tags(card)["verdict"] == "cancelled"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_a_training_with_a_card(
    tmp_path: Path, number: signal.Signals
) -> None:
    """MLflow has it as killed, with the verdict; the terminal shows the command that resumes it."""
    from mlflow import MlflowClient

    from qwen3ft.tracking.cursor import parent_run_id

    project = TrainProject(tmp_path)
    process = project.start("train", "--config", CONFIG, fault="hang@step=3")
    wait_for(lambda: any(tmp_path.glob("runs/*/attempts/01/metrics.jsonl")), process)
    process.send_signal(number)
    printed = "".join(process.communicate(timeout=LIMIT_SECONDS))
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    [run] = project.runs()
    assert f"qwen3ft run --resume {run.path.name}" in printed
    card = json.loads((run.path / "card.json").read_text())
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert card["verdict"] == f"cancelled by {name} during the stage train; it can be resumed"
    assert f"qwen3ft run --resume {run.path.name}" in (run.path / "card.md").read_text()
    assert ending_of(run) is None
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    parent = client.get_run(parent_run_id(run))
    assert (parent.info.status, parent.data.tags["verdict"]) == ("KILLED", "cancelled")
