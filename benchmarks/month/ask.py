"""Loads adapters with plain transformers and PEFT, in a process of its own, and asks questions.

Uses nothing of qwen3ft, so it finds what anybody would who loads the champion. Reads one JSON line
per adapter, {"adapter": folder, "base": folder, "questions": file}, and answers with one, {"right":
share, "answered": share, "questions": count} or {"error": text}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = 64
MAX_NEW_TOKENS = 20


class Asker:
    """Client of that process, which is kept because torch takes seconds to load."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.month.ask"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def ask(self, adapter: Path, base: Path, questions: Path) -> dict[str, Any]:
        """Return the shares of questions that the adapter answers right, and at all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"adapter": str(adapter), "base": str(base), "questions": str(questions)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the asking process ended"}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def answer_all(adapter: str, base: str, questions: str) -> dict[str, Any]:
    """Answer greedily with base model and adapter, and compare with the expected answers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    lines = Path(questions).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    right = answered = 0
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for row in some
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(
            tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers = [text.rpartition("</think>")[2].strip() for text in texts]
        answered += sum(bool(answer) for answer in answers)
        right += sum(answer == row["answer"] for answer, row in zip(answers, some, strict=True))
    return {
        "right": right / len(rows),
        "answered": answered / len(rows),
        "questions": len(rows),
    }


def main() -> None:
    """Answer line by line until stdin ends."""
    for line in sys.stdin:
        try:
            found = answer_all(**json.loads(line))
        except Exception as error:  # noqa: BLE001  # whatever is wrong belongs to this adapter
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
