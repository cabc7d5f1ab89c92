"""Prefect's process worker, as runs of this stack need it.

`python -m deployments.prefect_worker worker start` takes the same arguments as `prefect`.

It runs what the deployment says and nothing else: a request for a run cannot name a command, an
environment or a folder (`job_variables`). And it ends runs whose process is gone without having
reported its end, which would keep the deployment's one slot for ever.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anyio
from prefect.cli import app
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from deployments.orphans import OrphanSweep
from deployments.stack import Stack
from qwen3ft.errors import ConfigError

TEMPLATE: dict[str, Any] = {
    "job_configuration": {"command": None, "env": {}, "working_dir": None, "stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""Base job template of the pool: all of it is fixed, and the server refuses variables."""


class FixedJob(ProcessJobConfiguration):
    """Start of a run: always the same way."""

    @classmethod
    async def from_template_and_values(
        cls,
        base_job_template: dict[str, Any],  # noqa: ARG003
        values: dict[str, Any],
        client: PrefectClient | None = None,  # noqa: ARG003
    ) -> FixedJob:
        """Return the job of `TEMPLATE`, whatever template the server has.

        Raises:
            ConfigError: the run or its deployment sets job variables.
        """
        if values:
            raise ConfigError(
                f"The run sets job variables: {', '.join(sorted(values))}.",
                why="With them a request could run any command on this machine.",
                next_command="qwen3ft deploy",
            )
        return cls.model_validate(TEMPLATE["job_configuration"])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Prefect warns that its own class is replaced

    class StackWorker(ProcessWorker):
        """Worker of the stack in the working folder; the only one of its pool."""

        type = "process"
        job_configuration = FixedJob
        _sweep = OrphanSweep()

        @classmethod
        def get_default_base_job_template(cls) -> dict[str, Any]:
            """Return the template that the pool is made with."""
            return TEMPLATE

        async def sync_with_backend(self) -> None:
            """Report to the server, every 30 s, and look for runs that nobody executes."""
            await super().sync_with_backend()
            if self.work_pool.base_job_template != TEMPLATE:  # made before, or changed since
                update = WorkPoolUpdate(base_job_template=TEMPLATE)
                await self.client.update_work_pool(self.work_pool.name, update)
            starting = {str(run_id) for run_id in self._submitting_flow_run_ids}
            layout = Stack(Path.cwd()).layout()
            await anyio.to_thread.run_sync(self._sweep.repeat, layout, starting)


if __name__ == "__main__":
    app()
