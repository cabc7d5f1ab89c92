"""Report a run as it goes: to its folder, its page in Prefect, and MLflow.

Data, plan and attempts are shown as they come, the card at the end. A run that fails or is
cancelled has one too.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

from deployments.services import RUN_TAB
from flows.naming import name_with_verdict, show_verdict
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import write_bytes_atomic
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.planning.table import run_table
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.attempts import attempt_rows, read_attempts, read_loss_curves
from qwen3ft.report.build import RunFacts, build_card
from qwen3ft.report.charts import memory_curves
from qwen3ft.report.data_section import data_markdown
from qwen3ft.report.figures import write_png
from qwen3ft.report.html import card_html
from qwen3ft.report.markdown import card_description, card_markdown
from qwen3ft.report.plan_section import plan_figure, plan_markdown
from qwen3ft.report.safe_text import escape_markdown
from qwen3ft.report.score_figure import SCORES_PICTURE
from qwen3ft.tracking.cursor import find_damaged_lines, read_state
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.points import attempts_memory
from qwen3ft.tracking.run_metrics import card_metrics, card_tags
from qwen3ft.tracking.uri import artifact_address, default_tracking_uri, run_url
from tasks import artifacts

logger = logs.get_logger("story")

CARD_FOLDER = "card"
"""Folder among a run's artifacts in MLflow."""

CANCELLED = (KeyboardInterrupt, TerminationSignal)
"""Exceptions by which a run is asked to end: Ctrl-C, SIGTERM, and Prefect's cancellation."""

MOST_DESCRIPTION_CHARACTERS = 5000
"""Longest card on the run's page in MLflow, which refuses longer tags."""


def page_url() -> str | None:
    """Return the URL of this run's page; None without a server."""
    url = flow_run.ui_url or ""
    if not url.startswith("http"):  # without a server it is "None/flow-..."
        return None
    return f"{url}?{RUN_TAB}"


def card_key() -> str:
    """Return the key of the card's artifact, which no other flow run has."""
    # Prefect takes lowercase letters, digits and dashes
    name = re.sub("[^a-z0-9]+", "-", f"{flow_run.name} {str(flow_run.id)[:8]}".lower())
    return f"{artifacts.RUN_CARD}-{name.strip('-')}"


def card_title(card: RunCard) -> str:
    """Return model and verdict as a line of markdown, by which lists of artifacts are read."""
    first, _, _ = card.verdict.partition("\n")
    return f"**{escape_markdown(card.model)}**, {escape_markdown(first)}"


class RunReporter:
    """Publisher of what is known of one run.

    Attributes:
        facts: What is known so far; stages add to it.
    """

    def __init__(self, run: RunDir, config: TrainingConfig) -> None:
        self.run = run
        self.facts = RunFacts(config, run.path.name)
        self.journal = Journal(run)
        _, changed = self.journal.settings_since_start(config.model_dump(mode="json"))
        self.facts.changed_settings = changed
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record how long the body takes as stage `name`, also if it fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = time.monotonic() - started

    def show_data(self, dataset: DatasetManifest, change: DataChange) -> None:
        """Show what is trained on, and what of it is new."""
        self.facts.dataset, self.facts.change = dataset, change
        markdown = data_markdown(dataset, change)
        artifacts.show_markdown(artifacts.DATA, markdown, "What is trained on")
        self.journal.dataset(dataset)
        self.journal.text("data.md", markdown)

    def show_plan(self, environment: EnvironmentReport, plan: TrainPlan) -> None:
        """Show the plan, its reasons and the memory that it is predicted to take."""
        table = run_table(self.facts.config, environment, plan)
        self.facts.plan, self.facts.table = plan, table
        markdown = plan_markdown(table)
        artifacts.show_markdown(artifacts.PLAN, markdown, table.headline)
        self.journal.text("plan.md", markdown)
        self.journal.json("plan.json", table.model_dump(mode="json"))
        self.journal.artifacts(write_png(plan_figure(table), self.run.path / "plan.png"), "")

    def show_attempts(self) -> None:
        """Show every attempt so far, with what changed and why."""
        attempts = read_attempts(self.run, attempts_memory(self.run))
        description = "Every training attempt: what changed before it, why, and what ended it"
        artifacts.show_table(artifacts.ATTEMPTS, attempt_rows(attempts), description)

    def publish(self) -> RunCard:
        """Publish the card of what is known now: on disk, on the run's page and in MLflow."""
        card = self._card()
        verdict = card.state_name.lower()
        markdown, html = card_markdown(card), card_html(card)
        write_record(self.run.path / "card.json", card)
        for name, text in (("card.md", markdown), ("card.html", html)):
            write_bytes_atomic(self.run.path / name, text.encode())
            self.journal.text(f"{CARD_FOLDER}/{name}", text)
        self.journal.json(f"{CARD_FOLDER}/card.json", card.model_dump(mode="json"))
        self.journal.metrics(card_metrics(card))
        drawn = (self.run.path / Path(SCORES_PICTURE).name).exists()
        picture = artifact_address(SCORES_PICTURE) if card.scores and drawn else None
        description = card_description(card, MOST_DESCRIPTION_CHARACTERS, picture)
        shown = {
            "mlflow.note.content": description,
            "mlflow.runName": name_with_verdict(verdict),  # what a list of runs shows
        }
        self.journal.tags({**card_tags(card), **shown})
        if card.mlflow_url:
            artifacts.show_link(artifacts.MLFLOW_RUN, card.mlflow_url, "This run in MLflow")
        # the newest artifact is the first on the run's page
        artifacts.show_markdown(card_key(), markdown, card_title(card))
        show_verdict(verdict, self.facts.config.model_name)
        logger.info("%s", card.verdict)
        return card

    def publish_end(self) -> None:
        """Publish the card of a run that ended without a verdict; errors are logged."""
        try:
            self.publish()
        except Exception as error:  # noqa: BLE001  it must not hide what ended the run
            logger.warning("the run has no card: %s: %s", type(error).__name__, error)

    def _card(self) -> RunCard:
        facts, memory = self.facts, attempts_memory(self.run)
        facts.attempts = read_attempts(self.run, memory)
        facts.loss, facts.memory = read_loss_curves(self.run), memory_curves(memory)
        facts.seconds_by_stage = self._seconds
        facts.damaged_lines = find_damaged_lines(self.run)
        url = run_url(default_tracking_uri(), read_state(self.run))
        return build_card(facts).model_copy(update={"prefect_url": page_url(), "mlflow_url": url})


@contextmanager
def reported(run: RunDir, config: TrainingConfig) -> Iterator[RunReporter]:
    """Yield the run's reporter; if the body fails or is cancelled, publish what is known.

    The exception of a cancelled run gets the command that resumes it as a note.
    """
    reporter = RunReporter(run, config)
    try:
        yield reporter
    except CANCELLED as signal_raised:
        reporter.facts.cancelled_by = _name_of(signal_raised)
        reporter.publish_end()
        # Prefect ends the process of a run that got SIGTERM, so nothing else can say it later.
        logger.warning("cancelled; to continue the run: %s", run.resume_command)
        signal_raised.add_note(run.resume_command)
        raise
    except Exception as error:  # whatever ended the run is on its card
        reporter.facts.error = error
        reporter.publish_end()
        raise


def _name_of(raised: BaseException) -> str:
    if isinstance(raised, TerminationSignal):
        return signal.Signals(raised.signal).name
    return "Ctrl-C"
