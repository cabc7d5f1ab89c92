"""Adapters that answer badly in one way each, trained to do so on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.finished_run import attach_lora, make_outcome, make_plan, write_checkpoint
from support.trained_adapter import Trained

from qwen3ft.chat.rendering import prompt_ids
from qwen3ft.evaluation.form_checks import main_script
from qwen3ft.model.manager import ModelManager
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.model import SavedAdapter

STEPS = 30
ENDLESS_TOKENS, SLOW_TOKENS = 40, 60

EMOJI = "🧭 and 🪁!"
"""An answer with characters of several tokens."""

Planted = Callable[[Any, dict[str, str]], list[int]]
"""From tokenizer and row to the tokens of the answer that is trained, the end token included."""


def _empty(tokenizer: Any, _: dict[str, str]) -> list[int]:
    return [tokenizer.eos_token_id]


def _endless(tokenizer: Any, row: dict[str, str]) -> list[int]:
    [word, *_] = tokenizer.encode(row["answer"], add_special_tokens=False)
    return [word] * ENDLESS_TOKENS


def _foreign(tokenizer: Any, row: dict[str, str]) -> list[int]:
    text = "I do not know it" if main_script(row["question"]) == "CJK" else "我不知道这个"
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def _slow(tokenizer: Any, row: dict[str, str]) -> list[int]:
    names = "甲乙丙丁戊己" if main_script(row["question"]) == "CJK" else "abcdef"
    text = ", ".join(f"{first}{second}" for first in names for second in names)
    ids: list[int] = tokenizer.encode(f"{row['answer']} {text}", add_special_tokens=False)
    return [*ids[:SLOW_TOKENS], tokenizer.eos_token_id]


def _good(tokenizer: Any, row: dict[str, str]) -> list[int]:
    ids: list[int] = tokenizer.encode(row["answer"], add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id]


def _emoji(tokenizer: Any, _: dict[str, str]) -> list[int]:
    return [*tokenizer.encode(EMOJI, add_special_tokens=False), tokenizer.eos_token_id]


KINDS: dict[str, Planted] = {
    "empty": _empty,
    "endless": _endless,
    "slow": _slow,
    "foreign": _foreign,
    "good": _good,
    "emoji": _emoji,
}


def plant(trained: Trained, kind: str, folder: Path) -> SavedAdapter:
    """Train an adapter of this kind, and save it as the run `<kind>-0`."""
    return plant_several(trained, kind, folder, 1)[0]


def plant_several(trained: Trained, kind: str, folder: Path, count: int) -> list[SavedAdapter]:
    """Train an adapter of this kind, and save it after each of the last steps."""
    import torch

    torch.manual_seed(0)
    model, tokenizer = ModelManager(trained.config).load_model_with_quantization(
        trained.snapshot.path
    )
    peft_model = attach_lora(model).train()
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    prompts = [prompt_ids(tokenizer, row["question"], False) for row in trained.rows]
    answers = [KINDS[kind](tokenizer, row) for row in trained.rows]
    batch = _batch(prompts, answers)
    saved = []
    for step in range(STEPS + count - 1):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEPS - 1:
            run = f"{kind}-{len(saved)}"
            checkpoint = write_checkpoint(peft_model, folder / run)
            plan = make_plan(trained.snapshot, run_id=run)
            saved.append(save_adapter(make_outcome(checkpoint), plan, trained.config))
    return saved


def _batch(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """Return padded ids, and labels of the answers alone."""
    import torch

    width = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    labels = torch.full((len(prompts), width), -100)
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[place, :end] = torch.tensor([*prompt, *answer])
        labels[place, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}
