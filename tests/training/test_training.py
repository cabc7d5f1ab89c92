"""The promises of training, in numbers, on the quantised embedded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.token_table import load_split
from qwen3ft.errors import DivergedError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.heartbeat import StopRequest
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.model.adapter import LoRAAdapter
from qwen3ft.model.manager import ModelManager
from qwen3ft.training.batches import trained_tokens
from qwen3ft.training.engine import TrainingEngine
from qwen3ft.training.loss import summed_loss

FUSED = {
    "kernels": "fused",
    "packing": True,
    "chunk_tokens": 64,
    "activation_bytes": 2_000_000,
    "loss_chunk_tokens": 64,
}
"""Settings of a plan for the fused path, whose blocks have different levels."""


@pytest.fixture
def prepare(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that composes a trainer for a plan, as the worker does."""
    from datasets import DatasetDict
    from transformers import set_seed

    def make(plan: Any) -> tuple[TrainingEngine, Any]:
        set_seed(plan.seed)
        config = make_config()
        manager = ModelManager(config)
        model, tokenizer = manager.load_model_with_quantization(plan.model.path)
        model = manager.prepare_for_training(
            model, gradient_checkpointing=plan.memory.gradient_checkpointing
        )
        adapted = LoRAAdapter(plan.adapter).apply_lora(model)
        splits = {name: load_split(Path(plan.dataset.path), name) for name in ("train", "dev")}
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


def first_step_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Return gradients of the first effective batch, with an adapter that is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide what flows through A
                parameter.normal_(std=0.02, generator=generator)
    steps = iter(trainer.get_train_dataloader())
    (step,), trained = trainer.get_batch_samples(steps, 1, trainer.args.device)
    trainer.training_step(trainer.model, step, trained)
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


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
    batch, *_ = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.get_base_model()

    def loss(labels: torch.Tensor) -> float:
        with torch.no_grad():
            return float(summed_loss(model, {**batch, "labels": labels}, 64))

    labels = batch["labels"]
    assert bool((labels == IGNORED_LABEL).any())
    assert bool((labels[:, 0] == IGNORED_LABEL).all())
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
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


@pytest.mark.parametrize(
    ("micro", "recompute", "chunk", "packing"),
    [
        (4, False, 4096, False),
        (1, False, 4096, False),
        (16, True, 32, False),
        (64, False, 4096, True),
        (16, True, 32, True),
        (1, False, 4096, True),
    ],
)
def test_every_split_of_the_effective_batch_gives_the_same_gradient(
    prepare: Any,
    make_plan: Any,
    micro: int,
    recompute: bool,
    chunk: int,
    packing: bool,
) -> None:
    """Padded or packed, small or large, recomputed or not: as 64 padded rows at once, in fp32."""
    _, trainer = prepare(make_plan("whole", micro_batch_size=64, effective_batch_size=64))
    whole = first_step_gradients(trainer)
    _, trainer = prepare(
        make_plan(
            "split",
            micro_batch_size=micro,
            effective_batch_size=64,
            gradient_checkpointing=recompute,
            loss_chunk_tokens=chunk,
            packing=packing,
        )
    )
    split = first_step_gradients(trainer)
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
    batch, *_ = next(iter(trainer.get_train_dataloader()))
    core = trainer.model.get_base_model()

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        summed_loss(core, batch, 64).backward()
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


@pytest.mark.parametrize(
    "path",
    [
        # padded, which is what CPUs do, is in tests/worker/test_worker.py too
        pytest.param({}, id="padded", marks=pytest.mark.slow),
        pytest.param({"packing": True}, id="packed", marks=pytest.mark.slow),
        pytest.param(FUSED, id="fused"),
    ],
)
def test_a_resumed_run_ends_bit_identical(
    prepare: Any, make_plan: Any, path: dict[str, Any]
) -> None:
    """Stopped in the second epoch and resumed from there, every adapter bit is the same.

    An epoch is 6 steps of 16 rows in several micro-batches; dropout makes the generators matter.
    """
    dropout = 0.0 if path == FUSED else 0.1  # the fused path has none
    adapter = make_plan().adapter.model_copy(update={"dropout": dropout})
    schedule = {"total_steps": 8, "evaluate_every_steps": 4, **path}
    schedule |= {"micro_batch_size": 4, "adapter": adapter}
    _, undisturbed = prepare(make_plan("undisturbed", **schedule))
    undisturbed.train()
    engine, first = prepare(make_plan("resumed", **schedule))
    first.add_callback(_StopAt(engine, 7))
    with pytest.raises(Exception, match="asked to stop"):
        engine.train_model(first)
    checkpoint = engine.job.checkpoints / "step-000007"
    plan = make_plan("resumed", **schedule, attempt=2, resume_from=str(checkpoint))
    engine, second = prepare(plan)
    engine.train_model(second)
    assert fingerprint(adapter_tensors(second)) == fingerprint(adapter_tensors(undisturbed))
    wanted = [entry for entry in undisturbed.state.log_history if "eval_loss" in entry]
    got = [entry for entry in second.state.log_history if "eval_loss" in entry]
    assert [entry["eval_loss"] for entry in got] == [entry["eval_loss"] for entry in wanted]


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_changed_micro_batch_continues_the_same_steps(
    prepare: Any, make_plan: Any, packing: bool
) -> None:
    """After a shrink from 16 x 1 to 4 x 4 the run sees the same rows and ends at the same step."""
    schedule = {"total_steps": 8, "evaluate_every_steps": 4, "packing": packing}
    _, undisturbed = prepare(make_plan("undisturbed", **schedule))
    undisturbed.train()
    engine, first = prepare(make_plan("shrunk", **schedule))
    first.add_callback(_StopAt(engine, 4))
    with pytest.raises(Exception, match="asked to stop"):
        engine.train_model(first)
    checkpoint = engine.job.checkpoints / "step-000004"
    smaller = {"micro_batch_size": 4, "attempt": 2}
    engine, second = prepare(
        make_plan("shrunk", **schedule, **smaller, resume_from=str(checkpoint))
    )
    engine.train_model(second)
    assert second.state.global_step == undisturbed.state.global_step == 8
    reference, result = adapter_tensors(undisturbed), adapter_tensors(second)
    for name in reference:
        assert torch.allclose(reference[name], result[name], atol=2e-4), name


def test_a_resumed_run_reads_no_row_of_the_steps_before(
    prepare: Any, make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 of 6 an epoch, the rows fetched are those of the steps that are left."""
    from qwen3ft.training.batches import StepRows

    schedule = {"total_steps": 5, "evaluate_every_steps": 5, "packing": True}
    engine, first = prepare(make_plan("first", **schedule))
    engine.train_model(first)
    checkpoint = engine.job.checkpoints / "step-000005"
    plan = make_plan(
        "first", **{**schedule, "total_steps": 6}, attempt=2, resume_from=str(checkpoint)
    )
    engine, second = prepare(plan)
    fetched: list[int] = []
    get = StepRows.__getitem__
    monkeypatch.setattr(
        StepRows, "__getitem__", lambda rows, numbers: fetched.extend(numbers) or get(rows, numbers)
    )
    engine.train_model(second)
    assert len(fetched) == 16


def test_the_heartbeat_beats_between_micro_batches(prepare: Any, make_plan: Any) -> None:
    """A step of 16 micro-batches beats 15 times before its end: a long step is not a stall."""
    from transformers import TrainerCallback

    engine, trainer = prepare(
        make_plan(
            micro_batch_size=1,
            total_steps=1,
            evaluate_every_steps=1,
        )
    )
    beats: list[int] = []

    class Count(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            beats.append(state.global_step)

    trainer.add_callback(Count())
    engine.train_model(trainer)
    assert beats == [0] * 15


def test_packing_does_not_change_the_evaluation(prepare: Any, make_plan: Any) -> None:
    """The held-out loss of a packed run is that of a padded one, to the last bit."""
    losses = []
    for packing in (False, True):
        _, trainer = prepare(make_plan(f"run-{packing}", packing=packing))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


class _StopAt:
    """A callback that asks the engine to stop during `step`, as a SIGTERM would."""

    def __new__(cls, engine: TrainingEngine, step: int) -> Any:
        from transformers import TrainerCallback

        class StopAt(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step + 1 == step:
                    engine.stop.signal_name = "SIGTERM"

        return StopAt()


# --- the fused path ---


def test_a_fused_run_learns_what_the_plain_one_does(prepare: Any, make_plan: Any) -> None:
    """Six steps: the loss of each within 1e-4, each tensor of the adapter within 1e-3."""
    schedule = {"total_steps": 6, "evaluate_every_steps": 3, "packing": True}
    schedule |= {"micro_batch_size": 4}
    runs, seen = {}, set()
    for name, path in (("plain", {}), ("fused", FUSED)):
        engine, trainer = prepare(make_plan(name, **{**schedule, **path}))
        assert (trainer.fused is not None) == (name == "fused")
        if name == "fused":
            choose = trainer.fused.choose_levels
            trainer.fused.choose_levels = lambda tokens, c=choose: (
                seen.update(c(tokens)) or c(tokens)
            )
        engine.train_model(trainer)
        history = trainer.state.log_history
        losses = [entry.get("loss", entry.get("eval_loss")) for entry in history]
        runs[name] = [loss for loss in losses if loss is not None], adapter_tensors(trainer)
    (plain_losses, plain), (fused_losses, fused) = runs["plain"], runs["fused"]
    assert len(seen) > 1  # a mix of levels, or the comparison would say little
    assert len(plain_losses) == 6 + 3
    assert plain_losses[-1] < 0.98 * plain_losses[0]
    assert fused_losses == pytest.approx(plain_losses, rel=1e-4)
    for name, wanted in plain.items():
        assert float((fused[name] - wanted).norm() / wanted.norm()) <= 1e-3, name


def test_an_adapter_of_the_fused_path_is_pefts(
    prepare: Any, make_plan: Any, make_config: Any, tmp_path: Path
) -> None:
    """Saved, and loaded by PEFT onto the quantised base: the same held-out loss."""
    from peft import PeftModel

    plan = make_plan(total_steps=4, evaluate_every_steps=2, **FUSED)
    engine, trainer = prepare(plan)
    engine.train_model(trainer)
    engine.save_model(trainer, str(tmp_path / "adapter"))
    base, _ = ModelManager(make_config()).load_model_with_quantization(plan.model.path)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batches = list(trainer.get_eval_dataloader())
    with torch.no_grad():
        loss = sum(summed_loss(model.get_base_model(), batch, 64).item() for batch in batches)
    outcome = engine.outcome(trainer)
    assert outcome.best_held_out_loss < outcome.first_held_out_loss
    mean = loss / sum(map(trained_tokens, batches))
    assert mean == pytest.approx(outcome.best_held_out_loss, rel=1e-5)


# --- numbers read late ---


def test_numbers_that_are_read_late_are_the_same(prepare: Any, make_plan: Any) -> None:
    """Each step once, in order, before the evaluation and in the checkpoint that come after it."""
    from transformers import TrainerCallback

    lines, late = {}, []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs and logs["step"] < state.global_step:
                late.append(logs["step"])

    for lag in (0, 1):
        engine, trainer = prepare(
            make_plan(
                f"lag-{lag}",
                total_steps=7,
                evaluate_every_steps=3,
                keep_checkpoints=5,
                packing=True,
            )
        )
        assert trainer.late.lag == 0  # on a CPU there is nothing to wait for
        trainer.late.lag = lag
        trainer.add_callback(Watch())
        engine.train_model(trainer)
        text = engine.job.metrics.read_text(encoding="utf-8")
        lines[lag] = [json.loads(line) for line in text.splitlines()]
    assert late == [1, 2, 4, 5]
    differing = {"timestamp", "memory_usage", "tokens_per_second"}
    same = [
        [{name: value for name, value in line.items() if name not in differing} for line in run]
        for run in lines.values()
    ]
    assert same[0] == same[1]
    losses = [line["loss"] for line in lines[1] if line["loss"] is not None]
    assert losses[-1] < losses[0]  # each is of its own step: a sum over steps would grow
    steps = [(line["step"], line["held_out_loss"] is not None) for line in lines[1]]
    evaluations = {0, 3, 6, 7}
    assert steps == sorted(
        {(step, False) for step in range(1, 8)} | {(s, True) for s in evaluations}
    )
    assert all(line["tokens_per_second"] > 0 for line in lines[1] if line["loss"] is not None)
    for step in evaluations - {0}:
        state = engine.job.checkpoints / f"step-{step:06}" / "trainer_state.json"
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        assert [e["step"] for e in history if "loss" in e] == list(range(1, step + 1))


@pytest.mark.parametrize("lag", [0, 1])
def test_gradients_that_are_not_finite_end_the_run(prepare: Any, make_plan: Any, lag: int) -> None:
    """Also if earlier steps are not logged yet; a diverged step is never logged as a good one."""
    plan = make_plan(total_steps=6, evaluate_every_steps=6, **FUSED)
    engine, trainer = prepare(plan)
    trainer.late.lag = lag
    trainer.add_callback(_PoisonAt(3))
    with pytest.raises(DivergedError, match="at step 3 is nan"):
        engine.train_model(trainer)
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, 3 - lag))


class _PoisonAt:
    """A callback that puts a NaN into the adapter before `step`."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class PoisonAt(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == step:
                    parameters = kwargs["model"].parameters()
                    trained = next(p for p in parameters if p.requires_grad)
                    trained.data[0, 0] = float("nan")

        return PoisonAt()
