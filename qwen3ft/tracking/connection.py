"""The one module that imports MLflow: its calls, with its exceptions as errors of this project.

Every call raises TrackingUnavailableError (the same call may succeed later) or RejectedError (it
never will). Nothing is retried here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from qwen3ft.errors import FinetuneError, NotInMlflowError, RejectedError, TrackingUnavailableError
from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.tracking.experiment import EXPERIMENT_NAME, EXPERIMENT_TAGS, PEOPLES_TAG
from qwen3ft.tracking.journal import DatasetInput
from qwen3ft.tracking.uri import artifact_root, database_path

REQUEST_SECONDS = 15
"""Longest silence of one HTTP request to MLflow."""

SYSTEM_METRICS_SECONDS = 5
"""Time between two samples of MLflow's system metrics."""

_REJECTED = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "INVALID_STATE"}

_HOPELESS_STATUS = {400, 413, 422}  # of an upload: malformed or too large

_MOST_PER_REQUEST = {"params": 100, "tags": 100, "metrics": 1000}  # MLflow's limits

_log = get_logger("tracking")


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def load_client() -> Any:
    """Import MLflow's client class, configured for this process; variables set by hand stay."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the callers retry
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    for name, level in [  # outages are reported once, by the mirror
        ("mlflow", logging.WARNING),
        ("mlflow.system_metrics", logging.ERROR),
        ("mlflow.store.db.utils", logging.CRITICAL),  # prints a traceback for a locked database
    ]:
        logging.getLogger(name).setLevel(level)
    from mlflow import MlflowClient

    return MlflowClient


@contextmanager
def _translated(tracking_uri: str) -> Iterator[None]:
    """Turn whatever MLflow and the libraries below it raise into the two errors."""
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        raise _translate(tracking_uri, error) from error
    except FileNotFoundError as error:  # the local file to send is gone
        raise _rejected(error) from error
    except (OSError, SQLAlchemyError, CommandError, json.JSONDecodeError) as error:
        answer = getattr(error, "response", None)  # requests' errors are OSErrors
        hopeless = answer is not None and answer.status_code in _HOPELESS_STATUS
        raise (_rejected(error) if hopeless else _unavailable(tracking_uri, error)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise _rejected(error) from error


def _translate(tracking_uri: str, error: Any) -> FinetuneError:
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

    code, cause = str(error.error_code), error.__cause__
    # A damaged database also answers BAD_REQUEST; only data that it cannot store is hopeless.
    hopeless = not isinstance(cause, SQLAlchemyError) or isinstance(
        cause, DataError | IntegrityError
    )
    return _rejected(error) if hopeless and code in _REJECTED else _unavailable(tracking_uri, error)


def _rejected(error: BaseException) -> RejectedError:
    return RejectedError(
        f"MLflow refused the operation: {_brief(error)}",
        why="MLflow does not accept its content, so sending it again is useless.",
        next_command="qwen3ft status",
    )


def _unavailable(tracking_uri: str, error: BaseException) -> TrackingUnavailableError:
    is_unknown = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
    return (NotInMlflowError if is_unknown else TrackingUnavailableError)(
        f"MLflow at {mask_secrets(tracking_uri)} cannot do this now: {_brief(error)}",
        why="The server or database is down, locked, full or unreachable; training goes on.",
        next_command="qwen3ft sync",
    )


def _brief(error: BaseException) -> str:
    text = mask_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"


@dataclass
class Connection:
    """One MLflow and its experiment, made by `connect`; for one thread at a time."""

    tracking_uri: str
    client: Any
    experiment_id: str
    _repositories: dict[str, Any] = field(default_factory=dict)

    def has_run(self, run_id: str) -> bool:
        """Return True if this MLflow knows the run."""
        try:
            with self.calls() as client:
                client.get_run(run_id)
        except NotInMlflowError:
            return False
        return True

    def find_or_create_run(
        self, name: str, start_ms: int, identity: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """Return the id of the run with the tags `identity`, creating it if there is none."""
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        with _translated(self.tracking_uri):
            found = self.client.search_runs([self.experiment_id], wanted, max_results=1)
            run = found[0] if found else None
            if run is None:
                run = self.client.create_run(
                    self.experiment_id, start_ms, {**tags, **identity}, run_name=name
                )
        return str(run.info.run_id)

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        points: Sequence[Point] = (),
    ) -> None:
        """Set parameters (for good) and tags, and add metrics (a repeated point counts once)."""
        from mlflow.entities import Metric, Param, RunTag

        entities = {
            "params": [Param(*item) for item in (params or {}).items()],
            "tags": [RunTag(*item) for item in (tags or {}).items()],
            "metrics": [Metric(*point) for point in points],
        }
        with _translated(self.tracking_uri):
            for kind, size in _MOST_PER_REQUEST.items():
                for start in range(0, len(entities[kind]), size):
                    batch = entities[kind][start : start + size]
                    self.client.log_batch(run_id, **{kind: batch})

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Log a dataset input with the context 'training'."""
        from mlflow import entities

        entity = entities.Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=dataset.source,
            schema=dataset.column_schema,
            profile=dataset.profile,
        )
        context = entities.InputTag("mlflow.data.context", "training")
        with _translated(self.tracking_uri):
            self.client.log_inputs(run_id, [entities.DatasetInput(entity, [context])])

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """Set the status: RUNNING, or how and when the run ended."""
        with _translated(self.tracking_uri):
            if status == "RUNNING":
                self.client.update_run(run_id, status=status)
            else:
                self.client.set_terminated(run_id, status, end_ms)

    def upload(self, run_id: str, local_path: Path, artifact_path: str | None) -> None:
        """Copy a file, or a folder's content, below `artifact_path` of the run's artifacts."""
        with _translated(self.tracking_uri):
            repository = self._repository(run_id)
            if local_path.is_dir():
                repository.log_artifacts(str(local_path), artifact_path)
            else:
                repository.log_artifact(str(local_path), artifact_path)

    def download(self, run_id: str, artifact_path: str, folder: Path) -> Path:
        """Fetch an artifact into the existing `folder` and return its path."""
        with _translated(self.tracking_uri):
            fetched = self._repository(run_id).download_artifacts(artifact_path, str(folder))
        return Path(fetched)

    @contextmanager
    def calls(self) -> Iterator[Any]:
        """Yield the MLflow client, its exceptions translated."""
        with _translated(self.tracking_uri):
            yield self.client

    def _repository(self, run_id: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if run_id not in self._repositories:
            uri = str(self.client.get_run(run_id).info.artifact_uri)
            database = database_path(self.tracking_uri)
            if database is not None and uri.startswith("mlflow-artifacts:"):
                # made through a server on this database, which keeps its files beside it
                uri = _folder_of(uri, artifact_root(database)).as_uri()
            self._repositories[run_id] = get_artifact_repository(uri, self.tracking_uri)
        return self._repositories[run_id]


def connect(tracking_uri: str) -> Connection:
    """Open `tracking_uri` and find or create the experiment.

    A missing SQLite file is created, which takes seconds, with the artifacts beside it.

    Raises:
        TrackingUnavailableError: it cannot be reached, or is not MLflow.
    """
    client_class, database = load_client(), database_path(tracking_uri)
    try:
        with _translated(tracking_uri):
            if database is not None:
                database.parent.mkdir(parents=True, exist_ok=True)
            client = client_class(tracking_uri, registry_uri=tracking_uri)
            return Connection(tracking_uri, client, _experiment_id(client, database))
    except RejectedError as error:  # not MLflow, or an unsuitable version
        raise _unavailable(tracking_uri, error) from error


def _experiment_id(client: Any, database: Path | None) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
    if experiment is None:
        return _make_experiment(client, database)
    if experiment.lifecycle_stage == "deleted":
        _log.warning("The MLflow experiment %s was deleted; it is restored.", EXPERIMENT_NAME)
        client.restore_experiment(experiment.experiment_id)
    _refresh_tags(client, experiment)
    return str(experiment.experiment_id)


def _refresh_tags(client: Any, experiment: Any) -> None:
    """Set the tags that an earlier version set otherwise, if this user may."""
    from mlflow.exceptions import MlflowException

    for key, value in EXPERIMENT_TAGS.items():
        found = experiment.tags.get(key)
        if found is None or (found != value and key != PEOPLES_TAG):
            try:
                client.set_experiment_tag(experiment.experiment_id, key, value)
            except MlflowException as error:  # many may only read
                _log.debug("The experiment's tag %s stays as it is: %s", key, error)


def _make_experiment(client: Any, database: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    location = None if database is None else artifact_root(database).as_uri()
    try:
        return str(client.create_experiment(EXPERIMENT_NAME, location, EXPERIMENT_TAGS))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        # another thread or run created it meanwhile
        return str(client.get_experiment_by_name(EXPERIMENT_NAME).experiment_id)


def _folder_of(uri: str, root: Path) -> Path:
    """Return the folder below `root` of an artifact URI that a server gave out."""
    folder = Path(root, urlsplit(uri).path.lstrip("/"))
    if "\0" in uri or not folder.resolve().is_relative_to(root.resolve()):
        raise RejectedError(
            f"The artifacts {uri[:200]!a} of a run lead out of {root}.",
            why="The database was changed by hand, or is from somebody else.",
            next_command="qwen3ft history",
        )
    return folder


def start_system_metrics(connection: Connection, run_id: str) -> Any | None:
    """Start MLflow's sampling of CPU, disk, network and GPU for `run_id`, in its own thread.

    Returns:
        The monitor, whose `finish()` ends it; None if it cannot be started.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    try:
        with connection.calls():
            monitor = SystemMetricsMonitor(
                run_id,
                sampling_interval=SYSTEM_METRICS_SECONDS,
                resume_logging=True,
                tracking_uri=connection.tracking_uri,
            )
            monitor.start()
    except (FinetuneError, ImportError, RuntimeError) as error:
        _log.info("MLflow's system metrics are off: %s", error)
        return None
    return monitor
