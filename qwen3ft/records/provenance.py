"""The fields of an adapter's provenance.json that are used, with their limits.

An adapter may come from elsewhere: its texts are shown, become paths and parts of commands.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, model_validator

from qwen3ft.config import TrainingConfig
from qwen3ft.records.model import PROJECTIONS, AdapterSpec

MOST_TEXT_CHARACTERS = 4096


def _printable(text: str) -> str:
    if not text.isprintable() or len(text) > MOST_TEXT_CHARACTERS:
        raise ValueError(f"up to {MOST_TEXT_CHARACTERS:,} printable characters are needed")
    return text


def _plain_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,254}", text, re.ASCII):
        raise ValueError("a name of letters, digits, '.', '-' and '_' is needed")
    return text


Text = Annotated[str, AfterValidator(_printable)]


ANSWER_LIMITS = ("max_new_tokens", "max_thinking_tokens")
TAKEN_OVER = (*ANSWER_LIMITS, "special_tokens_in_text", "reasoning_separator")
"""Settings of its run by which an adapter is asked elsewhere too."""


class BaseOrigin(BaseModel):
    """The base model, and the 4-bit snapshot that the adapter was trained on."""

    model_name: Text
    revision: Text
    local_path: Text | None
    snapshot_path: Text
    snapshot_manifest_sha256: Text
    quantization: Text


class SourceOrigin(BaseModel):
    """One data file."""

    role: Text
    path: str
    sha256: Text


class DataOrigin(BaseModel):
    """The data that the adapter was trained on; earlier versions counted no rows with reasoning."""

    digest: Text
    sources: tuple[SourceOrigin, ...] = ()
    usable_rows: int = 0
    reasoning_rows: int = 0


class PlanOrigin(BaseModel):
    """The plan of the attempt that trained it."""

    adapter: AdapterSpec


class Provenance(BaseModel):
    """Everything that is read of a provenance.json; other fields are ignored."""

    run_id: Annotated[str, AfterValidator(_plain_name)]
    base: BaseOrigin
    data: DataOrigin
    plan: PlanOrigin
    config: dict[str, Any]
    degraded: tuple[Text, ...] = Field((), max_length=1000)

    @model_validator(mode="after")
    def _check_settings(self) -> Provenance:
        """Hold the adapter, and the settings that are taken over, to the limits of a config."""
        spec = self.plan.adapter
        settings = {name: self.config[name] for name in TAKEN_OVER if name in self.config}
        trained = {"lora_r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}
        TrainingConfig.model_validate({**settings, **trained})
        if sorted(spec.target_modules) != sorted(PROJECTIONS):
            raise ValueError("target_modules are not the seven projections")
        return self
