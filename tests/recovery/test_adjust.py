"""What follows a failed attempt: each policy, the memory ladder, and its end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import QWEN3_4B, plan_for

from qwen3ft.errors import FinetuneError, error_kinds
from qwen3ft.model.shapes import count_adapter_parameters
from qwen3ft.planning.plan import repredict
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from qwen3ft.recovery.adjust import POLICIES, FailedAttempt, GiveUp, Retry, decide_retry
from qwen3ft.recovery.ladder import largest_micro_batch_below, next_rungs

CHECKPOINT = "runs/run/attempts/01/checkpoints/step-000200"


def make_plan(device: str = "cuda", **changes: Any) -> TrainPlan:
    plan = plan_for(gpu_gb=80.0 if device == "cuda" else None, max_memory_gb=60.0)
    return repredict(plan.with_settings(**changes))


def fail(kind: str, **facts: Any) -> Failure:
    return Failure(kind=kind, what=f"{kind} happened", facts=facts)


def ask(plan: TrainPlan, failure: Failure, *earlier: str, **limits: Any) -> Retry | GiveUp:
    failed = [
        FailedAttempt(plan.with_settings(attempt=number), fail(kind))
        for number, kind in enumerate(earlier, start=1)
    ]
    failed.append(FailedAttempt(plan, failure))
    choices = {"max_attempts": 20, "allow_degraded": False, "newest_checkpoint": CHECKPOINT}
    return decide_retry(failed, **{**choices, **limits})


def retry(*arguments: Any, **limits: Any) -> Retry:
    decision = ask(*arguments, **limits)
    assert isinstance(decision, Retry), decision
    return decision


def give_up(*arguments: Any, **limits: Any) -> GiveUp:
    decision = ask(*arguments, **limits)
    assert isinstance(decision, GiveUp), decision
    return decision


def descend(plan: TrainPlan, **limits: Any) -> list[Retry]:
    """Every retry after an attempt that always runs out of memory, to the end of the ladder."""
    retries: list[Retry] = []
    failure = fail("OutOfMemoryError", phase="train", domain="gpu")
    while isinstance(decision := ask(plan, failure, max_attempts=1000, **limits), Retry):
        assert len(retries) < 100, "the ladder does not end"
        retries.append(decision)
        plan = decision.plan
    assert decision.failure.kind == "InsufficientMemoryError"
    return retries


def test_every_class_of_the_tree_has_a_policy() -> None:
    """No error falls through to the default: a row of its own or of an ancestor in the tree."""
    for kind in error_kinds():
        if kind is not FinetuneError:
            assert any(ancestor in POLICIES for ancestor in kind.__mro__), kind


@pytest.mark.parametrize("kind", [kind.__name__ for kind in error_kinds()])
def test_every_failure_is_answered_and_never_beyond_the_attempts_allowed(kind: str) -> None:
    """The last attempt allowed is followed by giving up, with a table of the attempts."""
    decision = give_up(make_plan(attempt=5), fail(kind), max_attempts=5)
    assert "5. " + kind in decision.reason
    assert decision.failure.to_error().what


NOT_CURED = [
    *("ConfigError", "InsufficientMemoryError", "DataLoadingError", "ModelNotFoundError"),
    *("TokenizerError", "DownloadError", "TrackingUnavailableError", "QuantizationError"),
    *("SaveError", "UnknownError"),
]


@pytest.mark.parametrize("kind", NOT_CURED)
def test_what_another_attempt_cannot_cure_is_given_up_at_once(kind: str) -> None:
    """Requests that cannot be met, and errors that another stage answers."""
    assert give_up(make_plan(), fail(kind)).failure.kind == kind


@pytest.mark.parametrize(
    "kind", ["StalledError", "PreemptedError", "DeviceFaultError", "WorkerCrashedError"]
)
def test_a_worker_that_just_ended_is_started_once_more(kind: str) -> None:
    """The same plan from the newest checkpoint; a second time is given up, others do not count."""
    plan = make_plan()
    again = retry(plan, fail(kind))
    assert again.change == {}
    assert again.plan == plan.model_copy(update={"attempt": 2, "resume_from": CHECKPOINT})
    assert retry(make_plan(attempt=2), fail(kind), "OutOfMemoryError").plan.attempt == 3
    assert give_up(make_plan(attempt=2), fail(kind), kind).failure.kind == kind


def fail_in(rank: int, kind: str = "WorkerCrashedError", **facts: Any) -> Failure:
    return fail(kind, rank=rank, **facts)


def test_a_device_that_failed_is_left_out_at_once() -> None:
    """The other ranks go on with the same effective batch, and the plan says so."""
    plan = make_plan(places=(0, 1, 2))
    decision = retry(plan, fail_in(1, "DeviceFaultError"))
    assert decision.plan.places == (0, 2)
    assert decision.plan.effective_batch_size == plan.effective_batch_size
    assert decision.plan.resume_from == CHECKPOINT
    assert decision.change == {"places": ((0, 1, 2), (0, 2))}
    assert "2 of 3 ranks go on, without place 1" in decision.plan.reasons["places"]


def test_the_host_of_the_run_keeps_a_rank_whatever_fails() -> None:
    """Its process saves and tests the adapter; a rank of another host may be its host's last."""
    plan = make_plan(places=(0, 2), places_per_host=2)
    assert retry(plan, fail_in(1, "DeviceFaultError")).plan.places == (0,)
    assert retry(plan, fail_in(0, "DeviceFaultError")).plan.places == (0, 2)
    give_up(plan, fail_in(0, "DeviceFaultError"), "DeviceFaultError")


def test_nccls_word_for_a_lost_rank_blames_no_device() -> None:
    """Some other rank is gone; all of them try once more."""
    failure = fail_in(0, "DeviceFaultError", error_type="DistBackendError")
    assert retry(make_plan(places=(0, 1)), failure).plan.places == (0, 1)


@pytest.mark.parametrize("kind", ["WorkerCrashedError", "StalledError"])
def test_a_rank_that_ends_twice_at_one_place_is_left_out(kind: str) -> None:
    """First once more with all; then the rest has its own once more, and gives up."""
    plan = make_plan(places=(0, 2))
    again = retry(plan, fail_in(1, kind))
    assert again.plan.places == (0, 2)
    limits: dict[str, Any] = {
        "max_attempts": 9,
        "allow_degraded": False,
        "newest_checkpoint": CHECKPOINT,
    }
    first = FailedAttempt(plan, fail_in(1, kind))
    second = decide_retry([first, FailedAttempt(again.plan, fail_in(1, kind))], **limits)
    assert isinstance(second, Retry)
    assert second.plan.places == (0,)
    other = decide_retry([first, FailedAttempt(again.plan, fail_in(0, kind))], **limits)
    assert isinstance(other, GiveUp)
    alone = FailedAttempt(second.plan, fail_in(0, kind))
    third = decide_retry([first, alone], **limits)
    assert isinstance(third, Retry)
    assert third.plan.places == (0,)
    assert isinstance(decide_retry([first, alone, alone], **limits), GiveUp)


def test_a_leak_is_answered_by_a_fresh_process() -> None:
    """The same plan, as often as attempts allow."""
    decision = retry(make_plan(attempt=3), fail("MemoryLeakError"), *["MemoryLeakError"] * 2)
    assert decision.change == {}
    assert decision.plan.resume_from == CHECKPOINT


def test_divergence_halves_the_learning_rate_twice() -> None:
    """From the last good checkpoint; after two cuts it gives up."""
    plan = make_plan()
    failure = fail("DivergedError")
    first = retry(plan, failure)
    assert first.change == {"learning_rate": (5e-5, 2.5e-5)}
    second = retry(first.plan, failure, "DivergedError")
    assert second.plan.learning_rate == 1.25e-5
    assert second.plan.resume_from == CHECKPOINT
    give_up(second.plan, failure, "DivergedError", "DivergedError")


def test_a_damaged_checkpoint_is_never_the_next_one_again() -> None:
    """The newest verified one, or the start if that is the one that failed."""
    plan = make_plan(resume_from=CHECKPOINT)
    failure = fail("CheckpointCorruptError")
    assert retry(plan, failure, newest_checkpoint="older").plan.resume_from == "older"
    assert retry(plan, failure, newest_checkpoint=CHECKPOINT).plan.resume_from is None


@given(effective=st.integers(1, 5000), data=st.data())
def test_the_next_micro_batch_is_the_largest_divisor_up_to_half(effective: int, data: Any) -> None:
    """Against the definition, by trying every number."""
    current = data.draw(st.integers(1, effective))
    smaller = [size for size in range(1, current // 2 + 1) if effective % size == 0]
    assert largest_micro_batch_below(effective, current) == (max(smaller) if smaller else None)


@given(micro=st.integers(1, 512), accumulation=st.integers(1, 64), recompute=st.booleans())
def test_the_ladder_keeps_the_effective_batch_and_ends(
    micro: int, accumulation: int, recompute: bool
) -> None:
    """For any pair: same sequences per step on every rung, never 0, always less memory or equal."""
    plan = make_plan(
        micro_batch_size=micro,
        effective_batch_size=micro * accumulation,
        gradient_checkpointing=recompute,
    )
    retries = descend(plan)
    before = plan
    for decision in retries:
        now = decision.plan
        assert now.effective_batch_size == micro * accumulation
        assert now.memory.micro_batch_size >= 1
        assert now.predicted_peak_bytes <= before.predicted_peak_bytes
        assert now.attempt == before.attempt + 1
        assert now.resume_from == CHECKPOINT
        assert not now.degraded
        assert decision.change
        before = now
    assert before.memory.micro_batch_size == 1
    assert before.memory.gradient_checkpointing
    assert before.memory.offload_activations
    assert len(retries) <= micro.bit_length() + 14


def test_the_rungs_come_in_order() -> None:
    """Micro-batch, recomputation, loss chunks, offloading; then consent is needed."""
    plan = make_plan(gradient_checkpointing=False, loss_chunk_tokens=4096)
    names = [next(iter(decision.change)) for decision in descend(plan)]
    assert names[:2] == ["micro_batch_size", "micro_batch_size"]
    assert names[2:4] == ["gradient_checkpointing", "loss_chunk_tokens"]
    assert names[4:] == ["offload_activations", "offload_optimizer"]


def test_with_consent_rows_are_shortened_and_the_rank_lowered_last() -> None:
    """The result changes: marked degraded, from the start, the scale alpha / r kept."""
    retries = descend(make_plan(), allow_degraded=True)
    changing = [decision for decision in retries if decision.plan.degraded]
    assert [sorted(decision.change) for decision in changing] == [
        ["max_sequence_length"],
        ["max_sequence_length"],
        ["lora_alpha", "lora_r"],
    ]
    assert [decision.plan.max_sequence_length for decision in changing] == [128, 64, 64]
    assert all(decision.plan.resume_from is None for decision in changing)
    last = changing[-1].plan
    assert (last.adapter.r, last.adapter.alpha) == (3, 6)
    assert last.adapter.trainable_parameters == count_adapter_parameters(QWEN3_4B, 3)
    assert len(last.degraded) == 3
    assert retries.index(changing[0]) == len(retries) - 3


def test_on_a_cpu_nothing_is_offloaded() -> None:
    """Host memory is what ran out."""
    retries = descend(make_plan("cpu"))
    assert not any(decision.plan.memory.offload_activations for decision in retries)


def test_memory_that_ran_out_in_an_evaluation_leaves_training_alone() -> None:
    """Only the evaluation batch shrinks, to 1; then the ladder begins."""
    plan = make_plan(eval_batch_size=8)
    sizes = []
    failure = fail("OutOfMemoryError", phase="evaluate", domain="gpu")
    while set((decision := retry(plan, failure)).change) == {"eval_batch_size"}:
        plan = decision.plan
        sizes.append(plan.memory.eval_batch_size)
        assert plan.memory.micro_batch_size == make_plan().memory.micro_batch_size
    assert sizes == [4, 2, 1]
    assert "micro_batch_size" in decision.change


def test_the_last_attempt_allowed_takes_every_lever_that_keeps_the_result() -> None:
    """A long ladder is not cut short by the count of attempts."""
    plan = make_plan(micro_batch_size=64, attempt=4)
    decision = retry(plan, fail("OutOfMemoryError"), max_attempts=5, allow_degraded=True)
    assert decision.plan.memory.micro_batch_size == 1
    assert decision.plan.gradient_accumulation_steps == 64
    assert decision.plan.memory.gradient_checkpointing
    assert decision.plan.memory.offload_activations
    assert decision.plan.max_sequence_length == plan.max_sequence_length
    assert decision.change["micro_batch_size"] == (64, 1)


def test_memory_that_ran_out_while_loading_is_given_up() -> None:
    """No lever makes the weights smaller."""
    decision = give_up(make_plan(), fail("OutOfMemoryError", phase="load", domain="gpu"))
    assert decision.failure.kind == "InsufficientMemoryError"


def test_host_memory_beside_a_gpu_is_not_answered_with_smaller_batches() -> None:
    """Offloading ends first; then one fresh process; then it is given up."""
    failure = fail("OutOfMemoryError", phase="train", domain="host")
    offloading = make_plan(offload_activations=True)
    assert retry(offloading, failure).change == {"offload_activations": (True, False)}
    assert retry(make_plan(), failure).change == {}
    again = give_up(make_plan(attempt=2), failure, "OutOfMemoryError")
    assert again.failure.kind == "InsufficientMemoryError"
    assert "micro_batch_size" in retry(make_plan("cpu"), failure).change


def test_the_end_of_the_ladder_tells_what_was_tried() -> None:
    """Giving up lists every attempt and names the lever that needs consent."""
    plan = make_plan(attempt=3)
    for step in next_rungs(plan, "train", allow_degraded=False):
        plan = plan.with_settings(**step.values)
    decision = give_up(plan, fail("OutOfMemoryError"), "StalledError", "OutOfMemoryError")
    for line in ("1. StalledError", "2. OutOfMemoryError", "3. OutOfMemoryError"):
        assert line in decision.reason
    assert "allow_degraded" in decision.reason
    assert decision.failure.facts["last_failure"] == "OutOfMemoryError"


def test_a_decision_survives_json() -> None:
    """Prefect stores it as JSON and reads it back as the same record."""
    for decision in (
        retry(make_plan(), fail("OutOfMemoryError")),
        give_up(make_plan(), fail("ConfigError")),
    ):
        again = type(decision).model_validate_json(decision.model_dump_json())
        assert again.model_dump(mode="json") == decision.model_dump(mode="json")


def test_the_reasons_of_the_new_plan_tell_what_recovery_changed() -> None:
    """A changed value is explained by the failure, not by the first plan."""
    decision = retry(make_plan(), fail("OutOfMemoryError"))
    assert "Memory ran out" in decision.plan.reasons["micro_batch_size"]
    assert decision.reason.endswith(".")
