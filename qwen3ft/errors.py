"""Every error of this project, as one tree.

    FinetuneError
      RequestError
        ConfigError  EnvironmentNotReadyError  InsufficientMemoryError  TokenizerError
        ModelNotFoundError  ModelAccessError  ModelUnavailableError
        DataLoadingError
          DatasetNotFoundError  DatasetAccessError  DatasetUnavailableError
        ChampionChangedError  RolledBackError  NoPlaceError
      TransientError
        DownloadError
        TrackingUnavailableError
          NotInMlflowError
      RejectedError  QuantizationError  ExportDriftError  ServedOtherwiseError  SaveError
      CancelledError
      AttemptError
        OutOfMemoryError  MemoryLeakError
        TrainingFailureError
          DivergedError  StalledError  PreemptedError
          DeviceFaultError  WorkerCrashedError  RanksPartedError  CheckpointCorruptError

Each error says what happened (with numbers), why, and the one next command. It carries its facts as
a dict and survives JSON and pickle. `qwen3ft.recovery.adjust` decides what follows each;
`qwen3ft.jobs.failures` turns foreign exceptions, exit codes and signals into these errors.
"""

from __future__ import annotations

from typing import Any

from qwen3ft.logs import mask_secrets, mask_values
from qwen3ft.text.plain import escaped


class FinetuneError(Exception):
    """Root of the tree.

    Args:
        what: What happened, with numbers.
        why: Cause, as far as it is known.
        next_command: Command to run next.
        facts: JSON-compatible details for programs.
    """

    def __init__(self, what: str, *, why: str = "", next_command: str = "", **facts: Any) -> None:
        # Errors are logged, shown, and sent to Prefect and MLflow; what they quote may come from
        # rows, names of files and libraries.
        what, why, next_command = (
            escaped(mask_secrets(text)) for text in (what, why, next_command)
        )
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_command = next_command
        self.facts = mask_values(facts)

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"Why: {self.why}")
        if self.next_command:
            parts.append(f"Next: {self.next_command}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON-compatible values; `from_dict` restores it."""
        return {
            "kind": type(self).__name__,
            "what": self.what,
            "why": self.why,
            "next_command": self.next_command,
            "facts": self.facts,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FinetuneError:
        """Rebuild an error written by `to_dict`; an unknown kind becomes a plain FinetuneError."""
        kinds = {kind.__name__: kind for kind in error_kinds()}
        return _rebuild(kinds.get(values.get("kind", ""), FinetuneError), values)


def _rebuild(kind: type[FinetuneError], values: dict[str, Any]) -> FinetuneError:
    return kind(
        values.get("what", ""),
        why=values.get("why", ""),
        next_command=values.get("next_command", ""),
        **values.get("facts", {}),
    )


def error_kinds(root: type[FinetuneError] = FinetuneError) -> list[type[FinetuneError]]:
    """Return every class of the tree, root first."""
    return [root, *(kind for child in root.__subclasses__() for kind in error_kinds(child))]


class RequestError(FinetuneError):
    """The request cannot be met as it stands; repeating it is useless."""


class ConfigError(RequestError):
    """A setting is invalid."""


class EnvironmentNotReadyError(RequestError):
    """A package, tool, device, or disk space that the run needs is missing."""


class ModelNotFoundError(RequestError):
    """No model of that name exists."""


class ModelAccessError(RequestError):
    """The model exists but is gated, and no token with access was given."""


class ModelUnavailableError(RequestError):
    """The hub cannot be reached and no complete copy is cached."""


class InsufficientMemoryError(RequestError):
    """No plan fits the memory budget, or every plan tried ran out of memory."""


class TokenizerError(RequestError):
    """The tokenizer is unusable and cannot be configured automatically."""


class DataLoadingError(RequestError):
    """There are no usable rows, or more bad ones than the config allows."""


class DatasetNotFoundError(DataLoadingError):
    """No data set, revision or file of that name exists."""


class DatasetAccessError(DataLoadingError):
    """The data set exists but is gated, and no token with access was given."""


class DatasetUnavailableError(DataLoadingError):
    """The hub cannot be reached and no complete copy is cached."""


class ChampionChangedError(RequestError):
    """Another version became champion after the comparison that a promotion relies on."""


class RolledBackError(RequestError):
    """A run would promote an adapter that a person rolled back."""


class NoPlaceError(RequestError):
    """An adapter does not go with those that an engine has loaded; another engine would do."""


class TransientError(FinetuneError):
    """A network or service failed temporarily; the calling task retries with back-off."""


class DownloadError(TransientError):
    """A download broke off or the hub returned a server error."""


class TrackingUnavailableError(TransientError):
    """MLflow cannot be reached; the local journal keeps everything until it can."""


class NotInMlflowError(TrackingUnavailableError):
    """This MLflow does not know a run, model or version; it may be the wrong or a new one."""


class RejectedError(FinetuneError):
    """MLflow refused one operation for good; repeating it is useless."""


class QuantizationError(FinetuneError):
    """A 4-bit setting cannot be used for this model on this machine."""


class ExportDriftError(FinetuneError):
    """A merged model's loss or answers are too far from those of the adapter."""


class ServedOtherwiseError(FinetuneError):
    """A served adapter answers otherwise than in the test of its run."""


class SaveError(FinetuneError):
    """A file could not be written and read back at any of the allowed paths."""


class CancelledError(FinetuneError):
    """A person or the system asked a run to end before its verdict."""


class AttemptError(FinetuneError):
    """One training attempt ended early."""


class OutOfMemoryError(AttemptError):
    """GPU or host memory ran out; facts['phase'] says when, facts['domain'] is gpu or host."""


class MemoryLeakError(AttemptError):
    """Memory kept growing after warm-up."""


class TrainingFailureError(AttemptError):
    """Training failed for a reason other than memory."""


class DivergedError(TrainingFailureError):
    """The loss or a gradient was not finite; caught before the weights changed."""


class StalledError(TrainingFailureError):
    """The worker gave no sign of life for longer than the limit."""


class PreemptedError(TrainingFailureError):
    """The worker was asked to stop, and did after saving a checkpoint if it could."""


class DeviceFaultError(TrainingFailureError):
    """The GPU or its driver failed."""


class WorkerCrashedError(TrainingFailureError):
    """The worker ended without giving a reason."""


class RanksPartedError(TrainingFailureError):
    """The ranks of a training lost each other; the one that ended first has the cause."""


class CheckpointCorruptError(TrainingFailureError):
    """No checkpoint could be verified."""
