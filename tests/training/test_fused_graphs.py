"""Rows that run as CUDA graphs: the same bits as without, whatever ran before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fused_models import CASES, build, gradients, make_row

from qwen3ft.planning.recompute import Level
from qwen3ft.training.batches import EffectiveBatchOrder, PackedCollator, StepSampler
from qwen3ft.training.fused import element_wise, step
from qwen3ft.training.fused.attention import Segments
from qwen3ft.training.fused.block import PackedRow
from qwen3ft.training.fused.graphs import row_size, size_of
from qwen3ft.training.fused.step import FusedStep

# No sequence is longer than two of the blocks of 128 keys that FlashAttention's backward takes: it
# adds the blocks up as they end, so the bits of three depend on what else the GPU does.
ROWS = ([120, 64, 203, 91], [17] * 40, [250, 12], [128])
LEVELS = (Level.RECOMPUTE_ALL, Level.RECOMPUTE_GATE_UP, Level.KEEP_ALL)


@pytest.fixture(scope="module", params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a small bf16 model on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return build(CASES["embedded"], tmp_path_factory.mktemp("model"), torch.bfloat16, request.param)


def make_batch(lengths: list[int]) -> dict[str, Any]:
    collate = PackedCollator(0, graphs=True)
    return collate([make_row(tokens, seed) for seed, tokens in enumerate(lengths)])


def make_step(model: Any, graph_tokens: int) -> FusedStep:
    return FusedStep(
        model,
        element_wise("cuda"),
        lambda _: LEVELS,
        loss_chunk_tokens=64,
        chunk_tokens=256,
        graph_tokens=graph_tokens,
    )


def trained(model: Any, graph_tokens: int) -> list[tuple[list[float], list[torch.Tensor]]]:
    """Return losses and gradients of steps of two rows each, between which weights change."""
    run, found = make_step(model, graph_tokens), []
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for number in range(2 * len(ROWS)):
        pair = [make_batch(ROWS[(number + more) % len(ROWS)]) for more in (0, 1)]
        losses = []
        for batch in pair:
            loss = run(batch)
            (loss / 7).backward()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(run(pair[0]).item())  # an evaluation, which has no graph
        found.append((losses, list(gradients(model).values())))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    return found


@pytest.mark.parametrize("most", [32, 2])
def test_the_bits_are_those_of_rows_without_graphs(
    model: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of rows of all lengths in turn, recorded and repeated, and recorded again where few fit."""
    monkeypatch.setattr(step, "MOST_GRAPHS", most)
    for with_graphs, without in zip(trained(model, 4096), trained(model, 0), strict=True):
        assert with_graphs[0] == without[0]
        pairs = zip(with_graphs[1], without[1], strict=True)
        assert all(torch.equal(own, other) for own, other in pairs)


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=70))
def test_a_size_from_lengths_is_that_of_the_packed_row(lengths: list[int]) -> None:
    """What is recorded before the first step is what its rows need."""
    batch = make_batch(lengths)
    tokens, bounds = batch["input_ids"].shape[1], batch["cu_seqlens"]
    segments = Segments(bounds, batch["max_length"], tuple(bounds.tolist()))
    row = PackedRow(segments, torch.empty(tokens, 8), torch.empty(tokens, 8), chunk_tokens=64)
    size = row_size(lengths)
    assert size == size_of(row)
    assert size.tokens == tokens
    assert size.bounds >= len(bounds)
    assert size.longest >= batch["max_length"]


@pytest.mark.parametrize("done", [0, 2, 4])
def test_the_graphs_of_the_next_steps_are_recorded(compose: Any, done: int) -> None:
    """Of those that a resumed training still makes, in later epochs, too, and of no others."""
    fused = {"kernels": "fused", "packing": True, "chunk_tokens": 64, "loss_chunk_tokens": 64}
    _, trainer = compose(**fused, graphs=True, total_steps=6, micro_batch_size=4)
    drawn = random.Random(0)
    lengths = np.array([drawn.randrange(10, 1500) for _ in range(48)])
    order = trainer.order = EffectiveBatchOrder(lengths, 16, seed=0)
    # one row a step, each of another size
    trainer.sampler = StepSampler(order, lambda tokens: [list(range(len(tokens)))])
    steps = []
    for order.epoch in (0, 1):
        steps += [row_size(lengths[row].tolist()) for [row] in trainer.sampler]
    assert len({frozenset(steps), frozenset(steps[2:]), frozenset(steps[4:])}) == 3
    trainer.state.global_step = done
    found = trainer.sizes_of_next_steps()
    assert found == sorted(set(steps[done:]), reverse=True)
    trainer.state.global_step = 6
    assert trainer.sizes_of_next_steps() == []


def test_each_size_is_recorded_once_and_longer_rows_run_without(model: Any) -> None:
    """What was recorded beforehand is used, and there is none for a row over the limit."""
    run = make_step(model, 640)
    run.record([row_size(ROWS[0])])
    before = dict(run._graphs)
    rows = (*ROWS, [300, 12])  # the last has the slots of another row, and is longer
    for lengths in rows:
        run(make_batch(lengths)).backward()
    recorded = dict(run._graphs)
    assert before.items() <= recorded.items()
    assert {size.longest for size in recorded} == {256, 1024}
    for lengths in rows:
        run(make_batch(lengths)).backward()
    assert run._graphs == recorded
    slots = {make_batch(lengths)["input_ids"].shape[1] for lengths in rows}
    assert {size.tokens for size in recorded} == {count for count in slots if count <= 640}
    assert max(slots) > 640
    model.zero_grad()
