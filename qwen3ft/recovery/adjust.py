"""Decide what follows a failed attempt: the next plan, or giving up with a reason.

    OutOfMemoryError         the next rung of the memory ladder, from the newest checkpoint
    MemoryLeakError          a fresh process, the same plan
    DivergedError            half the learning rate, at most twice
    StalledError, PreemptedError, DeviceFaultError, WorkerCrashedError, TrainingFailureError
                             once more each, the same plan
    the same in one of several ranks
                             a device that failed is left out at once; one in which the same came
                             twice, too
    CheckpointCorruptError   the checkpoint before it
    a host that is gone      left out at once, whatever its failure is
    everything else          give up: trying the same again is useless, or another stage's business

Pure. There are never more than `max_attempts`, and the effective batch never changes. Rungs that
change the result (shorter rows, lower rank) need consent and mark the plan degraded. After shorter
rows the caller has to prepare the data again; `change` tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen3ft import errors
from qwen3ft.planning.plan import repredict
from qwen3ft.records.base import Record
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from qwen3ft.recovery.ladder import Rung, next_rungs, without_host_memory
from qwen3ft.units import gb

LEARNING_RATE_CUTS = 2


class Retry(Record):
    """Decision to train again with `plan`."""

    plan: TrainPlan
    reason: str
    change: dict[str, tuple[Any, Any]]
    """Value of each changed setting: (before, after)."""


class GiveUp(Record):
    """Decision to stop; `failure` describes all attempts together."""

    reason: str
    failure: Failure


class FailedAttempt(NamedTuple):
    """An attempt, and the failure that ended it."""

    plan: TrainPlan
    failure: Failure


@dataclass(frozen=True)
class _Case:
    """The failed attempts, and everything else a policy decides from."""

    failed: Sequence[FailedAttempt]
    max_attempts: int
    allow_degraded: bool
    newest_checkpoint: str | None

    @property
    def plan(self) -> TrainPlan:
        """The attempt that failed last."""
        return self.failed[-1].plan

    @property
    def failure(self) -> Failure:
        """The failure that ended it."""
        return self.failed[-1].failure

    def count(self, kind: str) -> int:
        """Return how often an earlier attempt ended in `kind`."""
        return sum(attempt.failure.kind == kind for attempt in self.failed[:-1])


def decide_retry(
    failed: Sequence[FailedAttempt],
    *,
    max_attempts: int,
    allow_degraded: bool,
    newest_checkpoint: str | None,
) -> Retry | GiveUp:
    """Return what to do after the last attempt of `failed`.

    Args:
        failed: Every attempt so far since the run was started or continued, in order.
        max_attempts: Attempts allowed in all.
        allow_degraded: Whether rows may be shortened and the rank lowered.
        newest_checkpoint: The newest verified checkpoint, or None.
    """
    case = _Case(failed, max_attempts, allow_degraded, newest_checkpoint)
    lost = "lost_host" in case.failure.facts  # whatever it said last
    policy = _once_more if lost else policy_for(case.failure.kind)
    # What no attempt cures is not blamed on the number of attempts.
    if case.plan.attempt >= max_attempts and policy is not _stop:
        kind = "InsufficientMemoryError" if policy is _out_of_memory else case.failure.kind
        return _give_up(case, f"All {max_attempts} attempts allowed were made", kind)
    return policy(case)


# --- policies ---


def _out_of_memory(case: _Case) -> Retry | GiveUp:
    """Lower memory by the next rung; rungs that change the result need consent."""
    phase = str(case.failure.facts.get("phase", ""))
    if phase == "load":
        return _give_up(
            case,
            "The model did not fit while it was loaded, before any setting that could be lowered",
            "InsufficientMemoryError",
        )
    if case.failure.facts.get("domain") == "host" and case.plan.device == "cuda":
        return _host_memory_beside_a_gpu(case)
    rungs = next_rungs(case.plan, phase, allow_degraded=case.allow_degraded)
    if not rungs:
        consent = "" if case.allow_degraded else "; allow_degraded would permit shorter rows"
        return _give_up(
            case, f"Every lever against memory is used{consent}", "InsufficientMemoryError"
        )
    chosen = rungs[:1]
    # The last attempt allowed pulls every lever that keeps the result at once, so that a long
    # ladder is not cut short by the number of attempts.
    if case.plan.attempt + 1 == case.max_attempts and rungs[0].keeps_result:
        chosen = [rung for rung in rungs if rung.keeps_result]
    return _retry(case, f"Memory ran out: {_last_of_each(chosen)}", chosen)


def _host_memory_beside_a_gpu(case: _Case) -> Retry | GiveUp:
    """Offload less: the levers against GPU memory do not lower host memory."""
    if (rung := without_host_memory(case.plan)) is not None:
        return _retry(case, f"Host memory ran out: {rung.what}", [rung])
    if case.count(case.failure.kind):
        return _give_up(case, "Host memory ran out again", "InsufficientMemoryError")
    return _retry(case, "Host memory ran out: a fresh process, the same settings", [])


def _same_plan(case: _Case) -> Retry | GiveUp:
    return _retry(case, "Memory kept growing: a fresh process, the same settings", [])


def _half_learning_rate(case: _Case) -> Retry | GiveUp:
    if case.count(case.failure.kind) >= LEARNING_RATE_CUTS:
        return _give_up(
            case, f"It diverged again after {LEARNING_RATE_CUTS} cuts of the learning rate"
        )
    rate = case.plan.learning_rate / 2
    rung = Rung({"learning_rate": rate}, f"learning rate lowered to {rate:g}")
    return _retry(case, f"Training diverged: {rung.what}", [rung])


def _once_more(case: _Case) -> Retry | GiveUp:
    if lost := _lost_places(case):
        left = tuple(place for place in case.plan.places if place not in lost)
        what = f"{len(left)} of {case.plan.ranks} ranks go on, without place {_list(lost)}"
        rung = Rung({"places": left}, what)
        return _retry(case, f"{case.failure.what.rstrip('.')}: {what}", [rung])
    kind, places = case.failure.kind, case.plan.places
    if any(each.failure.kind == kind and each.plan.places == places for each in case.failed[:-1]):
        return _give_up(case, f"{kind} came a second time with the same settings")
    return _retry(case, f"{case.failure.kind}: once more with the same settings", [])


def _lost_places(case: _Case) -> tuple[int, ...]:
    """Return the places whose ranks cannot go on; none if they may, or if no other is left.

    The run's own host keeps one: its process saves and tests the adapter.
    """
    if (host := case.failure.facts.get("lost_host")) is not None:
        # Where the others lost the run's own host, it was only cut off for a while.
        return case.plan.places_on(int(host)) if host else ()
    place, kind = _failed_place(case.failed[-1]), case.failure.kind
    if place is None or case.plan.places_on(0) == (place,):
        return ()
    if kind == errors.DeviceFaultError.__name__:
        return (place,)
    before = (_failed_place(each) for each in case.failed[:-1] if each.failure.kind == kind)
    return (place,) if place in before else ()


def _list(places: Sequence[int]) -> str:
    return ", ".join(map(str, places))


def _failed_place(failed: FailedAttempt) -> int | None:
    """Return where the rank ran that failed; None if it is not known to have been one alone."""
    rank = failed.failure.facts.get("rank")
    # NCCL's own error says that some rank is gone, and not which.
    is_ours = failed.failure.facts.get("error_type") != "DistBackendError"
    alone = {errors.DeviceFaultError, errors.WorkerCrashedError, errors.StalledError}
    if rank is None or not is_ours or failed.failure.kind not in {e.__name__ for e in alone}:
        return None
    return failed.plan.places[int(rank)]


def _checkpoint_before(case: _Case) -> Retry | GiveUp:
    """Continue from the newest verified checkpoint, but never from the one that just failed."""
    before = case.newest_checkpoint
    if before == case.plan.resume_from:
        before = None
    plan = _next(case.plan, {}, before)
    reason = f"A checkpoint is damaged: from {before or 'the start'}"
    change = {"resume_from": (case.plan.resume_from, before)}
    return Retry(plan=plan, reason=f"{reason}.", change=change)


def _stop(case: _Case) -> GiveUp:
    return _give_up(case, f"{case.failure.kind} is not cured by another attempt")


POLICIES: Mapping[type[errors.FinetuneError], Callable[[_Case], Retry | GiveUp]] = {
    errors.OutOfMemoryError: _out_of_memory,
    errors.MemoryLeakError: _same_plan,
    errors.DivergedError: _half_learning_rate,
    errors.StalledError: _once_more,
    errors.PreemptedError: _once_more,
    errors.DeviceFaultError: _once_more,
    errors.WorkerCrashedError: _once_more,
    errors.TrainingFailureError: _once_more,
    errors.CheckpointCorruptError: _checkpoint_before,
    errors.AttemptError: _stop,
    errors.CancelledError: _stop,
    errors.RequestError: _stop,
    errors.TransientError: _stop,  # retried by the task that called, never here too
    errors.RejectedError: _stop,
    errors.QuantizationError: _stop,  # its own ladder is config.quantization
    errors.SaveError: _stop,
    errors.ExportDriftError: _stop,  # no training raises it, nor the next
    errors.ServedOtherwiseError: _stop,
}
"""Policy of each class of failure; other classes have that of their nearest ancestor here."""


def policy_for(kind: str) -> Callable[[_Case], Retry | GiveUp]:
    """Return the policy for a kind of failure; an unknown kind is given up."""
    classes = {error.__name__: error for error in errors.error_kinds()}
    ancestors = classes.get(kind, errors.FinetuneError).__mro__
    return next((POLICIES[error] for error in ancestors if error in POLICIES), _stop)


# --- decisions ---


def _retry(case: _Case, reason: str, rungs: Sequence[Rung]) -> Retry:
    plan, resume_from, degraded = case.plan, case.newest_checkpoint, list(case.plan.degraded)
    values = {name: value for rung in rungs for name, value in rung.values.items()}
    change = {name: (plan.setting(name), value) for name, value in values.items()}
    if not all(rung.keeps_result for rung in rungs):
        resume_from = None  # checkpoints of other rows or another rank do not fit
        degraded += [rung.what for rung in rungs if not rung.keeps_result]
    reasons = plan.reasons | dict.fromkeys(values, f"{reason}.")
    new = _next(plan, values | {"degraded": tuple(degraded), "reasons": reasons}, resume_from)
    return Retry(plan=new, reason=f"{reason}.", change=_readable(change))


def _next(plan: TrainPlan, values: Mapping[str, Any], resume_from: str | None) -> TrainPlan:
    update = {**values, "attempt": plan.attempt + 1, "resume_from": resume_from}
    return repredict(plan.with_settings(**update))


def _readable(change: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Replace an adapter by its rank and alpha."""
    readable = dict(change)
    if "adapter" in readable:
        before, after = readable.pop("adapter")
        readable["lora_r"] = (before.r, after.r)
        readable["lora_alpha"] = (before.alpha, after.alpha)
    return readable


def _last_of_each(rungs: Sequence[Rung]) -> str:
    """Describe rungs; a later one on the same settings supersedes an earlier one."""
    return ", ".join({tuple(rung.values): rung.what for rung in rungs}.values())


def _give_up(case: _Case, reason: str, kind: str = "") -> GiveUp:
    last, kind = case.failure, kind or case.failure.kind
    message = f"{reason}. {last.what}\nAttempts:\n{_table(case)}"
    needs_memory = kind == errors.InsufficientMemoryError.__name__
    failure = Failure(
        kind=kind,
        what=message,
        why=last.why,
        next_command="qwen3ft plan --set max_sequence_length="
        f"{max(16, case.plan.max_sequence_length // 2)}"
        if needs_memory
        else last.next_command,
        facts={**last.facts, "last_failure": last.kind, "attempts": case.plan.attempt},
    )
    return GiveUp(reason=message, failure=failure)


def _table(case: _Case) -> str:
    """Return one line per attempt, the failed one last."""
    return "\n".join(
        f"  {plan.attempt}. {failure.kind}: micro-batch {plan.memory.micro_batch_size} x "
        f"{plan.gradient_accumulation_steps}, recomputation "
        f"{'on' if plan.memory.gradient_checkpointing else 'off'}, "
        f"learning rate {plan.learning_rate:g}, "
        f"loss chunks of {plan.memory.loss_chunk_tokens}, "
        f"predicted {gb(plan.predicted_peak_bytes):.2f} of {plan.max_memory_gb:.2f} GB"
        for plan, failure in case.failed
    )
