"""What is remembered of the stack, and what is said of it."""

from __future__ import annotations

from pydantic import Field

from deployments.processes import ProcessMark
from deployments.services import Service
from qwen3ft.records.base import Record

DEPLOYMENT = "qwen3-finetune/default"


class StackState(Record):
    """The content of stack.json; a port is 0 until it was chosen."""

    prefect_port: int = 0
    mlflow_port: int = 0
    pids: dict[Service, ProcessMark] = Field(default_factory=dict)
    started: float = Field(
        default=0.0, description="When a process was last started, since the epoch."
    )


class ServiceStatus(Record):
    """One process of the stack."""

    name: Service
    pid: int | None
    healthy: bool
    url: str | None
    log: str


class StackStatus(Record):
    """What runs, where, and whether the deployment is registered."""

    root: str
    up: bool
    prefect_url: str | None
    mlflow_url: str | None
    services: tuple[ServiceStatus, ...]
    deployment: str = DEPLOYMENT
    deployment_registered: bool = False
    schedule_active: bool = False
