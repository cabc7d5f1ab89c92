"""One contestant in a process of its own: loads the model with its adapters and answers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.answers.cases import Case, prompts
from benchmarks.jobs import RESULT
from benchmarks.machine import DeviceMemory

ADAPTERS = ("candidate", "champion")
RANK, ALPHA = 6, 12


def main() -> None:
    """Run the job whose file is the argument, and print its result."""
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    case = Case(**values["case"])
    memory = DeviceMemory()
    contestants = {"ours": ours, "generate": generate, "continuous": continuous, "vllm": vllm}
    result = contestants[values["contestant"]](case, values)
    result["nvml_gb"] = memory.stop()
    result["tokens_per_second"] = result["tokens"] / result["seconds"]
    answers = result.pop("answers")
    Path(values["folder"], "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    print(RESULT + json.dumps(result))


def load(case: Case, values: dict[str, Any]) -> Any:
    """Return the 4-bit model with random adapters, within the cap."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qwen3ft.config import TrainingConfig
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.model.manager import ModelManager
    from qwen3ft.records.model import PROJECTIONS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    MemoryOptimizer(case.cap_gb, device).optimize_for_training()
    path = values["snapshot"]["path"]
    config = TrainingConfig(model_name=path, max_memory_gb=case.cap_gb)
    base, _ = ModelManager(config).load_model_with_quantization(path)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    model = get_peft_model(base, lora, adapter_name=ADAPTERS[0])
    model.add_adapter(ADAPTERS[1], lora)
    generator = torch.Generator().manual_seed(values["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.set_adapter(ADAPTERS[0])
    return model.eval()


def ours(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Answer with `qwen3ft.decoding`."""
    import torch

    from qwen3ft.decoding.decoder import Decoder
    from qwen3ft.decoding.slots import Query
    from qwen3ft.decoding.writer import AnswerWriter
    from qwen3ft.decoding.writing import AnswerLimits, Marks
    from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES
    from qwen3ft.planning.decoder_sizes import AnswerLoad, choose_sizes
    from qwen3ft.records.model import ModelSnapshot
    from qwen3ft.units import GIB

    asked = prompts(case, values["seed"])
    names = ADAPTERS[: max(1, case.models - 1)]
    models = [-1, 0, 1][: case.models] if case.models > 1 else [0]
    queries = [
        Query(ids, AnswerLimits(length), model, expected_length=0)
        for model in models
        for ids, length in asked
    ]
    model = load(case, values)
    shape = ModelSnapshot.model_validate(values["snapshot"]).shape
    answer_load = AnswerLoad(
        shape,
        (RANK,) * len(names),
        len(queries),
        max(len(query.ids) for query in queries),
        sum(len(query.ids) for query in queries) / len(queries),
        case.new_tokens,
        case.new_tokens / 2,
        drawn=False,
        compute_bytes=model.get_base_model().lm_head.weight.element_size(),
    )
    on_gpu = torch.cuda.is_available()
    used = torch.cuda.memory_allocated() if on_gpu else 0
    room = int(case.cap_gb * GIB) - CUDA_CONTEXT_BYTES - used
    sizes = choose_sizes(answer_load, room, values["slots"] or 256, resident=values["resident"])
    if not on_gpu:
        sizes = sizes and replace(sizes, chunk_tokens=128)
    assert sizes is not None, f"no slot fits in {room / GIB:.2f} GB"
    number, count = values.get("share", (0, 1))  # the sizes are those of all questions
    queries = queries[number::count]
    _synchronize()
    started = time.perf_counter()
    decoder = Decoder(model, names, sizes, Marks(()))
    if on_gpu:
        decoder.capture(draw=False)
    _synchronize()
    prepared = time.perf_counter()
    first = None
    written: dict[int, list[int]] = {}
    for index, answer in _timed(AnswerWriter(decoder, queries)):
        if index is None:
            first = first or time.perf_counter() - prepared
        else:
            written[index] = answer
    _synchronize()
    seconds = time.perf_counter() - prepared
    return {
        "tokens": sum(map(len, written.values())),
        "seconds": seconds,
        "prepare_seconds": prepared - started,
        "first_tokens_seconds": first,
        "sizes": vars(sizes),
        "step_ms": _step_milliseconds(decoder) if on_gpu else None,
        "alone": _alone(decoder, queries[:3]) if values["alone"] else None,
        "same_when_shuffled": _shuffled(decoder, queries, written, values["shuffles"]),
        "reserved_gb": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        "answers": [written[index] for index in range(len(queries))],
    }


def _timed(writer: Any) -> Any:
    for _, ended in writer.bursts():
        yield None, None
        for index, answer in ended:
            yield index, answer.tokens


def _step_milliseconds(decoder: Any) -> float:
    """Return the time of a step with idle slots, from graph replays."""
    _synchronize()
    started = time.perf_counter()
    for _ in range(20):
        decoder.step(draw=False)
    _synchronize()
    return (time.perf_counter() - started) / 20 * 1e3


def _shuffled(
    decoder: Any, queries: list[Any], written: dict[int, list[int]], count: int
) -> int | None:
    """Return how many answers differ when the questions come in other orders."""
    import random

    from qwen3ft.decoding.writer import AnswerWriter

    if not count:
        return None
    different = 0
    for seed in range(count):
        order = list(range(len(queries)))
        random.Random(seed).shuffle(order)
        order = order[: max(1, len(order) * 3 // (4 if seed % 2 else 3))]
        for index, answer in AnswerWriter(decoder, [queries[i] for i in order]).run():
            different += answer.tokens != written[order[index]]
    return different


def _alone(decoder: Any, queries: list[Any]) -> dict[str, float]:
    """Return first-token seconds and tokens/s of questions asked one at a time."""
    from qwen3ft.decoding.writer import AnswerWriter

    firsts, rates = [], []
    for query in queries:
        started = time.perf_counter()
        first, count = 0.0, 0
        for news, _ in AnswerWriter(decoder, [query], burst_steps=2).bursts():
            first = first or time.perf_counter() - started
            count += sum(len(new) for _, new in news)
        firsts.append(first)
        rates.append(count / (time.perf_counter() - started))
    return {"first_seconds": max(firsts), "tokens_per_second": min(rates)}


def generate(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Answer with transformers' `generate`, in padded batches."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    model = load(case, values)
    asked = prompts(case, values["seed"])[: values["most_questions"]]
    size = values["batch"]
    settings = GenerationConfig(
        max_new_tokens=case.new_tokens,
        do_sample=False,
        eos_token_id=-1,  # lengths are drawn; what is left out comes from the model's own settings
        pad_token_id=0,
        use_cache=True,
    )
    answers: list[list[int]] = []
    first = None
    _synchronize()
    started = time.perf_counter()
    for begin in range(0, len(asked), size):
        batch = asked[begin : begin + size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=model.device
        )
        lengths = torch.tensor([length for _, length in batch], device=model.device)

        def ended(
            tokens: Any, _: Any, lengths: Any = lengths, width: int = width, **__: Any
        ) -> Any:
            nonlocal first
            first = first or time.perf_counter() - started
            return tokens.shape[1] - width >= lengths

        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([ended]),
        )
        rows = output[:, width:].tolist()
        answers += [row[:length] for row, (_, length) in zip(rows, batch, strict=True)]
    _synchronize()
    return {
        "tokens": sum(map(len, answers)),
        "seconds": time.perf_counter() - started,
        "first_tokens_seconds": first,
        "answers": answers,
    }


def continuous(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Answer with transformers' continuous batching; every answer has the mean length."""
    from transformers import GenerationConfig

    model = load(case, values)
    asked = prompts(case, values["seed"])[: values["most_questions"]]
    mean = sum(length for _, length in asked) // len(asked)
    settings = GenerationConfig(
        max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    started = time.perf_counter()
    output = model.get_base_model().generate_batch(
        inputs=[ids for ids, _ in asked], generation_config=settings
    )
    in_order = sorted(output.values(), key=lambda each: int(each.request_id.rpartition("_")[2]))
    answers = [list(each.generated_tokens) for each in in_order]
    return {
        "tokens": sum(map(len, answers)),
        "seconds": time.perf_counter() - started,
        "first_tokens_seconds": None,
        "answers": answers,
    }


def vllm(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Answer with vLLM on the same 4-bit files, with the first adapter."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder = Path(values["folder"], "adapter")
    load(case, values).save_pretrained(str(folder), selected_adapters=[ADAPTERS[0]])
    torch.cuda.empty_cache()
    asked = prompts(case, values["seed"])[: values["most_questions"]]
    total_gb = torch.cuda.get_device_properties().total_memory / 2**30
    engine = LLM(
        model=values["snapshot"]["path"],
        quantization="bitsandbytes",
        enable_lora=True,
        max_lora_rank=8,
        max_model_len=256 + case.new_tokens,
        gpu_memory_utilization=case.cap_gb / total_gb,
        seed=values["seed"],
    )
    settings = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in asked
    ]
    started = time.perf_counter()
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids, _ in asked],
        settings,
        lora_request=LoRARequest("first", 1, str(folder / ADAPTERS[0])),
    )
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "tokens": sum(map(len, answers)),
        "seconds": time.perf_counter() - started,
        "first_tokens_seconds": None,
        "answers": answers,
    }


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
