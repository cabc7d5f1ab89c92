"""A packed row: its layout, and that no sequence of it sees another, by numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fused_models import CASES, build, error, in_fp32, saved_bytes
from support.plans import workload, workload_lengths

from qwen3ft.data.collators import IGNORED_LABEL, PaddingCollator, labels_of
from qwen3ft.planning.packing import pack, row_tokens
from qwen3ft.training.batches import PackedCollator, real_tokens, trained_tokens
from qwen3ft.training.loss import summed_loss


def make_rows(
    lengths: list[int], seed: int = 0, vocabulary: int = 1000, first: int = 1
) -> list[dict[str, Any]]:
    """Rows with two trained ranges each, where they are long enough, the last token always in."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        ids = [draw.randrange(4, vocabulary) for _ in range(length)]
        start = min(length - 1, max(first, length // 2))
        trained = [start, length]
        if start > 4:
            trained = [first, 3, *trained]
        labels = [IGNORED_LABEL] * length
        for low, high in zip(trained[::2], trained[1::2], strict=True):
            labels[low:high] = ids[low:high]
        rows.append({"input_ids": ids, "trained": trained, "labels": labels, "length": length})
    return rows


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), first=st.integers(0, 1))
def test_both_collators_take_ranges_or_labels(lengths: list[int], first: int) -> None:
    """`trained` ranges and `labels` give the same tensors, padded and packed."""
    rows = make_rows(lengths, first=first)
    for collate in (PaddingCollator(0), PackedCollator(0)):
        ranges, labels = collate(without(rows, "labels")), collate(without(rows, "trained"))
        assert ranges.keys() == labels.keys()
        assert all(bool(torch.as_tensor(ranges[n] == labels[n]).all()) for n in ranges)
    assert all(labels_of(row).tolist() == row["labels"] for row in without(rows, "nothing"))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), graphs=st.booleans())
def test_a_packed_row_holds_every_token_once_and_trains_across_no_border(
    lengths: list[int], graphs: bool
) -> None:
    """Ids, positions and targets are those of each row alone; padding carries none."""
    rows = make_rows(lengths, first=0)
    batch = PackedCollator(7, graphs=graphs)(rows)
    slots = batch["input_ids"].shape[1]
    assert slots == row_tokens(sum(lengths), graphs=graphs)
    assert {n: tuple(batch[n].shape) for n in ("input_ids", "labels", "position_ids")} == (
        dict.fromkeys(("input_ids", "labels", "position_ids"), (1, slots))
    )
    assert batch["cu_seqlens"].dtype == torch.int32
    bounds = batch["cu_seqlens"].tolist()
    assert (bounds[0], bounds[-1]) == (0, slots)
    assert bounds == sorted(set(bounds))
    assert batch["max_length"] == max(np.diff(bounds))
    assert real_tokens(batch) == sum(lengths)
    for row, start, end in zip(rows, bounds, bounds[1:], strict=False):
        assert batch["input_ids"][0, start:end].tolist() == row["input_ids"]
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert batch["labels"][0, start:end].tolist() == [IGNORED_LABEL, *row["labels"][1:]]
    padding = slice(sum(lengths), slots)
    assert batch["input_ids"][0, padding].tolist() == [7] * (slots - sum(lengths))
    assert batch["position_ids"][0, padding].tolist() == list(range(slots - sum(lengths)))
    assert bool((batch["labels"][0, padding] == IGNORED_LABEL).all())
    padded = PaddingCollator(7)(rows)
    assert trained_tokens(batch) == trained_tokens(padded)
    assert real_tokens(padded) == sum(lengths)


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def model(request: pytest.FixtureRequest) -> Any:
    """The embedded model with an adapter that does something, unquantised and in NF4."""
    case = CASES["embedded"]
    adapted = build(case, Path(), torch.float32)
    return (adapted if request.param == "nf4" else in_fp32(adapted, case)).get_base_model()


def mean_loss_and_gradients(
    model: Any, batches: Iterator[Any] | list[Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Over all micro-batches, divided by all their trained tokens."""
    model.zero_grad()
    batches = list(batches)
    trained = sum(map(trained_tokens, batches))
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch, 64) / trained
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_packed_sequence_is_computed_as_if_it_were_alone(model: Any) -> None:
    """Hidden states of each packed sequence equal its own in fp32; its neighbours do not matter."""
    rows = make_rows([1, 37, 5, 64, 2, 20], seed=3)
    batch = PackedCollator(0)(rows)

    def hidden(ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return model.model(
                input_ids=ids, position_ids=positions, use_cache=False
            ).last_hidden_state

    packed = hidden(batch["input_ids"], batch["position_ids"])
    bounds = batch["cu_seqlens"].tolist()
    for row, start, end in zip(rows, bounds, bounds[1:], strict=False):
        alone = hidden(torch.tensor([row["input_ids"]]), None)
        assert torch.allclose(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)
    leaking = hidden(batch["input_ids"], None)
    assert not torch.allclose(packed[:, bounds[1] :], leaking[:, bounds[1] :], rtol=1e-2, atol=1e-2)
    changed = batch["input_ids"].clone()
    changed[0, bounds[3] : bounds[4]] = 9
    changed[0, bounds[-2] :] = 9
    other = hidden(changed, batch["position_ids"])
    kept = torch.ones(changed.shape[1], dtype=torch.bool)
    kept[bounds[3] : bounds[4]] = kept[bounds[-2] :] = False
    assert torch.allclose(other[:, kept], packed[:, kept], rtol=1e-6, atol=1e-6)
    assert not torch.equal(other, packed)


def test_every_capacity_gives_the_loss_and_gradient_of_padded_rows(model: Any) -> None:
    """Within 1e-5 in fp32, from one row a micro-batch to all in one."""
    rows = make_rows(workload_lengths(12, seed=2), seed=2)
    lengths = [row["length"] for row in rows]
    wanted_loss, wanted = mean_loss_and_gradients(model, [PaddingCollator(0)(rows)])
    assert sum(float(gradient.norm()) for gradient in wanted.values()) > 0
    counts = set()
    for capacity in (max(lengths), 300, 500, sum(lengths)):
        groups = pack(lengths, capacity)
        counts.add(len(groups))
        batches = [PackedCollator(0)([rows[index] for index in group]) for group in groups]
        loss, gradients = mean_loss_and_gradients(model, batches)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert error(gradients, wanted) <= 1e-5
    assert len(counts) >= 3


def test_the_prediction_counts_what_autograd_keeps_of_a_packed_row(model: Any) -> None:
    """Within 2 % for the layers: the mask that SDPA keeps in each is as wide as the whole row."""
    from peft.tuners.lora import LoraLayer

    from qwen3ft.planning.footprint import layer_bytes_per_token
    from qwen3ft.records.model import ModelShape

    batch = PackedCollator(0)(make_rows([100, 200, 150, 40]))
    tokens = batch["input_ids"].numel()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    measured = saved_bytes(model.model, **inputs) / tokens
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 7 * 3
    shape = ModelShape.model_validate(
        {name: getattr(model.config, name) for name in ModelShape.model_fields}
    )
    work = workload(
        shape,
        rank=8,
        device="cpu",
        compute_dtype="float32",
        micro_batch_size=1,
        sequence_tokens=tokens,
        gradient_checkpointing=False,
        packing=True,
    )
    top = 4 * shape.hidden_size
    formula = shape.num_hidden_layers * layer_bytes_per_token(work) + top
    assert measured == pytest.approx(formula, rel=0.02)
