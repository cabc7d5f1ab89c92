"""Runs that nobody executes: where the settings of one that has begun are looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.orphans import has_begun

ELSEWHERE = {"parameters": {"config": {"model_name": "embedded", "runs_dir": "elsewhere"}}}


@pytest.mark.parametrize(
    ("deployment", "given", "folder"),
    [
        (None, {}, "runs"),
        ({"parameters": {"config": {}}}, {"config": {"runs_dir": "mine"}}, "mine"),
        (ELSEWHERE, {"config": {"num_epochs": 2}}, "elsewhere"),
        (ELSEWHERE, {"config": {"runs_dir": "mine"}}, "mine"),
        (ELSEWHERE, {"config": {"model_name": "Qwen/Qwen3-4B"}}, "runs"),
    ],
)
def test_a_run_has_begun_if_its_settings_lie_where_the_flow_puts_them(
    tmp_path: Path, deployment: dict[str, Any] | None, given: dict[str, Any], folder: str
) -> None:
    """What a run was not given is the deployment's, unless it is for another model."""
    run = {"id": "r1", "parameters": given}
    assert not has_begun(tmp_path, run, deployment)
    path = tmp_path / folder / "r1" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert has_begun(tmp_path, run, deployment)
