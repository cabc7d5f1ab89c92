"""Checkpoint folders: committed whole, verified before use, pruned after a newer one verifies.

A checkpoint is a folder `step-000200` whose manifest, written last, lists the sha256 of every file
and its `lineage`. `qwen3ft.training.checkpoint_writer` writes the files, and
`qwen3ft.training.trainer` reads them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3ft.disk.manifests import build_folder, find_damage, read_manifest_facts
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import AdapterError, verify_adapter
from qwen3ft.records.plan import TrainPlan

logger = get_logger("checkpoint")

TENSORS_NAME = "training_state.safetensors"
VALUES_NAME = "training_state.json"
STATE_NAME = "trainer_state.json"

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint folder; ordered by step."""

    step: int
    path: Path


def lineage(plan: TrainPlan) -> dict[str, Any]:
    """Return the facts that a checkpoint and the plan that resumes from it must share."""
    # Micro-batch size, recomputation, loss chunks and learning rate may differ: they change neither
    # the order of the data nor the meaning of an optimizer step.
    return {
        "model": plan.model.manifest_sha256,
        "data": plan.dataset.digest,
        "r": plan.adapter.r,
        "alpha": plan.adapter.alpha,
        "target_modules": list(plan.adapter.target_modules),
        "effective_batch_size": plan.effective_batch_size,
        "max_sequence_length": plan.max_sequence_length,
        "seed": plan.seed,
    }


def commit(
    folder: Path, step: int, fill: Callable[[Path], None], facts: dict[str, Any]
) -> Checkpoint:
    """Write a checkpoint, all or nothing; `fill` writes its files into a given folder."""
    path = folder / f"step-{step:06d}"
    build_folder(path, fill, {"step": step, **facts})
    return Checkpoint(step, path)


def list_checkpoints(folders: Iterable[Path]) -> list[Checkpoint]:
    """Return the checkpoints in `folders`, unverified, by step and then by order of folders."""
    found = [
        Checkpoint(int(match[1]), path)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_to_resume(folders: Iterable[Path], plan: TrainPlan) -> Checkpoint | None:
    """Return the newest checkpoint that `plan` can resume from: verified, and its own adapter."""

    def find_fault(checkpoint: Path) -> str | None:
        try:
            required = (TENSORS_NAME, VALUES_NAME, STATE_NAME)
            verify_adapter(checkpoint, plan.adapter, required).require_fit(plan.model.shape)
        except AdapterError as fault:
            return str(fault)
        return None

    return newest_verified(folders, lineage(plan), find_fault)


def newest_verified(
    folders: Iterable[Path],
    expected: dict[str, Any] | None = None,
    find_fault: Callable[[Path], str | None] = find_damage,
) -> Checkpoint | None:
    """Return the newest checkpoint whose files all match its manifest.

    Args:
        folders: `checkpoints` folders of all attempts, in order of attempts.
        expected: `lineage` of the plan that will resume; checkpoints of others are skipped.
        find_fault: Says what is wrong with a checkpoint; None if nothing is.
    """
    for checkpoint in reversed(list_checkpoints(folders)):
        if damage := find_fault(checkpoint.path):
            logger.warning("skipping %s: %s", checkpoint.path, damage)
            continue
        facts = read_manifest_facts(checkpoint.path)
        if expected and (different := [k for k, v in expected.items() if facts.get(k) != v]):
            logger.warning("skipping %s: different %s", checkpoint.path, ", ".join(different))
            continue
        return checkpoint
    return None


def prune(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete old checkpoints of `folder`, except the best one and the `keep` newest."""
    checkpoints = list_checkpoints([folder])
    old = [checkpoint for checkpoint in checkpoints[:-keep] if checkpoint.step != best_step]
    # Unless the newest verifies, an old one may be the last good one.
    if old and find_damage(checkpoints[-1].path) is None:
        for checkpoint in old:
            shutil.rmtree(checkpoint.path)
