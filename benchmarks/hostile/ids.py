"""Hostile ids and names, where they enter."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hostile.case import Case


def _no_artifact(inside: Path) -> None:
    (inside / "runs").mkdir()


def _resume(run_id: str) -> Case:
    def open_it(inside: Path) -> str:
        from flows.run_context import open_run
        from qwen3ft.config import TrainingConfig

        with open_run(TrainingConfig(runs_dir=str(inside / "runs")), run_id, None):
            return ""

    return Case(f"resume-{run_id!r}", "id", _no_artifact, open_it, imports=("flows.run_context",))


CASES = (_resume("../../x/y"),)
