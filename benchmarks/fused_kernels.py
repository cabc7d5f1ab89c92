"""Time and bandwidth of each Triton kernel of the fused step, at the sizes of Qwen3 4B.

    python -m benchmarks.fused_kernels [--tokens 7168] [--out FILE]

Needs a CUDA device. Each function runs in a CUDA graph, which keeps Python's time out, over sets of
tensors that together exceed any L2 cache. The time until one ordinary call returns is listed too.
Bytes are the necessary ones: each number once in and once out, logits twice in.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2560, 9728, 32, 8, 128, 151_936
RANK = 24
"""Adapter columns behind each row, as in a training step."""
LOSS_ROWS = 1024
CACHE_BYTES = 400 * 2**20
"""Least memory that one round of the graph touches, three times the largest L2 cache sold."""
MEASURED_SECONDS = 0.3
EPS = 1e-6

Case = tuple[str, int, Callable[[], Callable[[], Any]]]
"""Name, bytes moved by a call, and a function that returns a call with its own tensors."""


def cases(tokens: int) -> list[Case]:
    """Return all functions, at the sizes of a block and of a chunk of the loss."""
    import torch

    from qwen3ft.training.fused.kernels import TritonOps

    def random(*shape: int, behind: int = 0) -> torch.Tensor:
        full = torch.randn(*shape[:-1], shape[-1] + behind, dtype=torch.bfloat16, device="cuda")
        return full[..., : shape[-1]]

    norm, head_norm = random(HIDDEN), random(HEAD_DIM)
    angles = torch.rand(tokens, HEAD_DIM // 2, device="cuda") * 6.3
    cos, sin = angles.cos(), angles.sin()

    def rms_norm() -> Callable[[], Any]:
        x, out = random(tokens, HIDDEN), random(tokens, HIDDEN, behind=RANK)
        return lambda: TritonOps.rms_norm(x, norm, EPS, out)

    def rms_norm_backward() -> Callable[[], Any]:
        d_out, x, d_x = (random(tokens, HIDDEN) for _ in range(3))
        return lambda: TritonOps.rms_norm_backward(d_out, x, norm, EPS, d_x)

    def heads_of(count: int) -> torch.Tensor:
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        return random(tokens, width)[:, : count * HEAD_DIM].unflatten(1, (count, HEAD_DIM))

    def norm_rotate(count: int) -> Callable[[], Any]:
        heads = heads_of(count)
        return lambda: TritonOps.norm_rotate(heads, head_norm, cos, sin, EPS)

    def norm_rotate_backward(count: int) -> Callable[[], Any]:
        heads, d_out = heads_of(count), random(tokens, count, HEAD_DIM)
        return lambda: TritonOps.norm_rotate_backward(d_out, heads, head_norm, cos, sin, EPS)

    def silu_mul() -> Callable[[], Any]:
        gate_up, out = random(tokens, 2 * INTERMEDIATE), random(tokens, INTERMEDIATE, behind=RANK)
        return lambda: TritonOps.silu_mul(gate_up, out)

    def silu_mul_backward() -> Callable[[], Any]:
        gate_up, d_out = random(tokens, 2 * INTERMEDIATE), random(tokens, INTERMEDIATE, behind=RANK)
        return lambda: TritonOps.silu_mul_backward(d_out, gate_up)

    def cross_entropy() -> Callable[[], Any]:
        logits = random(LOSS_ROWS, VOCABULARY)
        targets = torch.randint(VOCABULARY, (LOSS_ROWS,), device="cuda")
        return lambda: TritonOps.cross_entropy(logits, targets)

    rows, mlp, table = 2 * tokens * HIDDEN, 2 * tokens * INTERMEDIATE, 4 * tokens * HEAD_DIM
    found: list[Case] = dequantising()
    found += [("rms_norm", 2 * rows, rms_norm), ("rms_norm_backward", 4 * rows, rms_norm_backward)]
    for count in (HEADS, KV_HEADS):
        some = 2 * tokens * count * HEAD_DIM
        found += [
            (f"norm_rotate {count}", 2 * some + table, lambda n=count: norm_rotate(n)),
            (
                f"norm_rotate_backward {count}",
                3 * some + table,
                lambda n=count: norm_rotate_backward(n),
            ),
        ]
    found += [
        ("silu_mul", 3 * mlp, silu_mul),
        ("silu_mul_backward", 6 * mlp, silu_mul_backward),
        (f"cross_entropy {LOSS_ROWS}", 3 * 2 * LOSS_ROWS * VOCABULARY, cross_entropy),
    ]
    return found


def dequantising() -> list[Case]:
    """Return dequantisation of each group of projections, and of gate by bitsandbytes."""
    import bitsandbytes
    import bitsandbytes.functional as bnb
    import torch

    from qwen3ft.training.fused.kernels import TritonOps
    from qwen3ft.training.fused.weights import FourBitWeight

    def weight(rows: int, columns: int) -> Any:
        plain = torch.randn(rows, columns, dtype=torch.bfloat16)
        made = bitsandbytes.nn.Params4bit(plain, requires_grad=False, quant_type="nf4")
        return made.to("cuda")

    def moved(numbers: int, adapter: int = 0) -> int:
        return numbers * 2 + numbers // 2 + numbers // 64 + 4 * adapter

    def ours(rows: tuple[int, ...], columns: int, beside: int, below: int) -> Callable[[], Any]:
        how: Any = {"dtype": torch.bfloat16, "device": "cuda"}
        weights = [FourBitWeight.of(weight(count, columns)) for count in rows]
        out = torch.empty(sum(rows) + below, columns + beside, **how)
        right = torch.randn(sum(rows), beside, **how) if beside else None
        under = torch.randn(below, columns, **how) if below else None
        return lambda: TritonOps.dequantize(weights, out, right, under)

    def theirs() -> Callable[[], Any]:
        quantised = weight(INTERMEDIATE, HIDDEN)
        return lambda: bnb.dequantize_4bit(quantised.data, quantised.quant_state)

    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found: list[Case] = []
    for name, rows, columns, beside, below in (
        ("q, k, v", (query, key, key), HIDDEN, 3 * RANK, 0),
        ("o", (HIDDEN,), query, 0, RANK),
        ("gate, up", (INTERMEDIATE, INTERMEDIATE), HIDDEN, 2 * RANK, 0),
        ("down", (HIDDEN,), INTERMEDIATE, 0, RANK),
        ("gate", (INTERMEDIATE,), HIDDEN, 0, 0),
        ("k", (key,), HIDDEN, 0, 0),
    ):
        size = sum(rows) * columns
        make = functools.partial(ours, rows, columns, beside, below)
        found.append(
            (f"dequantize {name}", moved(size, sum(rows) * beside + below * columns), make)
        )
    return [*found, ("dequantize, bitsandbytes", moved(INTERMEDIATE * HIDDEN), theirs)]


def measure(name: str, moved: int, make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Return the microseconds per call on the device and in Python."""
    import torch

    calls = [make() for _ in range(max(2, -(-CACHE_BYTES // moved)))]
    started = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - started
    for call in calls:
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for call in calls:
        call()
    launch_us = (time.perf_counter() - started) / len(calls) * 1e6
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def round_ms(repeats: int) -> float:
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    round_ms(3)
    repeats = max(3, int(MEASURED_SECONDS * 1e3 / round_ms(3)))
    microseconds = min(round_ms(repeats) for _ in range(3)) / len(calls) * 1e3
    return {
        "name": name,
        "us": microseconds,
        "bytes": moved,
        "tb_per_s": moved / microseconds / 1e6,
        "launch_us": launch_us,
        "first_call_s": first_seconds,
    }


def main() -> None:
    """Measure all functions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=7168)
    parser.add_argument("--out", type=Path, help="JSON with the results")
    arguments = parser.parse_args()

    import torch
    import triton

    machine = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tokens": arguments.tokens,
    }
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':26}       us       MB    TB/s  launch us  first call s")
    results = []
    for name, moved, make in cases(arguments.tokens):
        found = measure(name, moved, make)
        print(
            f"{name:26} {found['us']:8.1f} {moved / 1e6:8.1f} {found['tb_per_s']:7.2f} "
            f"{found['launch_us']:10.1f} {found['first_call_s']:13.2f}",
            flush=True,
        )
        results.append(found)
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
