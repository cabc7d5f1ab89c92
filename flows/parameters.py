"""Settings of a run of the deployment: what was given, over those that the deployment starts from.

Prefect merges parameters one level deep, so that `config={"num_epochs": 2}` alone would take the
place of all settings of the deployment. The form, the command line and the API mean the same: what
they do not give is the deployment's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import deployment

from qwen3ft.config import TrainingConfig, merge_settings, parse_config


def over_deployment(
    given: TrainingConfig | Mapping[str, Any] | None, deployment_id: UUID | str | None = None
) -> TrainingConfig:
    """Return the settings of a run.

    Args:
        given: Value of the run's parameter `config`.
        deployment_id: Deployment of the run; by default that of this process's flow run.

    Raises:
        ConfigError: a setting is invalid.
        httpx.HTTPError: the Prefect server did not answer.
    """
    if isinstance(given, TrainingConfig):
        given = given.model_dump(mode="json", exclude_unset=True)
    return parse_config(
        merge_settings(deployment_settings(deployment_id or deployment.id), given or {})
    )


def deployment_settings(deployment_id: UUID | str | None) -> Mapping[str, Any]:
    """Return the settings that runs of a deployment start from; none without one."""
    if deployment_id is None:  # called in a process, not by a worker
        return {}
    with get_client(sync_client=True) as client:
        found = client.read_deployment(UUID(str(deployment_id)))
    settings = found.parameters.get("config")
    return settings if isinstance(settings, dict) else {}
