"""Rows that run as CUDA graphs: the same bits as without, whatever ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fused_models import CASES, build, gradients, make_row

from qwen3ft.planning.recompute import Level
from qwen3ft.training.batches import PackedCollator
from qwen3ft.training.fused import element_wise, step
from qwen3ft.training.fused.graphs import row_size
from qwen3ft.training.fused.step import FusedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = ([120, 64, 203, 91], [17] * 40, [300, 12], [128])
LEVELS = (Level.RECOMPUTE_ALL, Level.RECOMPUTE_GATE_UP, Level.KEEP_ALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a small bf16 model on the GPU."""
    return build(CASES["embedded"], tmp_path_factory.mktemp("model"), torch.bfloat16, "cuda")


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


def test_what_was_recorded_before_is_what_rows_need(model: Any) -> None:
    """A size that is computed from lengths alone is that of the packed row."""
    run = make_step(model, 4096)
    sizes = {row_size(lengths) for lengths in ROWS}
    run.record(sizes)
    recorded = dict(run._graphs)
    for lengths in ROWS:
        run(make_batch(lengths)).backward()
    assert run._graphs == recorded
    model.zero_grad()


def test_each_length_is_recorded_once_and_longer_rows_run_without(model: Any) -> None:
    """As few graphs as lengths, and none for a row over the limit."""
    run = make_step(model, 640)
    for lengths in (*ROWS, *ROWS):
        run(make_batch(lengths)).backward()
    slots = {make_batch(lengths)["input_ids"].shape[1] for lengths in ROWS}
    assert {size.tokens for size in run._graphs} == {count for count in slots if count <= 640}
    assert max(slots) > 640
    model.zero_grad()
