"""Notifications of how a run ended, through the Prefect blocks that the settings name.

A block is any notifier (`slack-webhook/ops`, `e-mail/ops`, ...) or a `webhook/ops`, which receives
the notice as JSON. It lives on the Prefect server with its secrets; the settings hold its name
alone. A block neither fails a run nor delays it by more than `NOTIFY_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectException
from prefect.flows import Flow

from flows.parameters import over_deployment
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError
from qwen3ft.records.base import Record
from qwen3ft.text.plain import escaped

logger = logs.get_logger("notify")

NOTIFY_SECONDS = 15.0
"""Longest wait for all blocks together."""

MOST_CHARACTERS = 2000
"""Longest message; chat services refuse or cut longer ones."""

Event = Literal["promoted", "kept", "deferred", "failed"]

_RUNS: dict[str, tuple[str, TrainingConfig]] = {}
"""Id and settings of the run that each flow run of this process executes."""


class EmailNotification(AppriseNotificationBlock):
    """Sends mail by SMTP; the address is Apprise's: mailtos://USER:PASSWORD@HOST?to=ADDRESS."""

    _block_type_name = "E-mail"
    _block_type_slug = "e-mail"


class Notice(Record):
    """A notification; a webhook receives it as JSON."""

    event: Event
    run_id: str
    model: str
    message: str
    prefect_url: str | None = None
    mlflow_url: str | None = None

    @property
    def subject(self) -> str:
        """Subject line."""
        return f"qwen3ft: {self.model} {self.event}"

    @property
    def body(self) -> str:
        """Message and links."""
        lines = (self.message[:MOST_CHARACTERS], self.prefect_url, self.mlflow_url)
        return "\n".join(line for line in lines if line)


def send_notice(
    config: TrainingConfig, notice: Notice, load: Callable[[str], Any] = Block.load
) -> None:
    """Send the notice to every block of the settings; errors are logged.

    Args:
        config: Names the blocks and the outcomes to send.
        notice: The notification.
        load: Returns the block of a name.
    """
    if notice.event not in config.notify_on:
        return
    # the copied context has Prefect's settings, and with them the server's address
    context = contextvars.copy_context()
    work = threading.Thread(
        target=context.run, args=(_send_all, load, config.notify_blocks, notice), daemon=True
    )
    work.start()
    work.join(NOTIFY_SECONDS)
    if work.is_alive():
        logger.warning("not every notification was sent within %.0f s", NOTIFY_SECONDS)


def record_run(flow_run_id: str, run_id: str, config: TrainingConfig) -> None:
    """Record which run a flow run executes, so that its failure notice is that run's."""
    _RUNS[flow_run_id] = run_id, config


def notify_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Notify of a run that failed or crashed (a hook for Prefect)."""
    asked = str(flow_run.parameters.get("continue_run") or flow_run.id)
    run_id, config = _RUNS.get(str(flow_run.id), (asked, _config_of(flow_run)))
    if config is None:
        return
    message = (state.message or state.name or "").removeprefix(
        "Flow run encountered an exception: "
    )
    send_notice(
        config,
        Notice(
            event="failed",
            run_id=run_id,
            model=config.model_name,
            message=escaped(logs.mask_secrets(message)),  # of any exception
        ),
    )


def _config_of(flow_run: FlowRun) -> TrainingConfig | None:
    """Return the settings of a run; None if they are invalid or the server does not answer."""
    try:
        return over_deployment(flow_run.parameters.get("config"), flow_run.deployment_id)
    except (ConfigError, httpx.HTTPError, PrefectException, OSError) as error:
        logger.warning("nobody is notified: %s", error)
        return None


def _send_all(load: Callable[[str], Any], names: Sequence[str], notice: Notice) -> None:
    # one after another: Prefect's webhooks share a connection pool bound to one event loop
    for name in names:
        try:
            sending = asyncio.wait_for(_send(load(name), notice), NOTIFY_SECONDS / (len(names) + 1))
            asyncio.run(sending)
        except Exception as error:  # noqa: BLE001  no block may fail a run
            reason = logs.mask_secrets(str(error) or type(error).__name__)
            logger.warning("%s did not accept the notification: %s", name, reason)


async def _send(block: Block, notice: Notice) -> None:
    if isinstance(block, Webhook):
        answer = await block.call(notice.model_dump(mode="json"))
        answer.raise_for_status()
    elif isinstance(block, NotificationBlock):
        await block.notify(notice.body, notice.subject)
    else:
        raise TypeError(f"a {type(block).__name__} cannot notify")
