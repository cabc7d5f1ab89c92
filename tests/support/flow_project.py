"""A project with servers of its own, and runs of the real flow that its pages show.

Tests of the flow and of the pages share one per session (see `tests/conftest.py`); their files go
to the same process of pytest-xdist.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.databases import place_databases

from deployments import services
from deployments.deploy import CPU_CONFIG, deploy
from deployments.prefect_api import read_deployment
from deployments.stack import Stack
from qwen3ft import faults
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import private_files
from qwen3ft.jobs.folders import RunDir
from qwen3ft.registry.registry import Registry

ROOT = Path(__file__).parents[2]
MODEL = "qwen3ft-embedded"
"""Registered model of runs with the embedded model."""


class FlowProject:
    """A project folder; its stack is for the caller to start.

    Args:
        root: An empty folder.
        make_config: Makes the config of a run short enough for a test.
    """

    def __init__(self, root: Path, make_config: Callable[..., Any]) -> None:
        self.root = root
        self._make_config = make_config
        shutil.copytree(ROOT / "deployments" / "configs", root / "deployments" / "configs")
        shutil.copy(ROOT / "deployments" / "prefect.yaml", root / "deployments")
        (root / "flows").symlink_to(ROOT / "flows")
        place_databases(root)
        self.stack = Stack(root, {"prefect": 4600, "mlflow": 5600})

    @property
    def tracking_uri(self) -> str:
        """Address of the project's MLflow."""
        return self.stack.layout().url("mlflow")

    @property
    def registry(self) -> Registry:
        """Registry of the project's adapters."""
        return Registry(self.tracking_uri)

    def config(self, **changes: Any) -> Any:
        """Return the config of a run in this project's folders."""
        folders = {"runs_dir": str(self.root / "runs"), "output_dir": str(self.root / "out")}
        short = {"max_steps": 6, "evaluate_every_steps": 2}
        return self._make_config(**{**folders, **short, **changes})

    def run(
        self,
        fault: str = "",
        continue_run: str | None = None,
        nightly: bool = False,
        **changes: Any,
    ) -> tuple[Any, RunDir]:
        """Run the flow in this process; return its final state and its folder."""
        from flows.finetune import qwen3_finetune

        with self.connected(), private_files(), pytest.MonkeyPatch.context() as patch:
            patch.setenv(faults.VARIABLE, fault)
            config = self.config(**changes) if continue_run is None else self._to_resume(**changes)
            state = qwen3_finetune(config, continue_run, nightly, return_state=True)
        run_id = continue_run or str(state.state_details.flow_run_id)
        return state, RunDir(self.root / "runs" / run_id)

    def _to_resume(self, **changes: Any) -> TrainingConfig:
        """Return what a person gives to resume a run: where it lies, and what is to change."""
        return TrainingConfig.model_validate({"runs_dir": str(self.root / "runs"), **changes})

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Let Prefect and MLflow in this process talk to the project's servers."""
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import (
            PREFECT_API_AUTH_STRING,
            PREFECT_API_URL,
            PREFECT_UI_URL,
            temporary_settings,
        )

        names = ("MLFLOW_TRACKING_URI", "NO_PROXY")
        values = services.environment(self.stack.layout(), os.environ)
        settings = (PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL)
        addresses = {setting: values[setting.name] for setting in settings}
        with temporary_settings(addresses), pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setenv(name, values[name])
            try:
                yield
            finally:  # or what they still hold goes to another server, or starts one
                EventsWorker.drain_all()
                APILogWorker.drain_all()

    def deploy(self, **changes: Any) -> dict[str, Any]:
        """Register a deployment whose runs have the config of `run(**changes)`; return it."""
        config = self.config(**changes).model_dump(mode="json")
        (self.root / CPU_CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            deploy(self.stack)
        found = read_deployment(self.stack.layout())
        assert found is not None
        return found


def promote_first(project: FlowProject) -> str:
    """Return the version in use; promote the first if six steps were too few to beat the base."""
    found = project.registry.champion(MODEL)
    if found is None:
        project.registry.promote(MODEL, "1", None)
    return found.version if found else "1"
