"""The decoder's greedy answers beside those of transformers' `generate`: bf16 on a GPU, else fp32.

    python -m benchmarks.answers.agreement [--device cuda] [--out FILE]

Trains the embedded model as deployments/configs/embedded.yaml says, then asks base and adapter all
of its 480 held-out questions. Where two answers part, the same model in fp32 says how far its two
likeliest next tokens lie apart: bf16 has 8 bits, so what is nearly a tie may fall either way. Exits
with 1 if fewer than 98 % of the adapter's are equal (on a CPU fewer than all of both models'), or
if they part at more than 0.1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.embedded import run_once
from benchmarks.machine import machine, write_json

LEAST_EQUAL, NEAR_TIE = 0.98, 0.1
NEW_TOKENS = 32
SLOTS, PAGES, MOST_TOKENS, CHUNK_TOKENS = 64, 300, 128, 64
BATCH = 48


def main() -> None:
    """Train, ask both, print how many answers are equal, and each place where two part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qwen3ft-agreement-"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work}/mlruns/mlflow.db"
    os.environ["PREFECT_HOME"] = str(work / "prefect")
    (work / "mlruns").mkdir()
    run_once(work, 0)
    [settings] = (work / "out").glob("*/adapter_config.json")
    on_gpu = arguments.device == "cuda"
    found = compare(settings.parent, arguments.device)
    print(f"\n{machine()['date']}  {machine()['gpu'] if on_gpu else 'CPU'}, {_dtype(on_gpu)}")
    for label, row in found.items():
        print(f"  {label:8} {row['equal']} of {row['questions']} equal to `generate`'s")
        for part in row["parted"]:
            print(f"    question {part['question']}, token {part['token']}: {part['gap']:.4f}")
    if arguments.out:
        write_json(arguments.out, {"machine": machine(), **found})
    passed = _passes(found["adapter"]) if on_gpu else not any(r["parted"] for r in found.values())
    sys.exit(0 if passed else 1)


def _dtype(on_gpu: bool) -> str:
    return "bfloat16" if on_gpu else "float32"


def _passes(row: dict[str, Any]) -> bool:
    near = all(part["gap"] <= NEAR_TIE for part in row["parted"])
    return near and row["equal"] >= LEAST_EQUAL * row["questions"]


def compare(adapter: Path, device: str) -> dict[str, Any]:
    """Return by model how many answers are equal, and where the others part."""
    import torch

    from qwen3ft.chat.rendering import prompt_ids
    from qwen3ft.decoding.projections import BASE
    from qwen3ft.disk.files import read_json_lines
    from qwen3ft.embedded import DATA_DIR, MODEL_DIR
    from qwen3ft.model.manager import load_tokenizer

    tokenizer = load_tokenizer(MODEL_DIR)
    names = ("test.jsonl", "novel.jsonl")
    rows = [row for name in names for row in read_json_lines(DATA_DIR / name)]
    prompts = [prompt_ids(tokenizer, row, False) for row in rows]
    model = _load(MODEL_DIR, adapter, getattr(torch, _dtype(device == "cuda")), device)
    exact = _load(MODEL_DIR, adapter, torch.float32, device)
    ours = _decoded(model, tokenizer, prompts)
    found: dict[str, Any] = {}
    for label, number in (("base", BASE), ("adapter", 0)):
        theirs = _generated(model, tokenizer, prompts, base=number == BASE)
        parted = []
        for question, (prompt, plain) in enumerate(zip(prompts, theirs, strict=True)):
            mine = ours[question, number]
            if mine == plain:
                continue
            token = next(
                (i for i, (a, b) in enumerate(zip(mine, plain, strict=False)) if a != b),
                min(len(mine), len(plain)),
            )
            gap = _gap(exact, [*prompt, *plain[:token]], base=number == BASE)
            parted.append({"question": question, "token": token, "gap": gap})
        equal = len(prompts) - len(parted)
        found[label] = {"questions": len(prompts), "equal": equal, "parted": parted}
    return found


def _load(base: Path, adapter: Path, dtype: Any, device: str) -> Any:
    """Return the 4-bit model with the adapter, computing in `dtype`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qwen3ft.model.manager import keep_trainable_after_eval

    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    # or bitsandbytes repacks the weights on a CPU, for a product that is not of fp32
    keep_trainable_after_eval(model)
    loaded = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return loaded.eval()


def _decoded(model: Any, tokenizer: Any, prompts: list[list[int]]) -> dict[tuple[int, int], Any]:
    """Return the decoder's answers to all questions of both models, in one batch."""
    from qwen3ft.decoding.decoder import Decoder
    from qwen3ft.decoding.projections import BASE
    from qwen3ft.decoding.slots import Query
    from qwen3ft.decoding.writer import AnswerWriter
    from qwen3ft.decoding.writing import AnswerLimits, Marks
    from qwen3ft.planning.decoder_sizes import DecoderSizes

    sizes = DecoderSizes(SLOTS, PAGES, most_tokens=MOST_TOKENS, chunk_tokens=CHUNK_TOKENS)
    marks = Marks.of(tokenizer, [tokenizer.eos_token_id])
    decoder = Decoder(model, ("default",), sizes, marks)
    decoder.capture(draw=False)
    asked = [(question, number) for number in (BASE, 0) for question in range(len(prompts))]
    limits = AnswerLimits(NEW_TOKENS)
    queries = [Query(prompts[question], limits, number) for question, number in asked]
    return {asked[place]: written.tokens for place, written in AnswerWriter(decoder, queries).run()}


def _generated(
    model: Any, tokenizer: Any, prompts: list[list[int]], *, base: bool
) -> list[list[int]]:
    """Return what `generate` answers, up to and with the end token."""
    from contextlib import nullcontext

    import torch

    end = tokenizer.eos_token_id
    answers: list[list[int]] = []
    with model.disable_adapter() if base else nullcontext():
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            ids = [[end] * (width - len(each)) + each for each in batch]
            mask = [[0] * (width - len(each)) + [1] * len(each) for each in batch]
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
            rows = output[:, width:].tolist()
            answers += [row[: row.index(end) + 1] if end in row else row for row in rows]
    return answers


def _gap(model: Any, ids: list[int], *, base: bool) -> float:
    """Return how far the two likeliest next tokens' logits lie apart, in fp32."""
    from contextlib import nullcontext

    import torch

    with torch.no_grad(), model.disable_adapter() if base else nullcontext():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


if __name__ == "__main__":
    main()
