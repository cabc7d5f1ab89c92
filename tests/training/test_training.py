"""The promises of training, in numbers, on the quantised embedded model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.errors import DivergedError
from qwen3ft.model.manager import ModelManager
from qwen3ft.training.batches import StepRows, trained_tokens
from qwen3ft.training.loss import summed_loss

FUSED = {
    "kernels": "fused",
    "packing": True,
    "chunk_tokens": 64,
    "activation_bytes": 2_000_000,
    "loss_chunk_tokens": 64,
}
"""Settings of a plan for the fused path, whose blocks have different levels."""

SCHEDULE = {"total_steps": 6, "evaluate_every_steps": 4, "micro_batch_size": 4}
PATHS: dict[str, dict[str, Any]] = {
    "plain": {"packing": True},
    "fused": FUSED,
    # Dropout makes the generators matter; the fused path has none.
    "padded, dropout": {"dropout": 0.1},
    "packed, dropout": {"dropout": 0.1, "packing": True},
}
"""Two epochs of 3 steps, each of 16 rows in several micro-batches."""


@pytest.fixture(scope="module")
def undisturbed(
    compose_for: Any, plan_in: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Any]]:
    """Return a function that trains a path to its end without a disturbance, once."""

    @cache
    def train(path: str) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp("undisturbed")
        engine, trainer = compose_for(plan_in(folder, **SCHEDULE, **PATHS[path]))
        engine.train_model(trainer)
        return engine, trainer

    return train


@pytest.fixture(scope="module")
def fresh(compose_for: Any, plan_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a trainer of padded rows before its first step."""
    return compose_for(plan_in(tmp_path_factory.mktemp("fresh")))[1]


def tensors(trainer: Any, *, trained: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter, or else of the base."""
    named = trainer.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad == trained}


def losses(trainer: Any, *names: str) -> list[float]:
    """Return what the trainer logged under the names, in order."""
    history = trainer.state.log_history
    return [entry[name] for entry in history for name in names if name in entry]


def enlarge_b(model: Any) -> None:
    """Make B random: zero, as at the start, it hides what flows through A."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)


def test_training_lowers_the_held_out_loss_and_leaves_the_base_untouched(
    undisturbed: Any, fresh: Any
) -> None:
    """Only adapter tensors change; every bit of the 4-bit base, norms and embeddings stays."""
    engine, trainer = undisturbed("plain")
    before, after = tensors(fresh, trained=False), tensors(trainer, trained=False)
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = tensors(fresh), tensors(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    outcome = engine.outcome(trainer)
    assert outcome.best_held_out_loss < outcome.first_held_out_loss
    assert outcome.last_step == 6


def test_only_lora_parameters_are_trainable(fresh: Any, make_plan: Any) -> None:
    """Trainable parameters are lora_A and lora_B of the seven projections, as many as planned."""
    adapter, trainable = make_plan().adapter, tensors(fresh)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert sum(tensor.numel() for tensor in trainable.values()) == adapter.trainable_parameters
    for projection in adapter.target_modules:
        assert any(f".{projection}.lora_A" in name for name in trainable)


def test_prompt_tokens_carry_no_loss(fresh: Any) -> None:
    """Changing which token a masked position should predict changes neither loss nor gradient."""
    batch, *_ = next(iter(fresh.get_train_dataloader()))
    model = fresh.model.get_base_model()

    def loss(labels: torch.Tensor) -> float:
        with torch.no_grad():
            return float(summed_loss(model, {**batch, "labels": labels}, 64))

    labels = batch["labels"]
    assert bool((labels == IGNORED_LABEL).any())
    assert bool((labels[:, 0] == IGNORED_LABEL).all())
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    assert loss(labels) == pytest.approx(float(expected), rel=1e-5)
    revealed = labels.clone()
    revealed[:, 1:2] = batch["input_ids"][:, 1:2]
    assert loss(revealed) != pytest.approx(loss(labels), rel=1e-6)


@pytest.fixture(scope="module")
def first_gradients(
    compose_for: Any, plan_in: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., torch.Tensor]:
    """Return a function that gives the gradients of the first 24 rows as one vector."""

    @cache
    def compute(**changes: Any) -> torch.Tensor:
        plan = plan_in(tmp_path_factory.mktemp("gradients"), effective_batch_size=24, **changes)
        _, trainer = compose_for(plan)
        enlarge_b(trainer.model)
        steps = iter(trainer.get_train_dataloader())
        (step,), trained = trainer.get_batch_samples(steps, 1, trainer.args.device)
        trainer.training_step(trainer.model, step, trained)
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        return torch.cat([parameter.grad.flatten() for parameter in trainable])

    return compute


@pytest.mark.parametrize(
    ("micro", "recompute", "chunk", "packing"),
    [
        (4, False, 4096, False),
        (1, False, 4096, False),
        (12, True, 32, False),
        (24, False, 4096, True),
        (12, True, 32, True),
        (1, False, 4096, True),
    ],
)
def test_every_split_of_the_effective_batch_gives_the_same_gradient(
    first_gradients: Any, micro: int, recompute: bool, chunk: int, packing: bool
) -> None:
    """Padded or packed, small or large, recomputed or not: as 24 padded rows at once, in fp32."""
    whole = first_gradients(micro_batch_size=24)
    split = first_gradients(
        micro_batch_size=micro,
        gradient_checkpointing=recompute,
        loss_chunk_tokens=chunk,
        packing=packing,
    )
    assert whole.norm() > 0
    assert (whole - split).norm() / whole.norm() <= 1e-5


def test_evaluation_does_not_change_the_gradients(compose: Any) -> None:
    """A forward pass in eval mode between two backward passes leaves every gradient as it was.

    On CPUs with AVX512_BF16 bitsandbytes repacks 4-bit weights at the first evaluation; the kernel
    it then uses has no backward, so part of every gradient was lost, without an error.
    """
    _, trainer = compose()
    batch, *_ = next(iter(trainer.get_train_dataloader()))
    core = trainer.model.get_base_model()

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        summed_loss(core, batch, 64).backward()
        return {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}

    enlarge_b(core)
    before = gradients()
    trainer.model.eval()
    with torch.no_grad():
        core(input_ids=batch["input_ids"])
    after = gradients()
    assert len(before) == 2 * 7 * 3
    assert all(torch.equal(before[name], after[name]) for name in before)


def stop_at(engine: Any, trainer: Any, step: int) -> Path:
    """Train until a SIGTERM that arrives during `step`; return the checkpoint."""
    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == step:
                engine.stop.signal_name = "SIGTERM"

    trainer.add_callback(StopAt())
    with pytest.raises(Exception, match="asked to stop"):
        engine.train_model(trainer)
    return engine.job.checkpoints / f"step-{step:06}"


@pytest.mark.parametrize(
    "path",
    [
        # padded, which is what CPUs do, is in tests/worker/test_worker.py too
        pytest.param("padded, dropout", marks=pytest.mark.slow),
        pytest.param("packed, dropout", marks=pytest.mark.slow),
        "fused",
    ],
)
def test_a_resumed_run_ends_bit_identical(undisturbed: Any, compose: Any, path: str) -> None:
    """Stopped in the second epoch and resumed from there, every adapter bit is the same."""
    _, whole = undisturbed(path)
    settings = SCHEDULE | PATHS[path]
    checkpoint = stop_at(*compose(**settings), 5)
    engine, trainer = compose(**settings, attempt=2, resume_from=str(checkpoint))
    engine.train_model(trainer)
    expected, found = tensors(whole), tensors(trainer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(trainer, "eval_loss") == losses(whole, "eval_loss")


def test_a_changed_micro_batch_continues_the_same_steps(undisturbed: Any, compose: Any) -> None:
    """After a shrink from 16 x 1 to 4 x 4 the run sees the same rows and ends at the same step."""
    _, whole = undisturbed("plain")
    settings = SCHEDULE | PATHS["plain"]
    checkpoint = stop_at(*compose(**{**settings, "micro_batch_size": 16}), 4)
    engine, trainer = compose(**settings, attempt=2, resume_from=str(checkpoint))
    engine.train_model(trainer)
    assert trainer.state.global_step == whole.state.global_step == 6
    expected, found = tensors(whole), tensors(trainer)
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=2e-4), name


def test_a_resumed_run_reads_no_row_of_the_steps_before(
    undisturbed: Any, compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 1 of 3 an epoch, the rows fetched are those of the two steps that are left."""
    checkpoint = undisturbed("plain")[0].job.checkpoints / "step-000004"
    settings = SCHEDULE | PATHS["plain"]
    engine, trainer = compose(**settings, attempt=2, resume_from=str(checkpoint))
    fetched: list[int] = []
    get = StepRows.__getitem__
    monkeypatch.setattr(
        StepRows, "__getitem__", lambda rows, numbers: fetched.extend(numbers) or get(rows, numbers)
    )
    engine.train_model(trainer)
    assert len(fetched) == 2 * 16


def test_the_heartbeat_beats_between_micro_batches(compose: Any) -> None:
    """A step of 16 micro-batches beats 15 times before its end: a long step is not a stall."""
    from transformers import TrainerCallback

    engine, trainer = compose(micro_batch_size=1, total_steps=1, evaluate_every_steps=1)
    beats: list[int] = []

    class Count(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            beats.append(state.global_step)

    trainer.add_callback(Count())
    engine.train_model(trainer)
    assert beats == [0] * 15


def test_packing_does_not_change_the_evaluation(undisturbed: Any, fresh: Any) -> None:
    """The held-out loss of a packed run is that of a padded one, to the last bit."""
    assert fresh.evaluate()["eval_loss"] == losses(undisturbed("plain")[1], "eval_loss")[0]


def test_a_fused_run_learns_what_the_plain_one_does(undisturbed: Any) -> None:
    """The loss of each step within 1e-4, each tensor of the adapter within 1e-3."""
    (_, plain), (_, fused) = undisturbed("plain"), undisturbed("fused")
    assert plain.fused is None
    batches = itertools.chain(*fused.get_train_dataloader())
    tokens = {batch["input_ids"].numel() for batch in batches}
    levels = set(itertools.chain(*map(fused.fused.choose_levels, tokens)))
    assert len(levels) > 1  # a mix of levels, or the comparison would say little
    expected = losses(plain, "loss", "eval_loss")
    assert len(expected) == 6 + 3
    assert expected[-1] < 0.98 * expected[0]
    assert losses(fused, "loss", "eval_loss") == pytest.approx(expected, rel=1e-4)
    found = tensors(fused)
    for name, tensor in tensors(plain).items():
        assert float((found[name] - tensor).norm() / tensor.norm()) <= 1e-3, name


def test_an_adapter_of_the_fused_path_is_pefts(
    undisturbed: Any, make_config: Any, tmp_path: Path
) -> None:
    """Saved, and loaded by PEFT onto the quantised base: the same held-out loss."""
    from peft import PeftModel

    engine, trainer = undisturbed("fused")
    engine.save_model(trainer, str(tmp_path / "adapter"))
    manager = ModelManager(make_config())
    base, _ = manager.load_model_with_quantization(engine.plan.model.path)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batches = list(trainer.get_eval_dataloader())
    with torch.no_grad():
        loss = sum(summed_loss(model.get_base_model(), batch, 64).item() for batch in batches)
    outcome = engine.outcome(trainer)
    assert outcome.best_held_out_loss < outcome.first_held_out_loss
    mean = loss / sum(map(trained_tokens, batches))
    assert mean == pytest.approx(outcome.best_held_out_loss, rel=1e-5)


def test_numbers_that_are_read_late_are_the_same(undisturbed: Any, compose: Any) -> None:
    """Each step once, in order, before the evaluation and in the checkpoint that come after it."""
    from transformers import TrainerCallback

    late = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs and logs["step"] < state.global_step:
                late.append(logs["step"])

    def lines(engine: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in engine.job.metrics.read_text().splitlines()]

    engine, trainer = compose(**SCHEDULE, **PATHS["plain"])
    assert trainer.late.lag == 0  # on a CPU there is nothing to wait for
    trainer.late.lag = 1
    trainer.add_callback(Watch())
    engine.train_model(trainer)
    assert late == [1, 2, 3, 5]
    found, expected = lines(engine), lines(undisturbed("plain")[0])
    trained = [line for line in found if line["loss"] is not None]
    assert trained[-1]["loss"] < trained[0]["loss"]  # of its own step: a sum would grow
    assert all(line["tokens_per_second"] > 0 for line in trained)
    for line in found + expected:
        for measured in ("timestamp", "memory_usage", "tokens_per_second"):
            del line[measured]
    assert found == expected
    steps = {(step, False) for step in range(1, 7)} | {(step, True) for step in (0, 4, 6)}
    assert [(line["step"], line["held_out_loss"] is not None) for line in found] == sorted(steps)
    for step in (4, 6):
        state = engine.job.checkpoints / f"step-{step:06}" / "trainer_state.json"
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        assert [e["step"] for e in history if "loss" in e] == list(range(1, step + 1))


@pytest.mark.parametrize("lag", [0, 1])
def test_gradients_that_are_not_finite_end_the_run(compose: Any, lag: int) -> None:
    """Also if earlier steps are not logged yet; a diverged step is never logged as a good one."""
    from transformers import TrainerCallback

    class PoisonAt3(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == 3:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data[0, 0] = float(
                    "nan"
                )

    engine, trainer = compose(total_steps=6, evaluate_every_steps=6, **FUSED)
    trainer.late.lag = lag
    trainer.add_callback(PoisonAt3())
    with pytest.raises(DivergedError, match="at step 3 is nan"):
        engine.train_model(trainer)
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, 3 - lag))
