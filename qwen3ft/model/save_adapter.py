"""Saving the trained adapter as a folder that plain PEFT and vLLM load.

Saved means that the folder was read back, every file matches the manifest, and the adapter is
complete, finite and byte for byte that of the verified checkpoint. `qwen3ft.model.saved_adapter`
shows the folder.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import template_may_think
from qwen3ft.disk.files import sha256_file, write_json_atomic
from qwen3ft.disk.manifests import build_folder
from qwen3ft.errors import CheckpointCorruptError, DivergedError, ModelNotFoundError, SaveError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger, mask_values
from qwen3ft.model.adapter_checks import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    AdapterError,
    verify_adapter,
)
from qwen3ft.model.mlflow_files import write_mlflow_files
from qwen3ft.model.request_defaults import write_request_defaults
from qwen3ft.model.room import resume_elsewhere
from qwen3ft.model.saved_adapter import (
    KNOWN_ROWS_FILE,
    PROVENANCE_FILE,
    TOKENIZER_FILES,
    open_adapter,
    portable_base,
    was_trained_to_think,
)
from qwen3ft.records.model import ModelSource, SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome
from qwen3ft.text.commands import shell_line
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig

logger = get_logger("save")

SPARE_BYTES = MIB
"""Free disk required besides the copied files: for the small files and the file system's blocks."""


def save_adapter(outcome: AttemptOutcome, plan: TrainPlan, config: TrainingConfig) -> SavedAdapter:
    """Save the best checkpoint's adapter below the first of the output folders that works.

    Saving again replaces the folder with the same content.

    Raises:
        CheckpointCorruptError: the checkpoint differs from its manifest, or its adapter from the
            plan.
        DivergedError: the adapter has values that are not finite, or absurd.
        SaveError: no output folder could be written and read back; lists each with its reason.
    """
    checkpoint = Path(outcome.best_checkpoint)
    _check_checkpoint(checkpoint, plan)
    problems: dict[str, str] = {}
    for parent in (config.output_dir, *config.fallback_output_dirs):
        target = Path(parent).resolve() / plan.run_id
        problem = _try_save(target, outcome, plan, config)
        if problem is None:
            logger.info("saved the adapter of step %d to %s", outcome.best_step, target)
            return _describe(target, plan)
        problems[str(target)] = problem
        logger.warning("cannot save to %s: %s", target, problem)
    raise SaveError(
        f"The adapter could not be saved at any of {len(problems)} path(s): "
        + "; ".join(f"{path}: {problem}" for path, problem in problems.items()),
        why=f"Every path failed; the adapter is still in {checkpoint}, and another folder can be "
        "named when the run is resumed.",
        next_command=resume_elsewhere(_needed_bytes(checkpoint, plan), RunDir(Path(plan.run_dir))),
        problems=problems,
        checkpoint=str(checkpoint),
    )


def all_degradations(plan: TrainPlan) -> tuple[str, ...]:
    """Return the degradations of model, data and plan, without duplicates."""
    return tuple(dict.fromkeys((*plan.model.degraded, *plan.dataset.degraded, *plan.degraded)))


def _check_checkpoint(checkpoint: Path, plan: TrainPlan) -> None:
    """Raise unless the checkpoint holds a whole, finite adapter of the plan's size."""
    try:
        verify_adapter(checkpoint, plan.adapter).require_fit(plan.model.shape)
    except AdapterError as fault:
        if fault.wild:
            raise DivergedError(
                f"The adapter in {checkpoint} cannot be used: {fault}.",
                why="Training diverged and the checkpoint was taken afterwards.",
                next_command=RunDir(Path(plan.run_dir)).command_to_train_again(
                    learning_rate=plan.learning_rate / 2
                ),
                tensors=list(fault.wild[:20]),
            ) from fault
        raise CheckpointCorruptError(
            f"The best checkpoint cannot be used: {fault}.",
            why="Its files differ from those that training wrote.",
            next_command=shell_line("ls", "-l", checkpoint),
            checkpoint=str(checkpoint),
        ) from fault


def _try_save(
    target: Path, outcome: AttemptOutcome, plan: TrainPlan, config: TrainingConfig
) -> str | None:
    """Write the folder and read it back; return why that failed, or None."""
    checkpoint = Path(outcome.best_checkpoint)
    copied = _copied_files(checkpoint, plan)

    def fill(folder: Path) -> None:
        for source in copied:
            shutil.copyfile(source, folder / source.name)
        adapter_config = _portable_config(checkpoint / ADAPTER_CONFIG_FILE, plan.model.source)
        write_json_atomic(folder / ADAPTER_CONFIG_FILE, adapter_config)
        provenance = _provenance(outcome, plan, config)
        write_json_atomic(folder / PROVENANCE_FILE, provenance)
        write_request_defaults(folder, Path(plan.model.path), provenance)
        write_mlflow_files(folder, provenance, thinking=was_trained_to_think(provenance))
        (folder / "README.md").write_text(_model_card(outcome, plan), encoding="utf-8")

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed_bytes = _needed_bytes(checkpoint, plan)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < needed_bytes:
            return f"needs {needed_bytes:,} bytes, {free_bytes:,} are free"
        build_folder(target, fill, {"run_id": plan.run_id, "step": outcome.best_step})
        # The manifest covers what was written; only the checkpoint shows what should have been.
        if sha256_file(target / ADAPTER_FILE) != sha256_file(checkpoint / ADAPTER_FILE):
            return "the adapter read back differs from that of the checkpoint"
        open_adapter(target)
    except (SaveError, ModelNotFoundError) as error:
        return error.what
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _copied_files(checkpoint: Path, plan: TrainPlan) -> list[Path]:
    optional = [Path(plan.model.path) / name for name in TOKENIZER_FILES]
    optional.append(Path(plan.dataset.path) / KNOWN_ROWS_FILE)
    return [checkpoint / ADAPTER_FILE, *(path for path in optional if path.is_file())]


def _needed_bytes(checkpoint: Path, plan: TrainPlan) -> int:
    return sum(source.stat().st_size for source in _copied_files(checkpoint, plan)) + SPARE_BYTES


def _describe(target: Path, plan: TrainPlan) -> SavedAdapter:
    return SavedAdapter(
        path=str(target),
        sha256=sha256_file(target / ADAPTER_FILE),
        size_bytes=(target / ADAPTER_FILE).stat().st_size,
        model_name=plan.model.source.model_name,
        degraded=all_degradations(plan),
        version=None,
    )


def _portable_config(path: Path, source: ModelSource) -> dict[str, Any]:
    """Return PEFT's configuration with the original model instead of this machine's 4-bit copy."""
    adapter_config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name, revision = portable_base(source.model_name, source.revision, source.local_path)
    adapter_config["base_model_name_or_path"], adapter_config["revision"] = name, revision
    adapter_config["inference_mode"] = True
    return adapter_config


def _provenance(outcome: AttemptOutcome, plan: TrainPlan, config: TrainingConfig) -> dict[str, Any]:
    """Return what programs need to load, compare and explain the adapter."""
    measured = {"attempt", "attempt_dir", "best_checkpoint"}
    stages = {"model", "dataset", "predicted", "run_dir", "resume_from", "degraded"}
    return {
        "run_id": plan.run_id,
        "base": {
            **plan.model.source.model_dump(mode="json"),
            "snapshot_path": plan.model.path,
            "snapshot_manifest_sha256": plan.model.manifest_sha256,
            "quantization": plan.model.quantization,
            "compute_dtype": plan.model.compute_dtype,
        },
        "data": _data_of(plan),
        "metrics": _finite_only(outcome.model_dump(mode="json", exclude=measured)),
        "plan": plan.model_dump(mode="json", exclude=stages),
        "config": mask_values(config.model_dump(mode="json")),  # it goes wherever the adapter goes
        "degraded": list(all_degradations(plan)),
    }


def _data_of(plan: TrainPlan) -> dict[str, Any]:
    """Return counts of the training data; no reasoning where the template writes none."""
    data = plan.dataset.model_dump(mode="json", include=_DATA_FIELDS)
    if not template_may_think(plan.model.chat_template_sha256):
        data["reasoning_rows"] = 0
    return data


_DATA_FIELDS = {
    *("digest", "sources", "train", "dev", "test_rows", "rows_read", "quarantined"),
    *("usable_rows", "reasoning_rows"),
}


def _finite_only(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with None for infinities and NaN, which JSON lacks."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _model_card(outcome: AttemptOutcome, plan: TrainPlan) -> str:
    source = plan.model.source
    base_line = "" if source.local_path else f"base_model: {source.model_name}\n"
    name, revision = portable_base(source.model_name, source.revision, source.local_path)
    # Without its revision, a branch that has moved on would be loaded.
    base = repr(name) if revision is None else f"{name!r}, revision={revision!r}"
    degraded = "; ".join(all_degradations(plan)) or "no"
    return f"""---
{base_line}library_name: peft
tags: [lora, qlora, qwen3]
---
# {plan.run_id}

A LoRA adapter (r={plan.adapter.r}, alpha={plan.adapter.alpha}) for `{source.model_name}`
(revision `{source.revision}`), trained on 4-bit weights ({plan.model.quantization}).

| | |
|---|---|
| training rows | {plan.dataset.train.rows:,} |
| data digest | `{plan.dataset.digest}` |
| steps, epochs | {outcome.best_step:,} of {outcome.last_step:,}, {outcome.epochs:.1f} |
| held-out loss per token | {outcome.first_held_out_loss:.4f} to {outcome.best_held_out_loss:.4f} |
| degraded | {degraded} |

Ask it:

```
qwen3ft chat --adapter .
```

Load it with plain PEFT. The base model has its own decoding, so the tested one is loaded too:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, TextGenerationPipeline
from transformers import AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".")
model.generation_config = GenerationConfig.from_pretrained(".")
ask = TextGenerationPipeline(model, AutoTokenizer.from_pretrained("."))
print(ask([{{"role": "user", "content": "..."}}])[0]["generated_text"][-1]["content"])
```

`provenance.json` has every setting and number; `manifest.json` the sha256 of every file.
"""
