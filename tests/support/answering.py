"""A small model with two adapters, and its greedy answers by transformers' `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.fused_models import CASES, build

from qwen3ft.chat.rendering import prompt_ids
from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.projections import BASE
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import AnswerWriter, Written
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.disk.files import read_json_lines
from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.model.manager import load_tokenizer
from qwen3ft.planning.decoder_sizes import DecoderSizes
from qwen3ft.records.model import PROJECTIONS

ADAPTERS = ("default", "other")
MODELS = (BASE, 0, 1)
NEW_TOKENS = 16
GREEDY = AnswerLimits(NEW_TOKENS)

Asked = tuple[int, int]
"""A question by its index, and the number of the model."""


def two_adapters(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return the embedded model with two adapters of different rank."""
    from peft import LoraConfig

    model = build(CASES["embedded"], folder, dtype, device).eval()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(PROJECTIONS))
    model.add_adapter("other", lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def embedded_prompts() -> list[list[int]]:
    """Return the prompts of the embedded model's 480 held-out questions."""
    tokenizer = load_tokenizer(MODEL_DIR)
    rows = [
        row for name in ("test", "novel") for row in read_json_lines(DATA_DIR / f"{name}.jsonl")
    ]
    return [prompt_ids(tokenizer, row, False) for row in rows]


def marks() -> Marks:
    """Return the marks of the embedded model's tokenizer."""
    tokenizer = load_tokenizer(MODEL_DIR)
    return Marks.of(tokenizer, [tokenizer.eos_token_id])


def make_decoder(model: Any, *, pages: int = 30, slots: int = 8, draws: int = 0) -> Decoder:
    """Return a decoder for `embedded_prompts`, captured on a GPU."""
    sizes = DecoderSizes(slots=slots, pages=pages, most_tokens=128, chunk_tokens=64)
    decoder = Decoder(model, ADAPTERS, sizes, marks(), draws)
    decoder.capture(draw=draws > 0)
    return decoder


def ask(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Asked],
    limits: AnswerLimits = GREEDY,
) -> dict[Asked, Written]:
    """Return the decoder's answers, asked in this order."""
    queries = [Query(prompts[index], limits, model) for index, model in asked]
    return {asked[place]: written for place, written in AnswerWriter(decoder, queries).run()}


def generated(model: Any, prompts: Sequence[Sequence[int]]) -> dict[Asked, list[int]]:
    """Return what `generate` answers with each model, up to and with the end token."""
    from transformers import GenerationConfig

    ends = marks().ends
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=list(ends), pad_token_id=0
    )
    answers: dict[Asked, list[int]] = {}
    for number in MODELS:
        if number != BASE:
            model.set_adapter(ADAPTERS[number])
        with model.disable_adapter() if number == BASE else contextlib.nullcontext():
            for start in range(0, len(prompts), 48):
                batch = prompts[start : start + 48]
                width = max(map(len, batch))
                ids = [[0] * (width - len(each)) + list(each) for each in batch]
                mask = [[0] * (width - len(each)) + [1] * len(each) for each in batch]
                output = model.generate(
                    input_ids=torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    generation_config=settings,
                )
                for place, row in enumerate(output[:, width:].tolist()):
                    end = next((i for i, token in enumerate(row) if token in ends), len(row))
                    answers[start + place, number] = row[: end + 1]
    return answers
