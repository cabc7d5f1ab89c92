"""One job of the speed benchmark: `python -m benchmarks.speed.contestants JOB.json`.

A job trains a contestant, makes a model, or measures the floor. Its last line of output is the
result; a job that fails raises, and the campaign reads the reason from the end of the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.jobs import RESULT
from benchmarks.machine import DeviceMemory
from benchmarks.speed.cases import LEARNING_RATE, LORA_ALPHA, LORA_RANK, OURS, UNSLOTH, Job

LORA: dict[str, Any] = {
    "r": LORA_RANK,
    "lora_alpha": LORA_ALPHA,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ],
}


def run_peer(job: Job) -> dict[str, Any]:
    """Train with Transformers' Trainer and PEFT, with TRL, or with Unsloth."""
    contestant = job.entry.contestant
    if contestant in UNSLOTH:
        importlib.import_module("unsloth")  # it patches the others, so it must come first
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed

    from benchmarks.speed.probe import Clock, EmbeddedTokens, cap_memory

    cap_memory(job.entry.case.cap_gb)
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.snapshot["path"], local_files_only=True)
    rows = Dataset.from_dict({"input_ids": job.rows()})
    model = _unsloth_model(job) if contestant in UNSLOTH else _peer_model(job)
    make: Callable[..., Any] = _hf_trainer if contestant == "hf" else _sft_trainer
    trainer = make(job, model, tokenizer, rows)
    counter = EmbeddedTokens(trainer.model)
    clock = Clock(job.warmup, job.started, counter.drain)
    trainer.add_callback(clock)
    trainer.train()
    parameters = trainer.model.parameters()
    return clock.result() | {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "cuda": torch.cuda.is_available(),
        **(_unsloth_attention() if contestant in UNSLOTH else {}),
    }


def _peer_model(job: Job) -> Any:
    """Load the 4-bit model with transformers; for the Trainer, with its adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job.snapshot["path"],
        dtype=getattr(torch, job.snapshot["compute_dtype"]),
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
        attn_implementation="sdpa",
        local_files_only=True,
    )
    if job.entry.contestant != "hf":
        return model  # TRL attaches the adapter itself
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=job.entry.settings.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.config.use_cache = False
    return model


def _unsloth_model(job: Job) -> Any:
    import torch

    fast: Any = importlib.import_module("unsloth").FastLanguageModel
    tokens = job.entry.case.sequence_tokens
    model, _ = fast.from_pretrained(
        job.snapshot["path"],
        max_seq_length=tokens,
        load_in_4bit=True,
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    return fast.get_peft_model(
        model,
        **LORA,
        use_gradient_checkpointing="unsloth" if job.entry.settings.recompute else False,
        random_state=job.seed,
        max_seq_length=tokens,
    )


def _unsloth_attention() -> dict[str, Any]:
    """Return which attention packages Unsloth found; with neither it uses torch's."""
    found = importlib.import_module("unsloth.utils.attention_dispatch")
    names = ("HAS_FLASH_ATTENTION", "HAS_XFORMERS")
    return {name.lower(): getattr(found, name, None) for name in names}


def _arguments(job: Job, kind: type[Any], **more: Any) -> Any:
    """Return training arguments of `kind`, equal for all peers, without those it does not know."""
    import torch

    cuda = torch.cuda.is_available()
    settings = job.entry.settings
    values: dict[str, Any] = {
        "output_dir": str(job.folder / "out"),
        "per_device_train_batch_size": settings.micro,
        "gradient_accumulation_steps": settings.accumulate,
        "max_steps": job.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "paged_adamw_8bit" if cuda else "adamw_torch",
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": job.seed,
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        **more,
    }
    known = {field.name for field in fields(kind)}
    if "gradient_checkpointing" not in known:  # renamed in transformers 5.23
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if name in values:
                values[name.replace("gradient", "activation")] = values.pop(name)
    if left_out := sorted(values.keys() - known):
        print(f"{kind.__name__} has no {', '.join(left_out)}", flush=True)
    return kind(**{name: value for name, value in values.items() if name in known})


def _hf_trainer(job: Job, model: Any, tokenizer: Any, rows: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    arguments = _arguments(
        job,
        TrainingArguments,
        gradient_checkpointing=job.entry.settings.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)


def _sft_trainer(job: Job, model: Any, tokenizer: Any, rows: Any) -> Any:
    trl: Any = importlib.import_module("trl")
    contestant = job.entry.contestant
    more: dict[str, Any] = {
        "max_length": job.entry.case.sequence_tokens,
        "packing": "pack" in contestant,
        "dataset_num_proc": 1,
    }
    adapter: dict[str, Any] = {}
    if "liger" in contestant:
        more["use_liger_kernel"] = True
    if contestant not in UNSLOTH:
        from peft import LoraConfig

        adapter["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **LORA)
        more["gradient_checkpointing"] = job.entry.settings.recompute
    return trl.SFTTrainer(
        model=model,
        args=_arguments(job, trl.SFTConfig, **more),
        train_dataset=rows,
        processing_class=tokenizer,
        **adapter,
    )


def _make_model(values: dict[str, Any], _: DeviceMemory) -> dict[str, Any]:
    from benchmarks.speed.model import prepare

    return prepare(values["shape"], Path(values["work"]), values["seed"])


def _floor(values: dict[str, Any], _: DeviceMemory) -> dict[str, Any]:
    from benchmarks.speed.floor import measure

    return measure(values["shape"], values["lengths"])


def _contestant(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    job = Job.read(values)
    if job.entry.contestant in OURS:
        from benchmarks.speed.ours import run_ours

        result = run_ours(job)
    else:
        result = run_peer(job)
    return result | {"nvml_peak_gb": memory.stop()}


KINDS = {"model": _make_model, "floor": _floor, "contestant": _contestant}


def main(path: Path) -> None:
    """Run the job that the file describes and print its result as the last line."""
    if sys.platform == "linux":  # die with the parent process
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "WANDB_DISABLED": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    values = json.loads(path.read_text(encoding="utf-8"))
    memory = DeviceMemory()  # before anything touches the GPU
    result = KINDS[values["kind"]](values, memory)
    memory.stop()
    print("\n" + RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
