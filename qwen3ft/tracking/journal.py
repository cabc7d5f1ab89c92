"""The journal of tracking operations: what should be in MLflow, kept as plain files of the run.

One operation per line of `runs/<run_id>/tracking.jsonl`, in order. An attempt's own metrics stay
in the attempt's folder, which "attempt_started" refers to. Appending touches one local file only,
so it neither waits for MLflow nor fails because of it. A line survives a kill of the process; a
power cut may lose the last ones. Each has a checksum, so that a changed one is found and skipped
(`qwen3ft.tracking.checksums`). Secrets are masked before anything is written; files that it refers
to are sent as they are.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qwen3ft.disk.files import append_line, lines_from
from qwen3ft.faults import reach
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import mask_secrets, mask_values
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.plan import TrainPlan
from qwen3ft.tracking.checksums import add_checksum, find_change, has_checksums
from qwen3ft.units import gb

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
"""End of a run or an attempt, in MLflow's words."""

PARENT_RUN = "qwen3ft-parent-run-id"
"""Stands in tags for the id of the parent run, which MLflow gives out only when it is sent."""

_DIGEST_CHARACTERS = 36  # longest digest of a dataset that MLflow accepts


class Operation(BaseModel):
    """One line of the journal. Non-finite numbers are kept, as strings."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    time_ms: int = Field(default_factory=lambda: time.time_ns() // 1_000_000)


class RunStarted(Operation):
    """The parent run starts, or continues after a restart."""

    kind: Literal["run_started"] = "run_started"
    uid: str = Field(default_factory=lambda: uuid.uuid4().hex)
    name: str
    params: dict[str, str]
    tags: dict[str, str]


class RunFinished(Operation):
    """The parent run ended."""

    kind: Literal["run_finished"] = "run_finished"
    status: RunStatus


class AttemptStarted(Operation):
    """A child run starts; its metrics are read from the attempt's folder."""

    kind: Literal["attempt_started"] = "attempt_started"
    number: int
    params: dict[str, str]
    plan: str
    budget_gb: float
    predicted_gb: float


class AttemptEnded(Operation):
    """A child run ended; its figures are drawn now."""

    kind: Literal["attempt_ended"] = "attempt_ended"
    number: int
    status: RunStatus
    tags: dict[str, str]
    seconds: float | None = None  # by a clock that nobody sets; None if the run's process died


class Metrics(Operation):
    """Numbers on the parent run."""

    kind: Literal["metrics"] = "metrics"
    values: dict[str, float]
    step: int


class Tags(Operation):
    """Tags on the parent run; a later value replaces an earlier one.

    `PARENT_RUN` in a value becomes the run's id in MLflow when the tag is sent.
    """

    kind: Literal["tags"] = "tags"
    values: dict[str, str]


class DatasetInput(Operation):
    """The training rows as MLflow describes a dataset; source, schema and profile are JSON."""

    kind: Literal["dataset"] = "dataset"
    name: str
    digest: str
    source: str
    column_schema: str
    profile: str


class TextArtifact(Operation):
    """A small file whose content is in the journal itself."""

    kind: Literal["text"] = "text"
    path: str
    content: str


class Artifacts(Operation):
    """A local file or folder, read when it is sent."""

    kind: Literal["artifacts"] = "artifacts"
    local_path: str
    artifact_path: str


class Table(Operation):
    """A file of JSON lines, shown as a table."""

    kind: Literal["table"] = "table"
    local_path: str
    path: str


AnyOperation = Annotated[
    RunStarted
    | RunFinished
    | AttemptStarted
    | AttemptEnded
    | Metrics
    | Tags
    | DatasetInput
    | TextArtifact
    | Artifacts
    | Table,
    Field(discriminator="kind"),
]

_OPERATION: TypeAdapter[AnyOperation] = TypeAdapter(AnyOperation)


class Journal:
    """Appends operations to a run's `tracking.jsonl`; one writer per run, any number of threads.

    Every method raises OSError if the local disk does not take the line, and nothing else.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.path = journal_path(run_dir)

    def run_started(self, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Start the parent run, or continue it after a restart."""
        self._append(RunStarted(name=name, params=_texts(params), tags=_texts(tags)))

    def settings_since_start(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the settings that MLflow can hold as parameters, and those that changed, as text.

        MLflow keeps a parameter's first value for good, and refuses all that come with another.
        """
        first = _first_settings(self.path)
        now: dict[str, str] = mask_values(_texts(settings))
        changed = [name for name in first.keys() & now.keys() if first[name] != now[name]]
        kept = {name: value for name, value in settings.items() if _name(name) not in changed}
        return kept, "; ".join(f"{name}: {first[name]} -> {now[name]}" for name in sorted(changed))

    def run_finished(self, status: RunStatus) -> None:
        """End the parent run."""
        self._append(RunFinished(status=status))

    def attempt_started(self, plan: TrainPlan) -> None:
        """Start the child run `attempt-<n>`; its folder's metrics are followed from now on."""
        self._append(
            AttemptStarted(
                number=plan.attempt,
                params=_texts(flat_params(plan)),
                plan=_json(plan.model_dump(mode="json")),
                budget_gb=plan.max_memory_gb,
                predicted_gb=gb(plan.predicted_peak_bytes),
            )
        )

    def attempt_ended(
        self,
        number: int,
        status: RunStatus,
        tags: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """End a child run, once its worker writes no more; it took `seconds`, if that is known."""
        ended = AttemptEnded(number=number, status=status, tags=_texts(tags or {}), seconds=seconds)
        self._append(ended)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers on the parent run."""
        named = {_name(key): float(value) for key, value in values.items()}
        self._append(Metrics(values=named, step=step))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags on the parent run."""
        self._append(Tags(values=_texts(values)))

    def dataset(self, manifest: DatasetManifest) -> None:
        """Log the rows used as a dataset input with its digest."""
        self._append(describe_dataset(manifest))

    def text(self, path: str, content: str) -> None:
        """Put `content` at `path` of the parent's artifacts."""
        self._append(TextArtifact(path=path, content=content))

    def json(self, path: str, value: Any) -> None:
        """Put `value` as indented JSON at `path` of the parent's artifacts."""
        self.text(path, _json(value))

    def artifacts(self, local_path: Path, artifact_path: str) -> None:
        """Copy a folder's content (or one file) below `artifact_path`; it must stay until sent."""
        self._append(Artifacts(local_path=str(local_path.resolve()), artifact_path=artifact_path))

    def table(self, answers_path: Path, path: str = "inference/answers.json") -> None:
        """Show a file of JSON lines (one object a row) as a table; it must stay until sent."""
        self._append(Table(local_path=str(answers_path.resolve()), path=path))

    def _append(self, operation: Operation) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = operation.model_dump(mode="json")
        masked = {
            name: value if name == "local_path" else mask_values(value)  # a file that is sent
            for name, value in values.items()
        }
        line = operation.model_validate(masked).model_dump_json().encode()
        append_line(self.path, add_checksum(line))
        reach("journal.appended")


def parse_operation(line: bytes, *, sealed: bool) -> AnyOperation:
    """Parse one line.

    Args:
        line: With or without its newline.
        sealed: Whether every line of its journal has a checksum.

    Raises:
        ValueError: it is cut off, was changed, or is of a kind that this version does not know.
    """
    if change := find_change(line, expected=sealed):
        raise ValueError(change)
    try:
        return _OPERATION.validate_json(line)
    except ValidationError as error:
        raise ValueError(f"it cannot be read: {error.errors()[0]['msg']}") from None


def _first_settings(path: Path) -> dict[str, str]:
    sealed = has_checksums(path)
    for line in lines_from(path):
        with suppress(ValueError):  # damaged lines are named elsewhere
            if isinstance(operation := parse_operation(line.content, sealed=sealed), RunStarted):
                return operation.params
    return {}


def journal_path(run_dir: RunDir) -> Path:
    """Return the path of the run's journal."""
    return run_dir.path / "tracking.jsonl"


# --- values in the form that MLflow takes ---


def flat_params(plan: TrainPlan) -> dict[str, Any]:
    """Flatten the plan: `model.shape.hidden_size`, `predicted_gb.<part>`, ..."""
    whole = plan.model_dump(
        mode="json",
        exclude={
            "format_version": True,
            "predicted": True,
            "reasons": True,
            "dataset": {"sources", "reasons"},
        },
    )
    whole |= whole.pop("memory")  # parameters keep the names that runs have always had
    flat = dict(_flatten("", whole))
    flat["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    flat["predicted_gb.total"] = round(gb(plan.predicted_peak_bytes), 4)
    flat |= {f"predicted_gb.{part.name}": round(gb(part.bytes), 4) for part in plan.predicted}
    return flat


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else value


def describe_dataset(manifest: DatasetManifest) -> DatasetInput:
    """Describe the manifest as an MLflow dataset; the profile holds the whole digest."""
    columns = [
        {"type": "string", "name": name, "required": True} for name in manifest.columns.values()
    ]
    sources = [source.model_dump(mode="json") for source in manifest.sources]
    profile = manifest.model_dump(mode="json", exclude={"sources"})
    return DatasetInput(
        name="question-answer rows",
        digest=manifest.digest[:_DIGEST_CHARACTERS],
        source=json.dumps(mask_values({"uri": manifest.path, "sources": sources})),
        column_schema=json.dumps(mask_values({"mlflow_colspec": columns})),
        profile=json.dumps(mask_values(profile)),
    )


def _json(value: Any) -> str:
    """Return masked values as JSON; to mask the JSON could take its quotes for a part of a key."""
    return json.dumps(mask_values(value), indent=2, ensure_ascii=False, default=str)


def _name(text: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", text)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {_name(mask_secrets(key)): str(value) for key, value in values.items()}
