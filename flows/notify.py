"""Who is told how a run ended: Prefect blocks that the settings name, in bounded time.

A block is whatever notifies (`slack-webhook/ops`, `e-mail/ops`, ...) or a `webhook/ops`, which gets
the notice as JSON. It lives on the Prefect server with its secrets; the settings hold its name
alone. Whatever a block does, it neither fails a run nor delays it by more than `TELL_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from qwen3ft import logs
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.errors import ConfigError
from qwen3ft.records.base import Record

logger = logs.get_logger("notify")

TELL_SECONDS = 15.0
"""How long all blocks together are waited for."""

MOST_CHARACTERS = 2000
"""Of a message; chat services refuse or cut longer ones."""

Event = Literal["promoted", "kept", "deferred", "failed"]

_WORKS_IN: dict[str, str] = {}
"""Flow runs of this process, and the run whose folder each works in."""


class EmailNotification(AppriseNotificationBlock):
    """Sends mail by SMTP; the address is Apprise's: mailtos://USER:PASSWORD@HOST?to=ADDRESS."""

    _block_type_name = "E-mail"
    _block_type_slug = "e-mail"


class Notice(Record):
    """What is told; a webhook receives it as it is."""

    event: Event
    run_id: str
    model: str
    message: str
    prefect_url: str | None = None
    mlflow_url: str | None = None

    @property
    def subject(self) -> str:
        """One line."""
        return f"qwen3ft: {self.model} {self.event}"

    @property
    def body(self) -> str:
        """The message and where to look."""
        lines = (self.message[:MOST_CHARACTERS], self.prefect_url, self.mlflow_url)
        return "\n".join(line for line in lines if line)


def tell(config: TrainingConfig, notice: Notice, load: Callable[[str], Any] = Block.load) -> None:
    """Tell every block of the settings; what goes wrong is logged.

    Args:
        config: Names the blocks, and what they want to be told of.
        notice: What is told.
        load: Gives the block of a name.
    """
    if notice.event not in config.notify_on:
        return
    # The copied context holds Prefect's settings, and with them the server's address.
    context = contextvars.copy_context()
    work = threading.Thread(
        target=context.run, args=(_tell_all, load, config.notify_blocks, notice), daemon=True
    )
    work.start()
    work.join(TELL_SECONDS)
    if work.is_alive():
        logger.warning("not everybody was told within %.0f s", TELL_SECONDS)


def works_in(flow_run_id: str, run_id: str) -> None:
    """Say which run a flow run does, so that what is told of its failure names that one."""
    _WORKS_IN[flow_run_id] = run_id


def tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Prefect's hook for a run that failed or crashed."""
    config = _config_of(flow_run.parameters)
    if config is None:
        return
    message = (state.message or state.name or "").removeprefix(
        "Flow run encountered an exception: "
    )
    tell(
        config,
        Notice(
            event="failed",
            run_id=_WORKS_IN.get(str(flow_run.id))
            or str(flow_run.parameters.get("continue_run") or flow_run.id),
            model=config.model_name,
            message=message,
        ),
    )


def _config_of(parameters: Mapping[str, Any]) -> TrainingConfig | None:
    """The settings among a run's parameters; None if they are what it failed of."""
    given = parameters.get("config")
    if given is None or isinstance(given, TrainingConfig):
        return given or TrainingConfig()
    try:
        return parse_config(given)
    except ConfigError:
        return None


def _tell_all(load: Callable[[str], Any], names: Sequence[str], notice: Notice) -> None:
    """One after another: Prefect's webhooks share a connection pool that knows one event loop."""
    for name in names:
        try:
            sending = asyncio.wait_for(_send(load(name), notice), TELL_SECONDS / (len(names) + 1))
            asyncio.run(sending)
        except Exception as error:  # noqa: BLE001  whatever a block of others raises: it fails no run
            reason = logs.mask_secrets(str(error) or type(error).__name__)
            logger.warning("%s did not take the notice: %s", name, reason)


async def _send(block: Block, notice: Notice) -> None:
    if isinstance(block, Webhook):
        answer = await block.call(notice.model_dump(mode="json"))
        answer.raise_for_status()
    elif isinstance(block, NotificationBlock):
        await block.notify(notice.body, notice.subject)
    else:
        raise TypeError(f"a {type(block).__name__} cannot notify")
