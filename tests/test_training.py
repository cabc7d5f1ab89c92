"""What training promises, on the quantised embedded model: numbers, not just absence of errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3ft.attempt import JobDir
from qwen3ft.callbacks import StopRequest
from qwen3ft.data import DataPipeline
from qwen3ft.lora import LoRAAdapter
from qwen3ft.memory import MemoryOptimizer
from qwen3ft.model import ModelManager
from qwen3ft.train import TrainingEngine
from qwen3ft.trainer import IGNORED, EffectiveBatchOrder, summed_loss


@pytest.fixture
def prepare(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer for a plan, composed as the worker does it."""
    from datasets import DatasetDict, load_from_disk
    from transformers import set_seed

    def make(plan: Any) -> tuple[TrainingEngine, Any]:
        set_seed(plan.seed)
        config = make_config()
        manager = ModelManager(config)
        model, tokenizer = manager.load_model_with_quantization(plan.model.path)
        model = manager.prepare_for_training(
            model, gradient_checkpointing=plan.gradient_checkpointing
        )
        adapted = LoRAAdapter(plan.adapter).apply_lora(model)
        splits = {name: load_from_disk(f"{plan.dataset.path}/{name}") for name in ("train", "dev")}
        job = JobDir(Path(plan.run_dir) / "attempts" / f"{plan.attempt:02d}").create(plan)
        engine = TrainingEngine(
            plan,
            job,
            collator=DataPipeline(config).create_data_collator(tokenizer),
            memory=MemoryOptimizer(plan.max_memory_gb, plan.device),
            stop=StopRequest(),
        )
        trainer = engine.create_trainer(adapted, DatasetDict(splits), engine.create_training_args())
        return engine, trainer

    return make


def adapter_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad
    }


def first_batch_gradients(engine: TrainingEngine, trainer: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first effective batch, before any update."""
    caught: dict[str, torch.Tensor] = {}
    norm = trainer._get_grad_norm

    def catch(model: Any, grad_norm: Any = None) -> float:
        if not caught:
            caught.update(
                {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            )
        return norm(model, grad_norm=grad_norm)

    trainer._get_grad_norm = catch
    trainer.args.max_grad_norm = 0.0  # compare what was accumulated, not what clipping made of it
    engine.train_model(trainer)
    return caught


def test_training_lowers_the_held_out_loss_and_leaves_the_base_untouched(
    prepare: Any, make_plan: Any
) -> None:
    """Only adapter tensors change; every bit of the 4-bit base, norms and embeddings stays."""
    engine, trainer = prepare(make_plan(total_steps=12, evaluate_every_steps=6))
    before_base, before_adapter = base_weights(trainer), adapter_tensors(trainer)
    engine.train_model(trainer)
    after_base, after_adapter = base_weights(trainer), adapter_tensors(trainer)
    assert all(torch.equal(before_base[name], after_base[name]) for name in before_base)
    assert all(not torch.equal(before_adapter[n], after_adapter[n]) for n in before_adapter)
    outcome = engine.outcome(trainer)
    assert outcome.best_held_out_loss < outcome.first_held_out_loss
    assert outcome.last_step == 12


def test_only_lora_parameters_are_trainable(prepare: Any, make_plan: Any) -> None:
    """Trainable parameters are lora_A and lora_B of the seven projections, as many as planned."""
    plan = make_plan()
    _, trainer = prepare(plan)
    trainable = [(n, p.numel()) for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name, _ in trainable)
    assert sum(count for _, count in trainable) == plan.adapter.trainable_parameters
    for projection in plan.adapter.target_modules:
        assert any(f".{projection}.lora_A" in name for name, _ in trainable)


def test_prompt_tokens_carry_no_loss(prepare: Any, make_plan: Any) -> None:
    """Changing which token a masked position should predict changes neither loss nor gradient."""
    _, trainer = prepare(make_plan())
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.get_base_model()

    def loss(labels: torch.Tensor) -> float:
        with torch.no_grad():
            return float(
                summed_loss(model, batch["input_ids"], batch["attention_mask"], labels, 64)
            )

    labels = batch["labels"]
    assert bool((labels == IGNORED).any())
    assert bool((labels[:, 0] == IGNORED).all())
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    assert loss(labels) == pytest.approx(float(expected), rel=1e-5)
    revealed = labels.clone()
    revealed[:, 1:2] = batch["input_ids"][:, 1:2]
    assert loss(revealed) != pytest.approx(loss(labels), rel=1e-6)


@pytest.mark.parametrize(
    ("micro", "accumulation", "recompute", "chunk"),
    [(4, 16, False, 4096), (1, 64, False, 4096), (16, 4, True, 32)],
)
def test_every_split_of_the_effective_batch_gives_the_same_gradient(
    prepare: Any, make_plan: Any, micro: int, accumulation: int, recompute: bool, chunk: int
) -> None:
    """4 x 16, 1 x 64 and 16 x 4 with recomputation equal 64 x 1 within fp32 rounding."""
    common = {"total_steps": 1, "evaluate_every_steps": 1, "gradient_accumulation_steps": 1}
    whole = first_batch_gradients(*prepare(make_plan("whole", micro_batch_size=64, **common)))
    split = first_batch_gradients(
        *prepare(
            make_plan(
                "split",
                micro_batch_size=micro,
                **{**common, "gradient_accumulation_steps": accumulation},
                gradient_checkpointing=recompute,
                loss_chunk_tokens=chunk,
            )
        )
    )
    difference = sum(float((whole[n] - split[n]).norm() ** 2) for n in whole) ** 0.5
    scale = sum(float(whole[n].norm() ** 2) for n in whole) ** 0.5
    assert scale > 0
    assert difference / scale <= 1e-5


def test_evaluation_does_not_change_the_gradients(prepare: Any, make_plan: Any) -> None:
    """A forward pass in eval mode between two backward passes leaves every gradient as it was.

    On CPUs with AVX512_BF16 bitsandbytes repacks 4-bit weights at the first evaluation; the kernel
    it then uses has no backward, so part of every gradient was lost, without an error.
    """
    _, trainer = prepare(make_plan())
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"], 64)
    core = trainer.model.get_base_model()

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        summed_loss(core, *inputs).backward()
        return {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}

    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide what flows through A
                parameter.normal_(std=0.02)
    before = gradients()
    trainer.model.eval()
    with torch.no_grad():
        core(input_ids=batch["input_ids"])
    after = gradients()
    assert len(before) == 2 * 7 * 3
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_order_depends_on_seed_and_epoch_only() -> None:
    """Each epoch is a permutation; batches of the same rows whatever the micro-batch size."""
    lengths = [5, 9, 3, 7, 8, 2, 6, 4, 1, 10]
    order = EffectiveBatchOrder(lengths, effective_batch_size=4, seed=3)
    first = list(order)
    assert sorted(first) == list(range(10))
    assert list(EffectiveBatchOrder(lengths, 4, 3)) == first
    for start in range(0, 10, 4):
        batch = [lengths[row] for row in first[start : start + 4]]
        assert batch == sorted(batch, reverse=True)
    order.epoch = 1
    assert list(order) != first


def test_a_resumed_run_ends_bit_identical(prepare: Any, make_plan: Any) -> None:
    """Stopped after step 5 and resumed from its checkpoint, every adapter bit is the same."""
    schedule = {"total_steps": 9, "evaluate_every_steps": 3}
    _, undisturbed = prepare(make_plan("undisturbed", **schedule))
    undisturbed.train()
    engine, first = prepare(make_plan("resumed", **schedule))
    first.add_callback(_StopAt(engine, 5))
    with pytest.raises(Exception, match="asked to stop"):
        engine.train_model(first)
    checkpoint = engine.job.checkpoints / "step-000005"
    plan = make_plan("resumed", **schedule, attempt=2, resume_from=str(checkpoint))
    engine, second = prepare(plan)
    engine.train_model(second)
    assert fingerprint(adapter_tensors(second)) == fingerprint(adapter_tensors(undisturbed))
    wanted = [entry for entry in undisturbed.state.log_history if "eval_loss" in entry]
    got = [entry for entry in second.state.log_history if "eval_loss" in entry]
    assert [entry["eval_loss"] for entry in got] == [entry["eval_loss"] for entry in wanted]


def test_a_changed_micro_batch_continues_the_same_steps(prepare: Any, make_plan: Any) -> None:
    """After a shrink from 16 x 1 to 4 x 4 the run sees the same rows and ends at the same step."""
    schedule = {"total_steps": 8, "evaluate_every_steps": 4}
    _, undisturbed = prepare(make_plan("undisturbed", **schedule))
    undisturbed.train()
    engine, first = prepare(make_plan("shrunk", **schedule))
    first.add_callback(_StopAt(engine, 4))
    with pytest.raises(Exception, match="asked to stop"):
        engine.train_model(first)
    checkpoint = engine.job.checkpoints / "step-000004"
    smaller = {"micro_batch_size": 4, "gradient_accumulation_steps": 4, "attempt": 2}
    engine, second = prepare(
        make_plan("shrunk", **schedule, **smaller, resume_from=str(checkpoint))
    )
    engine.train_model(second)
    assert second.state.global_step == undisturbed.state.global_step == 8
    reference, result = adapter_tensors(undisturbed), adapter_tensors(second)
    for name in reference:
        assert torch.allclose(reference[name], result[name], atol=2e-4), name


class _StopAt:
    """Asks the engine to stop during `step`, as a SIGTERM would."""

    def __new__(cls, engine: TrainingEngine, step: int) -> Any:
        from transformers import TrainerCallback

        class StopAt(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step + 1 == step:
                    engine.stop.signal_name = "SIGTERM"

        return StopAt()
