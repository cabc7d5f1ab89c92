"""Settings of a run: one frozen record, and how it is read from files and options.

A `TrainingConfig` that exists is valid; parsing reports every problem at once. Values that follow
from the settings (micro-batches, checkpointing, predicted memory) are derived in
`qwen3ft.planning.plan`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qwen3ft.errors import ConfigError
from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.text.commands import existing_path, shell_line
from qwen3ft.text.endpoints import checked_endpoint
from qwen3ft.text.names import closest_name, flaw_of_name
from qwen3ft.text.plain import escaped, is_plain
from qwen3ft.text.yaml import LONGEST_TEXT, UnreadableYamlError, load_yaml

EMBEDDED_MODEL_NAME = "embedded"
"""Model name that stands for the tiny Qwen3 shipped inside the package."""

AUTO_GPUS = "auto"
"""Value of the setting `gpus` for all GPUs that are free."""

SMALLEST_BUDGET_GB, LARGEST_BUDGET_GB = 0.5, 1024.0
"""Less than torch alone needs; more than any GPU has, so that bytes or MB were probably meant."""

RENAMED_SETTINGS = {
    "when_card_is_busy": "when_gpu_is_busy",
    "wait_for_card_seconds": "wait_for_gpu_seconds",
    "registered_model": "name",
}
"""Current name by old name; old names are accepted with a warning until `OLD_SETTINGS_END`."""

REMOVED_SETTINGS: dict[str, str] = {
    "export_rows": "it is the option --max-rows of qwen3ft export",
    "export_max_loss_drift": "it is the option --max-loss-drift of qwen3ft export",
    "export_max_lost_answers": "it is the option --max-lost-answers of qwen3ft export",
}
"""Replacement by name of a removed setting; they are ignored with a warning until then."""

OLD_SETTINGS_END = "0.2"
"""Version that refuses old and removed names."""

_MOST_LABEL_CHARACTERS = 40
"""Characters of a data path in the name of a task."""

_GPU = r"(?:\d{1,4}|(?:GPU|MIG)-[\w/-]+)"
_GPUS = rf"{AUTO_GPUS}|[1-9]\d{{0,3}}|(?:GPU|MIG)-[\w/-]+|{_GPU},|{_GPU}(?:,{_GPU})+"

_MOST_PROBLEMS, _MOST_SHOWN = 50, 400
"""Problems that one error lists, and characters shown of a value."""

_log = get_logger("config")


class ColumnNames(BaseModel):
    """Column names of the data: unset ones are detected by name, "" disables a column."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    messages: str | None = None
    """A whole conversation: a list of messages."""
    question: str | None = None
    """The question."""
    answer: str | None = None
    """The answer."""
    reasoning: str | None = None
    """The reasoning before the answer."""
    context: str | None = None
    """Text to put before the question."""
    system: str | None = None
    """The system message."""
    history: str | None = None
    """Earlier [question, answer] pairs."""
    tools: str | None = None
    """Schemas of the functions on offer."""
    kind: str | None = None
    """Kind of question; scores are reported for each kind."""
    group: str | None = None
    """Source of the row; rows of one source are held out together."""
    split: str | None = None
    """The row's own split: train, validation or test."""
    label: str | None = None
    """True or false; rows with a false one are bad examples and left out."""


class TrainingConfig(BaseModel):
    """Settings of a run. Most users only ever set some of the first ten fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        # Prefect's server checks parameters against the schema: it must let old names pass.
        json_schema_extra={
            "patternProperties": {f"^({'|'.join(RENAMED_SETTINGS | REMOVED_SETTINGS)})$": {}}
        },
    )

    model_name: str = Field("Qwen/Qwen3-4B-Thinking-2507", min_length=1)
    """Hub name, local folder, or 'embedded': the tiny model shipped with qwen3ft."""
    output_dir: str = "./qwen3-finetuned"
    """Folder that receives one subfolder per saved adapter."""
    max_memory_gb: float = Field(
        13.0, ge=SMALLEST_BUDGET_GB, le=LARGEST_BUDGET_GB, allow_inf_nan=False
    )
    """Memory budget in GB (2**30 bytes): GPU memory, or resident memory on a CPU."""
    batch_size: int = Field(4, ge=1, le=4096)
    """Sequences per micro-batch; the plan may split an optimizer step differently."""
    gradient_accumulation_steps: int = Field(16, ge=1, le=65536)
    """Micro-batches per optimizer step; batch_size times this is always kept."""
    learning_rate: float = Field(5e-5, gt=0, le=1)
    """Peak learning rate of AdamW."""
    num_epochs: int = Field(100, ge=1, le=10000)
    """Largest number of epochs; early stopping usually ends a run sooner."""
    max_sequence_length: int = Field(256, ge=16, le=262144)
    """Longest sequence in tokens; too_long says what happens to longer rows."""
    lora_r: int = Field(6, ge=1, le=1024)
    """Rank of the adapter matrices."""
    lora_alpha: int = Field(12, ge=1, le=4096)
    """LoRA scaling: the adapter is multiplied by alpha / r."""

    # --- model ---
    model_revision: str | None = None
    """Hub branch or commit (40 hex digits); the resolved commit is recorded."""
    quantization: tuple[Literal["nf4-double", "nf4", "fp4"], ...] = Field(
        ("nf4-double", "nf4"), min_length=1
    )
    """4-bit formats to try in order; any but the first marks the run as degraded."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    # --- data ---
    data_paths: tuple[str, ...] = ()
    """Files, folders, globs or hf:// data sets of question-answer rows."""
    dev_paths: tuple[str, ...] = ()
    """Rows for early stopping; if empty, held out from data_paths by hash."""
    test_paths: tuple[str, ...] = ()
    """Rows for the final comparison; if empty, held out from data_paths by hash."""
    # a title, since forms show the name of the class otherwise
    columns: ColumnNames = Field(ColumnNames(), title="Columns")
    """Columns of the data, where their names are unusual."""
    reasoning_separator: str | None = None
    """Text that ends the reasoning in an answer ('####' in GSM8K); the text before it becomes the
    thinking part."""
    rows_without_reasoning: Literal["empty_block", "leave_out"] = "empty_block"
    """Give such rows an empty, untrained think block, or leave them out."""
    train_turns: Literal["all", "last"] = "all"
    """Train on all assistant turns of a conversation, or on the last one only."""
    special_tokens_in_text: Literal["quarantine", "escape"] = "quarantine"
    """Leave out rows that contain <|im_end|> and the like, or read it as text."""
    personal_data: Literal["report", "quarantine", "off"] = "report"
    """Count rows with keys, e-mails, phone or ID numbers, or leave them out."""
    too_long: Literal["drop", "shorten_reasoning", "fail"] = "drop"
    """Drop rows over max_sequence_length, cut the middle of their reasoning, or stop the run.
    Answers are never cut."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Keep or drop training rows that nearly repeat another one; near-duplicates of held-out rows
    are always dropped."""
    max_rows: int | None = Field(None, ge=1)
    """Largest number of training rows."""
    max_rows_per_source: int | None = Field(None, ge=1)
    """Largest number of training rows from any one file."""
    new_data: Literal["all", "mix"] = "all"
    """Train on all rows, or on those the champion has not seen mixed with a sample of the rest."""
    replay_fraction: float = Field(0.5, ge=0, lt=1)
    """Share of rows the champion has seen, if new_data is 'mix'."""
    when_unchanged: Literal["train", "skip"] = "train"
    """Train or skip if the champion was made from the same data and settings."""
    held_out_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of rows held out if dev_paths or test_paths is empty."""
    max_bad_fraction: float = Field(0.2, ge=0, le=1)
    """Stop before training if a larger share of the rows is bad."""
    allow_sample_data: bool = False
    """Train on the bundled rows if data_paths has none (a degraded run)."""

    # --- optimisation ---
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """Schedule over num_epochs; constant suits runs that early stopping ends."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of all steps spent on warm-up; at most one epoch."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest gradient norm; larger gradients are clipped to it."""
    early_stopping_patience: int = Field(3, ge=1)
    """Stop after this many evaluations without a lower held-out loss."""
    evaluate_every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations and checkpoints; derived if unset."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever num_epochs says."""
    keep_checkpoints: int = Field(2, ge=2)
    """Newest checkpoints to keep beside the best one."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of the order of rows, the initial weights and dropout."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute activations to save memory; auto: only if the budget needs it."""
    kernels: Literal["auto", "fused", "plain"] = "auto"
    """Use the fused forward and backward pass, or those of transformers and PEFT; auto: fused on
    GPUs with bfloat16 and Triton."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Fill micro-batches with whole sequences instead of padding; auto: on a GPU."""

    preflight: Literal["auto", "on", "off"] = "auto"
    """Run the worst batches before training and measure their memory; auto: on a GPU, and on a CPU
    if more than half of the budget is predicted."""

    # --- inference test ---
    max_new_tokens: int = Field(512, ge=1, le=32768)
    """Most tokens generated for an answer in the inference test, besides its thinking."""
    max_thinking_tokens: int = Field(2048, ge=0, le=131072)
    """Most tokens of thinking before an answer, where rows have reasoning; then the end of the
    thinking is written for the model, and it answers."""
    inference_rows: int = Field(600, ge=1)
    """Most held-out questions answered in the inference test."""

    # --- gate ---
    gate_metric: Literal["auto", "exact_match", "token_f1", "chrf", "answer_loss"] = "auto"
    """Metric in which a candidate must be better; auto: exact match if answers are short, else
    token F1."""
    gate_confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the interval of the gain, which must lie above zero."""
    gate_min_rows: int = Field(30, ge=1)
    """Fewest held-out questions for a promotion."""
    stop_asking_early: bool = True
    """Stop the inference test after a quarter or half of the questions if the verdict is clear by
    then, by bounds that are fixed beforehand."""
    ability_path: str | None = None
    """JSON lines (question, answer) that must not be forgotten; unset: 48 general ones in English
    and Chinese."""
    max_ability_loss_rise: float = Field(0.25, ge=0, allow_inf_nan=False)
    """Largest rise of the loss on the ability rows over the base model, in nats per token."""

    # --- judge ---
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible server (http://127.0.0.1:8000/v1) whose model compares
    answers. The result is shown on the card; the gate ignores it. Held-out questions and answers
    are sent there."""
    judge_model: str | None = Field(None, min_length=1, max_length=200, validate_default=True)
    """Name of the judge's model on that server."""
    judge_rows: int = Field(50, ge=1, le=1000)
    """Most held-out questions to ask the judge, twice each."""
    judge_key_variable: str | None = Field(None, pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=64)
    """Name of the environment variable with the judge's API key; never the key."""

    # --- recovery ---
    max_attempts: int = Field(5, ge=1, le=20)
    """Training attempts before giving up."""
    allow_degraded: bool = False
    """Let recovery shorten sequences or lower the rank, which changes the result."""
    stall_seconds: float = Field(900.0, gt=0)
    """Seconds without a sign of life after which a worker is ended and restarted."""
    memory_history: bool = False
    """Record which line of code allocated each block of GPU memory, for the memory report; costs a
    few percent of the time."""
    fallback_output_dirs: tuple[str, ...] = ()
    """Folders to try in order if output_dir cannot be written."""

    # --- GPUs ---
    gpus: str = Field("1", max_length=2000)
    """GPUs that share each step of a training: a number, auto (all that are free), or indexes or
    UUIDs with commas. The result is that of one GPU. Without a GPU: processes of the embedded
    model."""
    hosts: int = Field(1, ge=1, le=64)
    """Hosts that share each step of a training, each with as many GPUs as gpus says. The run asks
    its work pool for the others, which must see the project folder at the same path."""
    when_gpu_is_busy: Literal["wait", "refuse"] = "wait"
    """Wait or refuse while another run holds the GPU, or other programs leave too little of its
    memory."""
    wait_for_gpu_seconds: float = Field(21600.0, ge=0, le=604800, allow_inf_nan=False)
    """Longest wait for the GPU, and for other hosts."""
    lock_cpu: bool = False
    """Without a GPU: let runs take turns on this machine's CPU too."""

    # --- notifications ---
    notify_blocks: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+/[^/\s]+$")], ...] = ()
    """Prefect blocks to notify when a run ends, as TYPE/NAME: slack-webhook/ops."""
    notify_on: tuple[Literal["promoted", "kept", "deferred", "failed"], ...] = (
        "promoted",
        "kept",
        "deferred",
        "failed",
    )
    """Outcomes to send a notification for."""

    # --- folders and names ---
    runs_dir: str = "./runs"
    """Folder with one subfolder per run."""
    cache_dir: str = "./.qwen3ft/cache"
    """Folder for quantised models and tokenised data, reused across runs."""
    name: str | None = None
    """Name of the task, and of its model in the MLflow registry: adapters of one name are compared
    with each other. Unset: derived from model_name and data_paths."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = with_current_names(values)
        for old in RENAMED_SETTINGS.keys() & values.keys():
            raise ValueError(f"{old} is the old name of {RENAMED_SETTINGS[old]}: give one of them")
        return values

    @field_validator("max_memory_gb", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        """Explain an absurd number in words; the bounds of the field would only name the limit."""
        if isinstance(value, bool):
            raise ValueError("a number of GB is needed, not true or false")
        if isinstance(value, str):  # of a settings file or --set
            with suppress(ValueError):
                value = float(value)
        if not isinstance(value, (int, float)):
            return value
        if not value >= SMALLEST_BUDGET_GB:  # NaN too
            raise ValueError(
                f"a budget is at least {SMALLEST_BUDGET_GB:g} GB; CUDA or torch alone need more"
            )
        if value > LARGEST_BUDGET_GB:
            raise ValueError(
                f"a budget is at most {LARGEST_BUDGET_GB:g} GB (of 2**30 bytes, not MB or bytes)"
            )
        return value

    @field_validator("gpus", mode="before")
    @classmethod
    def _read_gpus(cls, value: Any) -> Any:
        """Take a number and a list too; a list of one ends with a comma, as no number does."""
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, value: str) -> str:
        if not re.fullmatch(_GPUS, value):
            raise ValueError(f"{AUTO_GPUS}, a number of GPUs, or indexes or UUIDs with commas")
        return value

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what no path or name can hold, and what a terminal would obey."""
        for text in value if isinstance(value, tuple) else (value,):
            is_line = info.field_name != "reasoning_separator"
            if isinstance(text, str) and not (is_plain(text) if is_line else text == escaped(text)):
                raise ValueError("a text without control characters is needed")
        return value

    @field_validator("output_dir", "runs_dir", "cache_dir", "ability_path", "fallback_output_dirs")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        # Here alone: half of the stages would otherwise write to a folder called "~".
        if isinstance(value, tuple):
            return tuple(map(in_home, value))
        return value and in_home(value)

    @field_validator("model_revision")
    @classmethod
    def _check_revision(cls, value: str | None) -> str | None:
        for part in (value or "main").split("/"):  # refs/pr/1
            if flaw := flaw_of_name(part):
                raise ValueError(f"not the name of a branch or commit: {flaw}")
        return value

    @model_validator(mode="after")
    def _check_registered_name(self) -> TrainingConfig:
        # else it would be refused after hours of training
        if flaw := flaw_of_name(self.registered_name):
            raise ValueError(
                f"MLflow cannot register a model as {self.registered_name[:60]!r}: {flaw}; set name"
            )
        return self

    @model_validator(mode="after")
    def _check_hosts(self) -> TrainingConfig:
        if self.hosts > 1 and not self.gpus.isdecimal():
            raise ValueError(f"with {self.hosts} hosts gpus is the number of GPUs that each gives")
        return self

    @field_validator("judge_url")
    @classmethod
    def _check_judge_url(cls, value: str | None) -> str | None:
        return None if value is None else checked_endpoint(value)

    @field_validator("judge_model")
    @classmethod
    def _check_judge_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        # else it would be found missing after hours of training
        if value is None and info.data.get("judge_url") is not None:
            raise ValueError("judge_url is set, so the server's name of the model is needed")
        return value

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step; no recovery ever changes it."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def is_embedded(self) -> bool:
        """True if the run uses the tiny model shipped with the package."""
        return self.model_name == EMBEDDED_MODEL_NAME

    @property
    def registered_name(self) -> str:
        """Name of the run's task in the registry: as configured, or after the model and data."""
        return self.name or registered_model_name(self.model_name, self.data_paths)


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Validate `values`.

    Raises:
        ConfigError: lists every problem, each with the field and the value given.
    """
    try:
        return TrainingConfig.model_validate(dict(values))
    except ValidationError as error:
        issues = [dict(issue) for issue in error.errors(include_url=False)]
        problems = [_problem(issue) for issue in issues[:_MOST_PROBLEMS]]
        raise ConfigError(
            f"{len(issues)} invalid setting(s): {'; '.join(problems)}"
            + (" ..." if len(issues) > _MOST_PROBLEMS else ""),
            why="The settings do not describe a run that could be started.",
            next_command=f"qwen3ft settings {_word_to_look_up(issues[0])}".strip(),
            problems=problems,
        ) from None


def load_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """Read a YAML file of settings, then apply `overrides`; unset fields keep their defaults.

    Relative paths in the file are relative to the working folder, not to the file.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or a setting is invalid.
    """
    values = {} if path is None else read_settings_file(path)
    return parse_config(values | with_current_names(overrides or {}))


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file of settings, without validating it.

    Values are texts as they were written, or None for null (see `qwen3ft.text.yaml`).

    Raises:
        ConfigError: the file cannot be read or is not a mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise UnreadableYamlError("it is not a regular file")
        with path.open(encoding="utf-8") as stream:
            loaded = load_yaml(stream.read(LONGEST_TEXT + 1))
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError too
        raise ConfigError(
            f"Cannot read the settings in {path}: {error}",
            why="The file is missing, unreadable, or not YAML of plain settings.",
            next_command=shell_line("ls", "-l", existing_path(path)),
            path=str(path),
        ) from error
    if not isinstance(loaded, dict):
        held = (
            "no settings"
            if loaded is None
            else f"a {'list' if isinstance(loaded, list) else 'text'}"
        )
        raise ConfigError(
            f"{path} holds {held}, not a mapping of settings.",
            why="Settings are a YAML mapping such as 'learning_rate: 5.0e-5'.",
            next_command="qwen3ft settings",
            path=str(path),
        )
    return with_current_names(loaded)


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename old settings and drop removed ones, with a warning each.

    A setting that is given by both names keeps both; validation refuses them.
    """
    current = dict(values)
    for old, new in RENAMED_SETTINGS.items():
        if old in current and new not in current:
            current[new] = current.pop(old)
            _log.warning(
                "setting %s is now %s; version %s will refuse the old name",
                *(old, new, OLD_SETTINGS_END),
            )
    for name in REMOVED_SETTINGS.keys() & current.keys():
        del current[name]
        _log.warning(
            "setting %s is ignored: %s; version %s will refuse it",
            *(name, REMOVED_SETTINGS[name], OLD_SETTINGS_END),
        )
    return current


def registered_model_name(model_name: str, data_paths: Sequence[str] = ()) -> str:
    """Derive the name of a task: of the model, and of its data unless `data_paths` is empty.

    Other paths give another name, so that adapters for different tasks are never compared. How a
    path is written (`./data`, `data`) makes no difference.
    """
    parts = [part for part in re.split(r"[/\\:]+", model_name) if part not in ("", ".", "..")]
    name = f"qwen3ft-{'--'.join(parts[-2:]) or 'model'}"
    if not data_paths:
        return name
    paths = sorted({_plain_path(path) for path in data_paths})
    digest = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogatepass")).hexdigest()
    shown = mask_secrets(paths[0])  # a name is seen wherever MLflow is
    named = [part for part in re.split(r"[/\\:]+", shown) if re.search(r"\w", part)][-2:]
    label = re.sub(r"[^\w.-]+", "-", "-".join(named))[:_MOST_LABEL_CHARACTERS].strip("-.")
    return f"{name}-{label or 'data'}-{digest[:6]}"


def in_home(folder: str) -> str:
    """Return the folder with the home folder for a ~ at its beginning, as a shell does."""
    return os.path.expanduser(folder)  # noqa: PTH111  never raises


def _plain_path(path: str) -> str:
    """Return a path as it is written from the working folder; addresses stay as they are."""
    if "://" in path:
        return path
    plain = os.path.normpath(in_home(path))
    here = f"{os.getcwd()}{os.sep}"  # noqa: PTH109
    return plain.removeprefix(here)


def merge_settings(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what is `given` in its place; columns are merged one by one.

    Another model starts from the defaults: the settings of `base` were chosen for its own.
    """
    base, given = with_current_names(base), with_current_names(given)
    if given.get("model_name", base.get("model_name")) != base.get("model_name"):
        return given
    merged = base | given
    before, after = base.get("columns"), given.get("columns")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        merged["columns"] = {**before, **after}
    return merged


def _problem(issue: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in issue["loc"]) or "config"
    if issue["type"] == "extra_forbidden":
        meant = _meant(issue)
        return f"{place}: there is no such setting" + (f", did you mean {meant}?" if meant else "")
    given = mask_secrets(repr(issue["input"]))
    if len(given) > _MOST_SHOWN:
        given = f"{given[:_MOST_SHOWN]}..."
    return f"{place}: {issue['msg']}" + ("" if issue["type"] == "missing" else f" (given: {given})")


def _meant(issue: dict[str, Any]) -> str:
    """Return the setting that an unknown name was probably meant to be, or ''."""
    *within, name = issue["loc"]
    return closest_name(str(name), (ColumnNames if within else TrainingConfig).model_fields)


def _word_to_look_up(issue: dict[str, Any]) -> str:
    if issue["type"] == "extra_forbidden" and len(issue["loc"]) == 1:
        return _meant(issue)
    return str(issue["loc"][0]) if issue["loc"] else ""


def checked_name(name: str, of: str, next_command: str) -> str:
    """Return `name` if it can be the name of one folder and of a model in MLflow.

    Args:
        name: Id or name from outside: typed, a parameter of a run, or read from a file or server.
        of: Its meaning, for the message: 'run', 'registered model' ...
        next_command: Command that shows the names that exist.

    Raises:
        ConfigError: it could lead out of its folder, or change a query.
    """
    if flaw := flaw_of_name(name):
        shown = ascii(name[:60]) + ("..." if len(name) > 60 else "")
        raise ConfigError(
            f"{shown} cannot be the name of a {of}: {flaw}.",
            why="Names stand for one folder and are part of queries, so that nothing may lead out.",
            next_command=next_command,
        )
    return name
