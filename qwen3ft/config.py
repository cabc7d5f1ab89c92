"""What the user asks for: one frozen record, and how it is read from a file.

Guarantees: a `TrainingConfig` that exists is valid; every problem of a bad one is reported at once.
It does not say how a run is carried out: what follows from it (micro-batches, checkpointing,
predicted memory) is derived in `qwen3ft.planning.plan`, each value with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from qwen3ft.errors import ConfigError
from qwen3ft.logs import mask_secrets

EMBEDDED_MODEL_NAME = "embedded"
"""The model name that stands for the tiny Qwen3 shipped inside the package."""

SMALLEST_BUDGET_GB, LARGEST_BUDGET_GB = 0.5, 1024.0
"""Less than torch alone takes; more than any card has: bytes or MB were meant."""


class ColumnNames(BaseModel):
    """Columns of the data by the part they play: unset is found by its usual names, "" is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: str | None = Field(None, description="A whole conversation: a list of messages.")
    question: str | None = Field(None, description="What is asked.")
    answer: str | None = Field(None, description="What the model is to say.")
    reasoning: str | None = Field(None, description="What it is to think before it answers.")
    context: str | None = Field(None, description="Put before the question.")
    system: str | None = Field(None, description="The system message.")
    history: str | None = Field(None, description="Earlier [question, answer] pairs.")
    tools: str | None = Field(None, description="Function schemas that are offered.")
    kind: str | None = Field(None, description="Group of questions that scores are reported by.")
    group: str | None = Field(None, description="Source key: its rows are held out together.")


class TrainingConfig(BaseModel):
    """Everything a run is asked to do. Most users only ever set some of the first ten fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str = Field(
        "Qwen/Qwen3-4B-Thinking-2507",
        min_length=1,
        description="Hub name, local folder, or 'embedded': the tiny model shipped with qwen3ft.",
    )
    output_dir: str = Field(
        "./qwen3-finetuned", description="Folder that receives one sub-folder per saved adapter."
    )
    max_memory_gb: float = Field(
        13.0,
        ge=SMALLEST_BUDGET_GB,
        le=LARGEST_BUDGET_GB,
        allow_inf_nan=False,
        description="Memory budget in GB (2**30 bytes): the card's, or resident memory on a CPU.",
    )
    batch_size: int = Field(
        4,
        ge=1,
        le=4096,
        description="Sequences per micro-batch; the plan may split an optimizer step otherwise.",
    )
    gradient_accumulation_steps: int = Field(
        16,
        ge=1,
        le=65536,
        description="Micro-batches per optimizer step; batch_size x this is always kept.",
    )
    learning_rate: float = Field(5e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    num_epochs: int = Field(
        100, ge=1, le=10000, description="Upper bound; early stopping usually ends a run sooner."
    )
    max_sequence_length: int = Field(
        256, ge=16, le=262144, description="Longest sequence in tokens; longer rows are left out."
    )
    lora_r: int = Field(6, ge=1, le=1024, description="Rank of the adapter matrices.")
    lora_alpha: int = Field(12, ge=1, le=4096, description="LoRA scale; alpha / r multiplies BA.")

    # --- model ---
    model_revision: str | None = Field(
        None, description="Hub commit (40 hex digits) or branch; the commit found is recorded."
    )
    quantization: tuple[Literal["nf4-double", "nf4", "fp4"], ...] = Field(
        ("nf4-double", "nf4"),
        min_length=1,
        description="4-bit settings to try in order; any but the first marks the run degraded.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")

    # --- data ---
    data_paths: tuple[str, ...] = Field(
        (), description="Question-answer files or folders (jsonl, json, csv, parquet) to train on."
    )
    dev_paths: tuple[str, ...] = Field(
        (), description="Rows for early stopping; if empty, held out from data_paths by hash."
    )
    test_paths: tuple[str, ...] = Field(
        (), description="Rows for the final comparison; if empty, held out from data_paths by hash."
    )
    columns: ColumnNames = Field(
        ColumnNames(),
        title="Columns",  # else forms show the class's name
        description="Which column is what, where the usual names do not tell.",
    )
    reasoning_separator: str | None = Field(
        None,
        description="Text in the answer that ends the reasoning ('####' in GSM8K); what stands "
        "before it becomes the thinking part.",
    )
    rows_without_reasoning: Literal["empty_block", "leave_out"] = Field(
        "empty_block",
        description="Give them an empty think block that is not trained, or leave them out.",
    )
    train_turns: Literal["all", "last"] = Field(
        "all", description="Which of the assistant's turns in a conversation carry loss."
    )
    special_tokens_in_text: Literal["quarantine", "escape"] = Field(
        "quarantine",
        description="Rows whose text holds <|im_end|> and the like: left out, or taken as text.",
    )
    personal_data: Literal["report", "quarantine", "off"] = Field(
        "report", description="Rows with keys, e-mails, phone or ID numbers: counted or left out."
    )
    too_long: Literal["drop", "shorten_reasoning", "fail"] = Field(
        "drop",
        description="Rows over max_sequence_length; an answer is never cut, a reasoning only from "
        "its middle.",
    )
    near_duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="Training rows nearly the same as another one; those nearly the same as a "
        "held-out row are always left out.",
    )
    max_rows: int | None = Field(None, ge=1, description="Use at most this many training rows.")
    max_rows_per_source: int | None = Field(
        None, ge=1, description="Use at most this many training rows of any one file."
    )
    new_data: Literal["all", "mix"] = Field(
        "all",
        description="Train on all rows each time, or on those the champion has not seen, mixed "
        "with a sample of the others.",
    )
    replay_fraction: float = Field(
        0.5, ge=0, lt=1, description="With new_data 'mix': share of rows seen before."
    )
    when_unchanged: Literal["train", "skip"] = Field(
        "train", description="What to do when data and settings are those that made the champion."
    )
    held_out_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share held out where dev_paths or test_paths is empty."
    )
    max_bad_fraction: float = Field(
        0.2, ge=0, le=1, description="Stop before training if more of the rows than this are bad."
    )
    allow_sample_data: bool = Field(
        False, description="Fall back to the bundled sample rows (marks the run degraded)."
    )

    # --- optimisation ---
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = Field(
        "constant_with_warmup",
        description="Decay over num_epochs; constant suits a bound that early stopping cuts short.",
    )
    warmup_fraction: float = Field(
        0.03, ge=0, lt=1, description="Warm-up share of all steps; one epoch at most."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    early_stopping_patience: int = Field(
        3, ge=1, description="Evaluations without a lower held-out loss before training stops."
    )
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between evaluations and checkpoints; or derived."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, whatever num_epochs says."
    )
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints kept beside the best.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of order, initialisation, dropout.")
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Recompute activations to save memory; auto: only where the plan must."
    )
    kernels: Literal["auto", "fused", "plain"] = Field(
        "auto",
        description="Forward and backward written out for speed, or transformers' and PEFT's; "
        "auto: fused on GPUs that have bfloat16, where Triton is installed.",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Fill micro-batches with whole sequences instead of padding; auto: on a GPU.",
    )

    preflight: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run the worst batches before training and measure their memory; auto: on a "
        "GPU, and on a CPU where more than half of the budget is predicted.",
    )

    # --- inference test ---
    max_new_tokens: int = Field(
        256, ge=1, le=32768, description="Longest answer generated in the inference test."
    )
    inference_rows: int = Field(
        600, ge=1, description="Most held-out questions answered in the inference test."
    )

    # --- gate ---
    gate_metric: Literal["auto", "exact_match", "token_f1", "chrf", "answer_loss"] = Field(
        "auto",
        description="What a candidate must be better in; auto: exact match where answers are "
        "short, else token F1.",
    )
    gate_confidence: float = Field(
        0.95, gt=0.5, lt=1, description="Of the interval of the gain, which must be above zero."
    )
    gate_min_rows: int = Field(
        30, ge=1, description="With fewer held-out questions no adapter is promoted."
    )
    ability_path: str | None = Field(
        None,
        description="Rows (jsonl: question, answer) of what must not be forgotten; by default 48 "
        "general ones in English and Chinese.",
    )
    max_ability_loss_rise: float = Field(
        0.25,
        ge=0,
        allow_inf_nan=False,
        description="By how many nats per token the loss on those rows may be above the base's.",
    )

    # --- judge ---
    judge_url: str | None = Field(
        None,
        description="Base URL of an OpenAI-compatible server (http://127.0.0.1:8000/v1) whose "
        "model compares answers, for the card alone: the gate does not read it. If set, held-out "
        "questions and answers are sent there.",
    )
    judge_model: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        validate_default=True,
        description="Name of the judge's model on that server.",
    )
    judge_rows: int = Field(
        50,
        ge=1,
        le=1000,
        description="Most held-out questions that the judge is asked, twice each.",
    )
    judge_key_variable: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        max_length=64,
        description="Name of the environment variable that holds the judge's key; never the key.",
    )

    # --- recovery ---
    max_attempts: int = Field(5, ge=1, le=20, description="Training attempts before giving up.")
    allow_degraded: bool = Field(
        False, description="Let recovery shorten sequences or lower the rank (changes the result)."
    )
    stall_seconds: float = Field(
        900.0, gt=0, description="A worker silent for this long is ended and started again."
    )
    memory_history: bool = Field(
        False,
        description="On a GPU, note which line allocated each block of memory, for the report on "
        "what it was full of; costs a few per cent of the time.",
    )
    fallback_output_dirs: tuple[str, ...] = Field(
        (), description="Tried in order when output_dir cannot be written."
    )

    # --- one run per card ---
    when_gpu_is_busy: Literal["wait", "refuse"] = Field(
        "wait",
        description="What to do while another run holds the card, or other programs leave too "
        "little of its memory.",
    )
    wait_for_gpu_seconds: float = Field(
        21600.0, ge=0, le=604800, allow_inf_nan=False, description="Longest such wait."
    )
    lock_cpu: bool = Field(
        False, description="Without a GPU: let runs on this machine's CPU go one after another too."
    )

    # --- who is told ---
    notify_blocks: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+/[^/\s]+$")], ...] = Field(
        (),
        description="Prefect blocks told of a run's end, as TYPE/NAME: slack-webhook/ops.",
    )
    notify_on: tuple[Literal["promoted", "kept", "deferred", "failed"], ...] = Field(
        ("promoted", "kept", "deferred", "failed"), description="Ends that they are told of."
    )

    # --- export ---
    export_rows: int = Field(
        200,
        ge=1,
        description="Held-out rows that the merged model is compared with the adapter on.",
    )
    export_max_loss_drift: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="Most that merging may add to the answer loss (nats per token).",
    )
    export_max_lost_answers: float = Field(
        0.03,
        ge=0,
        le=1,
        description="Largest share of rows that the adapter answers right and the export does not.",
    )

    # --- where things go ---
    runs_dir: str = Field("./runs", description="Folder with one sub-folder per run.")
    cache_dir: str = Field(
        "./.qwen3ft/cache", description="Quantised models and tokenised data, reused across runs."
    )
    registered_model: str | None = Field(
        None, description="Name in MLflow's registry; by default derived from the model's name."
    )

    @field_validator("max_memory_gb", mode="before")
    @classmethod
    def _check_budget(cls, value: Any) -> Any:
        """Say what is wrong with an absurd number in words; the field's bounds hold it too."""
        if isinstance(value, bool):
            raise ValueError("a number of GB is needed, not true or false")
        if not isinstance(value, (int, float)):
            return value
        if not value >= SMALLEST_BUDGET_GB:  # NaN too
            raise ValueError(
                f"a budget is at least {SMALLEST_BUDGET_GB:g} GB; CUDA or torch alone take more"
            )
        if value > LARGEST_BUDGET_GB:
            raise ValueError(
                f"a budget is at most {LARGEST_BUDGET_GB:g} GB (of 2**30 bytes, not MB or bytes)"
            )
        return value

    @field_validator("judge_url")
    @classmethod
    def _check_judge(cls, value: str | None) -> str | None:
        """Texts and a key go there: `endpoint_url` says where they may."""
        return None if value is None else check_endpoint(value)

    @field_validator("judge_model")
    @classmethod
    def _check_judge_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Found out after hours of training otherwise."""
        if value is None and info.data.get("judge_url") is not None:
            raise ValueError("judge_url is set, so the server's name of the model is needed")
        return value

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step; no recovery ever changes it."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def is_embedded(self) -> bool:
        """Whether the run uses the tiny model shipped with the package."""
        return self.model_name == EMBEDDED_MODEL_NAME


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Validate `values`.

    Raises:
        ConfigError: listing every problem at once, each with the field and the value given.
    """
    try:
        return TrainingConfig.model_validate(dict(values))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in issue['loc']) or 'config'}: {issue['msg']}"
            + (
                ""
                if issue["type"] == "missing"
                else f" (given: {mask_secrets(repr(issue['input']))})"
            )
            for issue in error.errors(include_url=False)
        ]
        raise ConfigError(
            f"{len(problems)} invalid setting(s): " + "; ".join(problems),
            why="The settings do not describe a run that could be started.",
            next_command="qwen3ft plan --help",
            problems=problems,
        ) from None


def load_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """Read a YAML file of settings, then apply `overrides`; unset fields keep their defaults.

    Relative paths inside the file are taken as they are: relative to the working folder.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or a setting is invalid.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"Cannot read the config file {path}: {error}",
                why="It is missing, unreadable or no YAML.",
                next_command=f"ls -l {path}",
                path=str(path),
            ) from error
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} holds a {type(loaded).__name__}, not a mapping of settings.",
                why="A config file is a YAML mapping such as 'learning_rate: 5.0e-5'.",
                next_command="cat deployments/configs/embedded.yaml",
                path=str(path),
            )
        values.update(loaded)
    values.update(overrides or {})
    return parse_config(values)


def registered_model_name(model_name: str) -> str:
    """A registry name for a model: its last two path parts, without what MLflow forbids."""
    parts = [part for part in re.split(r"[/\\:]+", model_name) if part not in ("", ".", "..")]
    return f"qwen3ft-{'--'.join(parts[-2:]) or 'model'}"


def registered_name(config: TrainingConfig) -> str:
    """The registry's name for a run's adapters: as configured, or after the base model."""
    return config.registered_model or registered_model_name(config.model_name)


def check_endpoint(url: str) -> str:
    """`url` without its last slash, if texts and a key may be sent there.

    Raises:
        ValueError: no https (or http to this machine or an address of a private network), or there
            is more in it than scheme, host, port and path.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL has no spaces and nothing but ASCII (xn--... for other names)")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL is needed, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ValueError("scheme, host, port and path alone: settings are kept, so no key is in it")
    _ = parts.port  # ValueError if it is none
    if parts.scheme == "http" and not _is_in_the_house(parts.hostname):
        raise ValueError(
            "http goes to localhost or to an address of a private network (10.0.0.5) alone, "
            "elsewhere it is https; a name could lead anywhere"
        )
    return url.rstrip("/")


def _is_in_the_house(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or (
        address.is_private and not address.is_link_local and not address.is_unspecified
    )
