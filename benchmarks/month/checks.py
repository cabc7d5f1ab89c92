"""Invariants after every night, checked with MLflow's own client and on the files.

No code of qwen3ft decides here: champion, versions and moves are read from the registry, the
champion is downloaded and loaded with plain PEFT, rows are counted by their writer. The final state
of the flow must agree with all that.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.month.ask import Asker
from benchmarks.month.nights import BAD, GOOD, MACHINE_OFF, TRACKING_DOWN, TRAINED, Night
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.evaluation.gate import GatePolicy
from qwen3ft.records.run_card import ALREADY_DONE, NOTHING_NEW
from qwen3ft.registry.moves import MOVE_TAG_PREFIX

MODEL = "qwen3ft-embedded"
WEIGHTS = "adapter_model.safetensors"
SECOND_STARTS = (ALREADY_DONE, NOTHING_NEW)
LEAST_ANSWERED = 1 - GatePolicy().max_form_loss
"""Share of the questions that must be answered: the gate accepts a better adapter with this."""


@dataclass(frozen=True)
class RegistryState:
    """State of the registry at one moment.

    Attributes:
        champion: The version in use.
        runs: The run that made each version, by version.
        moves: Every promotion, oldest first.
    """

    champion: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    moves: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Prefect's records of a night.

    Attributes:
        runs: Flow runs, oldest first.
        folders: Run folders that the night made or may have resumed.
    """

    runs: list[dict[str, Any]]
    folders: list[Path]

    @property
    def worked(self) -> dict[str, Any] | None:
        """Flow run that ended the night's work: the last that is not a second start."""
        others = [run for run in self.runs if run["state_name"] not in SECOND_STARTS]
        ended = [run for run in others if run["state_type"] != "CRASHED"] or others
        return ended[-1] if ended else (self.runs[0] if self.runs else None)

    @property
    def verdict(self) -> str:
        """Outcome of the night: promoted, kept, deferred, failed, nothing new, or another state."""
        if (run := self.worked) is None:
            return "not started"
        if run["state_type"] != "COMPLETED":
            return str(run["state_type"]).lower()
        if run["state_name"] in SECOND_STARTS:
            return "nothing new" if run["state_name"] == NOTHING_NEW else "already done"
        return str((run.get("state") or {}).get("message") or "").partition(":")[0]


class Checker:
    """Reads the registry and tests the champion.

    Args:
        tracking_uri: Address of the month's MLflow server.
        questions: File of the month's test rows.
    """

    def __init__(self, tracking_uri: str, questions: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        self._questions = questions
        self._test_lines = len(questions.read_text(encoding="utf-8").splitlines())
        self._asker = Asker()
        self._answers: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        """End the asking process."""
        self._asker.close()

    def read_registry(self) -> RegistryState:
        """Return the current state of the registry."""
        models = self._client.search_registered_models(f"name='{MODEL}'")
        if not models:
            return RegistryState()
        model = self._client.get_registered_model(MODEL)
        versions = self._client.search_model_versions(f"name='{MODEL}'")
        moves = [
            json.loads(v)
            for tag, v in sorted(model.tags.items())
            if tag.startswith(MOVE_TAG_PREFIX)
        ]
        aliases = {alias: str(version) for alias, version in model.aliases.items()}
        return RegistryState(
            champion=aliases.get("champion"),
            runs={str(v.version): v.tags.get("run", "") for v in versions},
            moves=tuple(moves),
        )

    def check_champion(self, seen: RegistryState) -> tuple[float | None, list[str]]:
        """Return the share of the test that the champion answers right, and its problems."""
        if seen.champion is None:
            return None, []
        version = self._client.get_model_version(MODEL, seen.champion)
        with tempfile.TemporaryDirectory(prefix="qwen3ft-month-champion-") as folder:
            run_id = str(version.source).removeprefix("runs:/").partition("/")[0]
            fetched = Path(self._client.download_artifacts(run_id, "adapter", folder))
            digest = hashlib.sha256((fetched / WEIGHTS).read_bytes()).hexdigest()
            if digest != version.tags.get("adapter_sha256"):
                return None, [f"champion {seen.champion} has other bytes than its tag says"]
            found = self._answers.get(digest) or self._asker.ask(
                fetched, MODEL_DIR, self._questions
            )
        if "error" in found:
            return None, [f"champion {seen.champion} cannot be used: {found['error']}"]
        self._answers[digest] = found
        silent = found["answered"] < LEAST_ANSWERED
        return found["right"], [f"champion answers {found['answered']:.0%}"] if silent else []

    def check_rows(self, outcome: Outcome, written: tuple[int, int]) -> list[str]:
        """Check that every written line is accounted for and broken ones are quarantined."""
        plans = [path for run in outcome.folders for path in run.glob("attempts/01/plan.json")]
        problems = []
        for path in plans:
            data = json.loads(path.read_text(encoding="utf-8"))["dataset"]
            parts = ("test_rows", "quarantined", "too_long", "duplicates", "not_used")
            rows = sum(data[part] for part in parts) + data["train"]["rows"] + data["dev"]["rows"]
            lines, broken = written[0] + self._test_lines, written[1]
            if not data["rows_read"] == rows == lines:
                problems.append(f"{lines} lines, {data['rows_read']} read, {rows} accounted for")
            if data["quarantined"] != broken:
                problems.append(f"{broken} broken lines, {data['quarantined']} quarantined")
        return problems


def check_night(
    night: Night,
    overdue: Night | None,
    before: RegistryState,
    after: RegistryState,
    outcome: Outcome,
) -> list[str]:
    """Return what is wrong with how the night ended; an empty list if nothing is.

    Args:
        night: The planned night.
        overdue: The night before, if it was left undone and this one has to catch up.
        before: The registry before the night.
        after: The registry after it.
        outcome: Prefect's records of the night.
    """
    kind = overdue.kind if overdue else night.kind
    problems = _moves(before, after) + _versions(before, after, outcome)
    moved = after.champion != before.champion
    verdict = outcome.verdict
    if moved != (verdict == "promoted"):
        problems.append(
            f"verdict {verdict!r}, but the champion is {before.champion}->{after.champion}"
        )
    if moved and (kind not in GOOD or night.undone):
        problems.append(f"a {kind} night made {after.champion} the champion")
    expected = _expected(night, kind)
    if verdict not in expected:
        problems.append(f"ended {verdict!r} instead of {' or '.join(expected)}")
    problems += _starts(night, outcome)
    return problems


def _expected(night: Night, kind: str) -> tuple[str, ...]:
    if night.undone == MACHINE_OFF:
        return ("not started",)
    if night.undone == TRACKING_DOWN:
        return ("deferred",)
    if kind in GOOD:
        return ("promoted", "kept")
    if kind in TRAINED:
        return ("kept",)
    return ("failed",) if kind in BAD else ("nothing new", "already done")


def _moves(before: RegistryState, after: RegistryState) -> list[str]:
    """Check that the history grew by one promotion or none, complete and without duplicates."""
    problems = []
    moves = after.moves
    if moves[: len(before.moves)] != before.moves:
        problems.append("the history of promotions was rewritten")
    if [move["number"] for move in moves] != list(range(1, len(moves) + 1)):
        problems.append(f"moves are numbered {[move['number'] for move in moves]}")
    if any(move["state"] != "done" for move in moves):
        problems.append("a promotion was begun and not finished")
    versions = [move["version"] for move in moves]
    if len(set(versions)) != len(versions):
        problems.append(f"a version was promoted twice: {versions}")
    if [move["replaced"] for move in moves] != [None, *versions][: len(versions)]:
        problems.append("a promotion replaced another version than the champion")
    if (versions[-1] if versions else None) != after.champion:
        problems.append(f"champion {after.champion}, but the last promotion is of {versions[-1:]}")
    if len(moves) - len(before.moves) > 1:
        problems.append(f"{len(moves) - len(before.moves)} promotions in one night")
    return problems


def _versions(before: RegistryState, after: RegistryState, outcome: Outcome) -> list[str]:
    """Check that new versions belong to runs of this night, each once."""
    problems = []
    if lost := sorted(set(before.runs) - set(after.runs)):
        problems.append(f"versions {lost} are gone")
    if len(set(after.runs.values())) != len(after.runs):
        problems.append("a run's adapter was registered twice")
    folders = {folder.name for folder in outcome.folders}
    foreign = {v: r for v, r in after.runs.items() if v not in before.runs and r not in folders}
    return problems + [f"version {v} is of run {r}, not this night's" for v, r in foreign.items()]


def _starts(night: Night, outcome: Outcome) -> list[str]:
    """Check that the night trained once, however often it was started."""
    trained = [f for f in outcome.folders if any(f.glob("attempts/*/outcome.json"))]
    problems = [f"{len(trained)} runs trained"] if len(trained) > 1 else []
    idle = [run for run in outcome.runs if run["state_name"] in SECOND_STARTS]
    twice = [name for name in night.faults if name in ("double start", "second start")]
    if len(idle) < len(twice):
        problems.append(f"{len(twice)} more starts, {len(idle)} ended at once")
    return problems
