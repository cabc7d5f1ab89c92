"""Gradients of one batch computed three ways: fused, plain in bf16, and in fp32 throughout.

The third is the reference: the same 4-bit weights, dequantised once, and every product in fp32. It
is the model of the other two, converted afterwards, so adapters and norms are the same. B of the
adapters is random instead of zero, so that A has gradients too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import ROOT
from benchmarks.speed.cases import TINY, Case, workload
from benchmarks.speed.contestants import LORA
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.model.manager import ModelManager, keep_trainable_after_eval
from qwen3ft.planning.recompute import Level
from qwen3ft.training.batches import MicroBatch, PackedCollator, trained_tokens
from qwen3ft.training.fused import element_wise
from qwen3ft.training.fused.step import FusedStep
from qwen3ft.training.loss import summed_loss

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
B_STD = 0.02
MICRO_BATCH_ROWS = 16
"""Rows per micro-batch; the gradient of a batch is the sum over its micro-batches."""

CHUNK_TOKENS = 1024
"""Chunk of logits and of the fused MLP: shorter than a row, so that chunking is measured too."""

LONGEST_TOKENS = 512
TEXTS = {
    "GSM8K": [folder / "shared/data/gsm8k/train.jsonl" for folder in (ROOT, ROOT.parent)],
    "the sample rows": [DATA_DIR / "train.jsonl"],
}


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Return the norms of the reference's gradients and of both paths' differences, by tensor.

    Args:
        values: `case`, `seed`, and `text`: real text instead of the workload's random tokens. For
            shapes other than tiny also `model`, the folder of the 4-bit model, and its number of
            `layers` to use. The tiny model is quantised here, to compute in bf16 on a CPU too.
    """
    from transformers import set_seed

    case, seed = Case(**values["case"]), values["seed"]
    set_seed(seed)
    tokenizer = load_tokenizer(MODEL_DIR)
    model = _load(
        MODEL_DIR if case.shape == TINY else Path(values["model"]), quantize=case.shape == TINY
    )
    if case.shape != TINY:
        model.model.layers = model.model.layers[: values["layers"]]
        model.config.num_hidden_layers = len(model.model.layers)
    if values["text"]:
        text, rows = _text_rows(tokenizer, case.sequences_per_step)
    else:
        text = "random tokens"
        ids = workload(case, case.sequences_per_step, seed)
        rows = [{"input_ids": row, "labels": row} for row in ids]
    adapted = _adapt(model, seed)
    collate = PackedCollator(tokenizer.pad_token_id)
    batch = [
        collate(rows[start : start + MICRO_BATCH_ROWS])
        for start in range(0, len(rows), MICRO_BATCH_ROWS)
    ]
    fused_loss, fused = _gradients(adapted, _fused, batch)
    plain_loss, plain = _gradients(adapted, _plain, batch)
    with _full_precision(adapted):
        true_loss, true = _gradients(adapted, _reference, batch)
    tokens = sum(trained_tokens(micro_batch) for micro_batch in batch)
    return {
        "layers": len(model.model.layers),
        "text": text,
        "rows": len(rows),
        "tokens": sum(micro_batch["real_tokens"] for micro_batch in batch),
        "trained_tokens": tokens,
        "losses": {
            "fused": fused_loss / tokens,
            "plain": plain_loss / tokens,
            "reference": true_loss / tokens,
        },
        "tensors": {
            name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): {
                "reference": _norm(gradient),
                "fused": _norm(fused[name] - gradient),
                "plain": _norm(plain[name] - gradient),
            }
            for name, gradient in true.items()
        },
    }


def _load(folder: Path, *, quantize: bool) -> Any:
    """Load the 4-bit model with products in bf16, prepared as in the worker's plain path."""
    from transformers import AutoModelForCausalLM

    manager = ModelManager(TrainingConfig())
    settings: dict[str, Any] = {}
    if quantize:
        settings["quantization_config"] = manager.configure_quantization("nf4-double", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0} if CUDA else "cpu",
        attn_implementation="sdpa",
        local_files_only=True,
        **settings,
    )
    keep_trainable_after_eval(model)
    return manager.prepare_for_training(model, gradient_checkpointing=True)


def _adapt(model: Any, seed: int) -> Any:
    """Add an fp32 adapter with a normally distributed B, the same on every machine."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            values = torch.empty(parameter.shape).normal_(0, B_STD, generator=generator)
            parameter.data.copy_(values)
    return adapted


def _text_rows(tokenizer: Any, count: int) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of the text and its first rows that are short enough; answers are trained."""
    found = ((name, path) for name, paths in TEXTS.items() for path in paths if path.exists())
    name, path = next(found)
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line) for line in itertools.islice(lines, 8 * count)]
    tokenized = tokenize_rows(
        tokenizer, [{key: row[key] for key in ("question", "answer")} for row in texts]
    )
    short = [row for row in tokenized if len(row.input_ids) <= LONGEST_TOKENS]
    return name, [
        {"input_ids": row.input_ids, "trained": list(itertools.chain(*row.trained))}
        for row in short[:count]
    ]


def _gradients(
    adapted: Any,
    make_loss: Callable[[Any], Callable[[MicroBatch], torch.Tensor]],
    batch: list[MicroBatch],
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of all micro-batches and its gradient for each adapter tensor.

    Raises:
        RuntimeError: A tensor has no gradient.
    """
    adapted.zero_grad(set_to_none=True)
    loss_of = make_loss(adapted)
    total = 0.0
    with sdpa_kernel(SDPBackend.MATH) if make_loss is _reference else nullcontext():
        for micro_batch in batch:
            loss = loss_of(micro_batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
    gradients = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient")
            gradients[name] = parameter.grad.float().clone()
    return total, gradients


def _fused(adapted: Any) -> Callable[[MicroBatch], torch.Tensor]:
    """Compute the loss as `QATrainer` does with kernels 'fused'; blocks cycle through levels."""
    blocks = len(adapted.get_base_model().model.layers)
    levels = tuple(itertools.islice(itertools.cycle(Level), blocks))
    return FusedStep(
        adapted,
        element_wise("cuda" if CUDA else "cpu"),
        lambda _: levels,
        loss_chunk_tokens=CHUNK_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
    )


def _plain(adapted: Any) -> Callable[[MicroBatch], torch.Tensor]:
    """Compute the loss as `QATrainer` does with kernels 'plain'."""

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return summed_loss(adapted.get_base_model(), _on_device(batch), CHUNK_TOKENS)

    return loss_of


def _reference(adapted: Any) -> Callable[[MicroBatch], torch.Tensor]:
    return lambda batch: summed_loss(adapted.get_base_model(), _on_device(batch), CHUNK_TOKENS)


@contextmanager
def _full_precision(adapted: Any) -> Iterator[None]:
    """Turn the model into the fp32 reference, for good; without TF32 inside the context."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in list(adapted.modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, Linear4bit):
            state = base.weight.quant_state
            linear = torch.nn.Linear(base.in_features, base.out_features, False, device="meta")
            values = dequantize_4bit(base.weight.data, state).reshape(state.shape).float()
            linear.weight = torch.nn.Parameter(values, requires_grad=False)
            module.base_layer = linear
    for parameter in adapted.parameters():
        parameter.data = parameter.data.float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _on_device(batch: MicroBatch) -> MicroBatch:
    return {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())
