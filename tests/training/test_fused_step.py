"""The fused step against transformers, PEFT and autograd: the same loss, the same gradients."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.fused_models import (
    CASES,
    Gradients,
    build,
    error,
    errors,
    gradients,
    in_fp32,
    make_batch,
    plain,
    shape_of,
)

from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.planning.recompute import ON_DEVICE, Level, kept_bytes_per_token
from qwen3ft.training.batches import PackedCollator
from qwen3ft.training.fused import attention, element_wise
from qwen3ft.training.fused.kept import Kept
from qwen3ft.training.fused.step import FusedStep

TENSORS = (torch.Tensor, torch.nn.Parameter)
LENGTHS = (7, 30, 12, 51)
MIX = (Level.RECOMPUTE_ALL, Level.RECOMPUTE_QKV, Level.KEEP_ALL)
CPU_OPS = element_wise("cpu")
# (chunk_tokens, head_groups, offload, loss_chunk_tokens); the row has 128 slots
SETTINGS = [(10**6, 1, False, 64), (37, 2, True, 29), (37, 1, False, 29), (128, 2, False, 10**6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that makes the model of a case in fp32 on the CPU, once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = build(CASES[name], tmp_path_factory.mktemp("model"), torch.float32)
        return made[name]

    return get


@pytest.fixture
def model(models: Callable[[str], Any]) -> Any:
    """Return a model with everything unusual."""
    return models("wide heads, rank 3")


def make_step(
    model: Any,
    levels: tuple[Level, ...] = MIX,
    chunk_tokens: int = 37,
    head_groups: int = 1,
    offload: bool = False,
    loss_chunk_tokens: int = 29,
    ops: Any = CPU_OPS,
) -> FusedStep:
    return FusedStep(
        model,
        ops,
        lambda _: levels,
        loss_chunk_tokens=loss_chunk_tokens,
        chunk_tokens=chunk_tokens,
        head_groups=head_groups,
        offload=offload,
    )


def fused(model: Any, batch: dict[str, Any], **settings: Any) -> tuple[float, Any]:
    """Return loss and gradients of a fused step."""
    model.zero_grad()
    loss = make_step(model, **settings)(batch)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_autograds(models: Callable[[str], Any], case: str) -> None:
    """Within 1e-5 in fp32, whatever is kept, chunked, grouped or offloaded."""
    model, batch = models(case), make_batch(*LENGTHS)
    loss, truth = plain(model, batch)
    assert len(truth) == 2 * 7 * 3
    assert min(float(gradient.norm()) for gradient in truth.values()) > 0
    all_levels = [(level,) * 3 for level in Level] + [MIX]
    for levels, (chunk, groups, offload, loss_chunk) in itertools.product(all_levels, SETTINGS):
        ours, result = fused(
            model,
            batch,
            levels=levels,
            chunk_tokens=chunk,
            head_groups=groups,
            offload=offload,
            loss_chunk_tokens=loss_chunk,
        )
        assert ours == pytest.approx(loss, rel=1e-5)
        assert max(errors(result, truth).values()) <= 1e-5, (levels, chunk, groups, offload)


def test_sequences_do_not_see_each_other(model: Any) -> None:
    """A row of two sequences has the sum of their losses and gradients."""
    batch = make_batch(23, 40)
    loss, both = fused(model, batch)
    one_loss, one = fused(model, make_batch(23))
    other_loss, other = fused(model, make_batch(40, first_seed=1))
    assert loss == pytest.approx(one_loss + other_loss, rel=1e-5)
    assert max(errors(both, {n: one[n] + other[n] for n in one}).values()) <= 1e-5
    apart = PackedCollator(0)([{n: batch[n][0, :63].tolist() for n in ("input_ids", "labels")}])
    assert error(fused(model, apart)[1], both) > 1e-2


def test_gradients_are_scaled_and_accumulated(model: Any) -> None:
    """Micro-batches divided by a common number of tokens, as the trainer does it."""
    batches = [make_batch(23, 9), make_batch(40, first_seed=5)]
    truth = [plain(model, batch)[1] for batch in batches]
    step = make_step(model)
    for batch in batches:
        (step(batch) / 7).backward()
    wanted = {name: (truth[0][name] + truth[1][name]) / 7 for name in truth[0]}
    assert max(errors(gradients(model), wanted).values()) <= 1e-5


def test_a_changed_adapter_is_seen_at_the_next_call(model: Any) -> None:
    """The step's own copies never go stale, in training or in evaluation."""
    step, batch = make_step(model), make_batch(23, 9)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(batch)
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-1.3).add_(0.01)
        loss, truth = plain(model, batch)
        ours = step(batch)
        ours.backward()
        assert ours.item() == pytest.approx(loss, rel=1e-5)
        assert max(errors(gradients(model), truth).values()) <= 1e-5
        with torch.no_grad():
            assert step(batch).item() == pytest.approx(loss, rel=1e-5)
    finally:
        model.load_state_dict(before, strict=False)


@pytest.mark.parametrize("offload", [False, True])
def test_a_row_without_a_target_has_no_loss_and_no_gradient(model: Any, offload: bool) -> None:
    """Loss and gradients are zeros, neither an error nor NaN."""
    row = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED_LABEL] * 4}
    loss, result = fused(model, PackedCollator(0)([row]), offload=offload)
    assert loss == 0
    assert all(bool((gradient == 0).all()) for gradient in result.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of their storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count_from_here() -> Callable[[], int]:
    """Return a function that gives the bytes of tensors that are made from here on and live."""
    gc.unfreeze()
    tensors = [item for item in gc.get_objects() if type(item) in TENSORS]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    gc.freeze()  # collecting and looking are quick where only what is new is looked at

    def count() -> int:
        gc.collect()
        assert len(known) <= len(tensors)  # held: else a new tensor may have the address of one
        new = (item for item in gc.get_objects() if type(item) in TENSORS)
        return storage_bytes(t for t in new if t.untyped_storage().data_ptr() not in known)

    return count


def test_evaluation_gives_the_same_and_keeps_nothing(model: Any) -> None:
    """An evaluation keeps nothing for a backward."""

    def asked(_: int) -> tuple[Level, ...]:
        raise AssertionError("nothing is kept, so nobody asks")

    batch = make_batch(*LENGTHS)
    loss, _ = plain(model, batch)
    step = make_step(model, offload=True)
    step.choose_levels = asked
    live_bytes = count_from_here()
    with torch.no_grad():
        ours = step(batch)
    assert not ours.requires_grad
    assert ours.item() == pytest.approx(loss, rel=1e-5)
    assert live_bytes() == ours.nbytes


def test_nothing_is_kept_once_the_backward_is_done(model: Any) -> None:
    """Only the gradients are new."""
    batch, step = make_batch(*LENGTHS), make_step(model, levels=(Level.KEEP_ALL,) * 3)
    model.zero_grad()
    live_bytes = count_from_here()
    loss = step(batch)
    kept = live_bytes()
    loss.backward()
    new = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
    assert kept > 128 * 3 * kept_bytes_per_token(shape_of(), 3, 4, Level.KEEP_ALL)
    assert live_bytes() == new + loss.nbytes
    model.zero_grad()


def tensors_of(kept: Kept) -> list[torch.Tensor]:
    values = [value for name, value in vars(kept).items() if name != "offloaded"]
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("level", Level)
def test_what_is_kept_is_what_the_plan_counts(model: Any, level: Level, offload: bool) -> None:
    """Real storages per token and block, within 2 %; offloaded, none but narrow ones stay."""
    tokens, width = 128, 4
    step = make_step(model, levels=(level,) * 3, offload=offload, head_groups=1)
    with torch.no_grad():  # as within the autograd function
        _, state = step.forward(make_batch(*LENGTHS))
    shape, away = shape_of(), level == Level.OFFLOAD_GATE_UP
    on_device = kept_bytes_per_token(shape, 3, width, level)
    in_all = kept_bytes_per_token(shape, 3, width, Level.KEEP_ALL if away else level)
    assert len(state.kept) == 3
    for kept in state.kept:
        stashed = list(chain.from_iterable(kept.offloaded.values()))
        waiting = sum(each.shape.numel() * each.dtype.itemsize for each in stashed)
        held = storage_bytes(tensors_of(kept))
        assert (held + waiting) / tokens == pytest.approx(in_all, rel=0.02)
        if not offload:
            assert held / tokens == pytest.approx(on_device, rel=0.02)
        assert bool(waiting) == (offload or away)
        large = (kept.x, kept.qkv, kept.attended, kept.log_sum_exp, kept.x_mid)
        assert all(tensor is None for tensor in large) or not offload


def test_each_level_keeps_less_than_the_one_before() -> None:
    """So the last level meets a budget if any does."""
    for shape in (shape_of(), shape_of(hidden_size=2560, head_dim=128)):
        sizes = [kept_bytes_per_token(shape, 6, 2, level) for level in ON_DEVICE]
        assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("wrong", ["dropout", "scales"])
def test_what_is_no_plain_lora_is_refused(
    model: Any, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients would be silently wrong."""
    attention = model.get_base_model().model.layers[1].self_attn
    if wrong == "dropout":
        dropouts = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.1)})
        monkeypatch.setattr(attention.o_proj, "lora_dropout", dropouts)
    else:
        monkeypatch.setitem(attention.k_proj.scaling, "default", 0.125)
    with pytest.raises(ValueError, match=wrong):
        make_step(model)


class Rounded(NamedTuple):
    """A bf16 model; a batch with its loss and gradients in fp32, and its gradients in autocast."""

    model: Any
    ops: Any
    batch: dict[str, Any]
    loss: float
    truth: Gradients
    autocast: Gradients


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    """Return a bf16 model with what plain paths make of a batch, once for all settings."""
    device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = CASES["embedded"]
    model = build(case, tmp_path_factory.mktemp("model"), torch.bfloat16, device)
    batch = make_batch(120, 64, 203, 91)
    loss, truth = plain(in_fp32(model, case), batch)
    with torch.autocast(device, dtype=torch.bfloat16):
        _, autocast = plain(model, batch)
    return Rounded(model, element_wise(device), batch, loss, truth, autocast)


@pytest.mark.parametrize("long_tokens", [10**9, 64])
@pytest.mark.parametrize(("groups", "offload"), [(1, False), (2, False), (1, True), (2, True)])
def test_in_bf16_it_is_no_less_exact_than_autocast(
    rounded: Rounded,
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
    offload: bool,
    long_tokens: int,
) -> None:
    """Error of all gradients against fp32: at most 1.5 times that of the plain path.

    One batch of a small model: which of them rounds more luckily is chance; see `parity.py`.
    """
    model, ops, batch, wanted, truth, theirs = rounded
    monkeypatch.setattr(attention, "LONG_TOKENS", long_tokens)
    settings: Any = {"head_groups": groups, "offload": offload, "chunk_tokens": 128, "ops": ops}
    loss, ours = fused(model, batch, **settings)
    assert loss == pytest.approx(wanted, rel=1e-2)
    assert 0 < error(ours, truth) <= 1.5 * error(theirs, truth)
    step = make_step(model, **settings)
    with torch.no_grad():
        assert step(batch).item() == pytest.approx(loss, rel=1e-3)


def test_what_is_offloaded_is_gone_before_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hidden states of all blocks the last one's output alone is left."""
    model = build(CASES["wide heads, rank 3"], tmp_path, torch.float32)
    step, batch = make_step(model, (Level.RECOMPUTE_ALL,) * 3, offload=True), make_batch(*LENGTHS)
    shape = (batch["input_ids"].shape[1], model.config.hidden_size)
    compute, alive = step._loss, []

    def loss(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        alive.append(sum(tuple(each.shape) == shape for each in found))
        return compute(hidden, *others)

    monkeypatch.setattr(step, "_loss", loss)
    gc.collect()
    step(batch)
    assert alive == [1]


def test_what_a_small_adapter_adds_is_not_rounded_away(tmp_path: Path) -> None:
    """A twentieth of the last place of the residual stream, and it arrives on average.

    Added to a sum that was rounded to bf16 before, as PEFT does it, it would be lost: training
    from B = 0 then stands still until B has grown.
    """
    model = build(CASES["wide heads, rank 3"], tmp_path, torch.bfloat16)
    projection = make_step(model).blocks[0].down
    torch.manual_seed(0)
    x = torch.randn(4096, projection.in_features).bfloat16()
    residual = (4 + torch.rand(4096, projection.out_features)).bfloat16()  # a last place of 2**-5
    projection.a.normal_()
    low = (x @ projection.a.t()).float()
    projection.b.normal_(0, 2**-5 / 20 / low.std().item() / projection.rank**0.5)
    wanted = low @ projection.b.float().t()
    weight = projection.weight()
    adapted, _ = projection.forward(x, weight, residual)
    projection.b.zero_()
    bare, _ = projection.forward(x, weight, residual)
    arrived = (adapted - bare).float()
    assert ((arrived * wanted).sum() / wanted.square().sum()).item() == pytest.approx(1, abs=0.1)
