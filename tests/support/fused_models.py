"""Small quantised models, and what their plain twin makes of a packed row.

Inputs of all projections are a multiple of 64 wide: on a CPU, bitsandbytes 0.50 itself dequantises
others wrongly, by as much as random numbers would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.records.model import PROJECTIONS, ModelShape
from qwen3ft.training.batches import PackedCollator
from qwen3ft.training.loss import summed_loss

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model; its shape is None for the embedded one."""

    shape: ModelShape | None = None
    rank: int = 8
    alpha: int = 16
    quantisation: str = "nf4-double"


def shape_of(**values: Any) -> ModelShape:
    """Return a small shape: heads wider than the hidden size, four queries a key, untied."""
    return ModelShape(
        **{
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 300,
            "tie_word_embeddings": False,
            "max_position_embeddings": 512,
            **values,
        }
    )


CASES = {
    "embedded": Case(),
    "wide heads, rank 3": Case(shape_of(), rank=3, alpha=7),
    "narrow heads, rank 16": Case(
        shape_of(
            hidden_size=192,
            intermediate_size=64,
            num_attention_heads=4,
            tie_word_embeddings=True,
        ),
        rank=16,
        quantisation="fp4",
    ),
}


def build(case: Case, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Return the quantised PEFT model of `case`, with an adapter that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qwen3ft.embedded import MODEL_DIR
    from qwen3ft.model.manager import keep_trainable_after_eval

    source = MODEL_DIR if case.shape is None else _write(case.shape, folder)
    base = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=case.quantisation[:3],
            bnb_4bit_use_double_quant=case.quantisation.endswith("-double"),
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    keep_trainable_after_eval(base)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=case.rank, lora_alpha=case.alpha, target_modules=list(PROJECTIONS))
    model = get_peft_model(base, lora).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide what flows through A
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def _write(shape: ModelShape, folder: Path) -> Path:
    """Return a random model whose attention and MLP matter and whose norms are not ones."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(**shape.model_dump(), initializer_range=0.15)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def in_fp32(quantised: Any, case: Case) -> Any:
    """Return the same weights and adapter in fp32 on the CPU."""
    from peft import LoraConfig, get_peft_model
    from support.fused_cases import dequantised
    from transformers import Qwen3ForCausalLM

    base = Qwen3ForCausalLM(quantised.get_base_model().config).float()
    lora = LoraConfig(r=case.rank, lora_alpha=case.alpha, target_modules=list(PROJECTIONS))
    model = get_peft_model(base, lora).train()
    source = dict(quantised.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = source[name]
            packed = getattr(weight, "quant_state", None) is not None
            parameter.copy_(dequantised(weight) if packed else weight)
    return model


def saved_bytes(model: Any, **inputs: Any) -> int:
    """Return the bytes of the storages, other than parameters, that a forward saves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


def make_row(tokens: int, seed: int, vocabulary: int = 290) -> dict[str, Any]:
    """Return a sequence whose last two thirds are trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (tokens,), generator=generator).tolist()
    prompt = tokens // 3
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * prompt + ids[prompt:]}


def make_batch(*lengths: int, first_seed: int = 0) -> dict[str, Any]:
    """Return a packed row of sequences of these lengths."""
    return PackedCollator(0)([make_row(n, first_seed + i) for i, n in enumerate(lengths)])


def gradients(model: Any) -> Gradients:
    """Return and clear all gradients."""
    result = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in result.values())
    model.zero_grad()
    return result


def plain(model: Any, batch: dict[str, Any]) -> tuple[float, Gradients]:
    """Return loss and gradients of transformers, PEFT and autograd."""
    model.zero_grad()
    device = next(model.parameters()).device
    batch = {n: v.to(device) if torch.is_tensor(v) else v for n, v in batch.items()}
    loss = summed_loss(model.get_base_model(), batch, 64)
    loss.backward()
    return loss.item(), gradients(model)


def errors(ours: Gradients, truth: Gradients) -> dict[str, float]:
    """Return the relative error of each tensor."""
    assert ours.keys() == truth.keys()
    return {
        name: float((ours[name].float() - truth[name].float()).norm() / truth[name].norm())
        for name in truth
    }


def error(ours: Gradients, truth: Gradients) -> float:
    """Return the relative error of all tensors together."""
    assert ours.keys() == truth.keys()
    names = list(truth)
    difference = torch.cat([(ours[n].cpu() - truth[n].cpu()).flatten() for n in names])
    return float(difference.norm() / torch.cat([truth[n].cpu().flatten() for n in names]).norm())
