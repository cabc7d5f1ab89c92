"""Checkpoints written in the background: the same bytes, in order, and no failure is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3ft.disk.files import sha256_file
from qwen3ft.errors import DivergedError
from qwen3ft.training import checkpoint
from qwen3ft.training.checkpoint_writer import CheckpointWriter


def digests(folder: Path) -> dict[str, str]:
    """Return the tensors' sha256 of each checkpoint."""
    return {
        f"{path.name}/{name}": sha256_file(path / name)
        for path in sorted(folder.iterdir())
        for name in ("adapter_model.safetensors", "training_state.safetensors")
    }


def no_space(*_: Any) -> None:
    """Stand in for writing a folder to a full disk."""
    raise OSError(28, "No space left on device")


def test_in_the_background_the_same_is_written(compose: Any) -> None:
    """Training goes on and changes adapter and optimizer; the files hold the step they name."""
    found = []
    for attempt, background in ((1, False), (2, True)):
        engine, trainer = compose(total_steps=3, evaluate_every_steps=1, attempt=attempt)
        folder = engine.job.checkpoints
        trainer.writer = CheckpointWriter(folder, 5, background=background)
        engine.train_model(trainer)
        found.append(digests(folder))
    assert found[0] == found[1]
    assert len(found[0]) == 3 * 2


def test_a_copy_is_taken_before_save_returns(compose: Any, tmp_path: Path) -> None:
    """Later changes are not in the file."""
    _, trainer = compose()
    trainer.create_optimizer_and_scheduler(2)
    trainer.state.global_step = 1
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, background=True)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        writer.save(trainer.model, trainer.optimizer, trainer.lr_scheduler, trainer.state, {})
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
        writer.wait()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoints" / "step-000001"))
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_write_is_raised_at_the_next_save_or_wait(
    compose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failed write is raised once, and the writer can be used again."""
    _, trainer = compose()
    trainer.create_optimizer_and_scheduler(2)
    state = (trainer.model, trainer.optimizer, trainer.lr_scheduler, trainer.state, {})
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, background=True)

    with monkeypatch.context() as full:
        full.setattr(checkpoint, "build_folder", no_space)
        writer.save(*state)
        with pytest.raises(OSError, match="No space"):
            writer.save(*state)
        writer.save(*state)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    writer.save(*state)
    writer.wait()
    assert [c.step for c in checkpoint.list_checkpoints([tmp_path / "checkpoints"])] == [0]


def test_what_ended_training_is_not_hidden_by_a_failed_write(
    compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A divergence stays one, even if the disk was full before it."""
    engine, trainer = compose(total_steps=6, evaluate_every_steps=2)
    trainer.writer = CheckpointWriter(engine.job.checkpoints, 2, background=True)

    def diverge(norm: float, step: int) -> None:
        if step == 3:
            raise DivergedError("no", why="no", next_command="no", step=3, learning_rate=1.0)

    monkeypatch.setattr(checkpoint, "build_folder", no_space)
    monkeypatch.setattr(trainer, "_require_finite", diverge)
    with pytest.raises(DivergedError):
        engine.train_model(trainer)
