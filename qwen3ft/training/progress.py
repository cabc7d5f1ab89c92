"""The position of a training, read from transformers' state, which checkpoints hold.

A step is its update and, if one is due, its evaluation. An interruption may come between the two or
before the end of training is noticed. So nothing remembers what comes next: it is found in the
state, after a step as after a resume.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerState


def lacks_evaluation(state: TrainerState) -> bool:
    """Return True if an evaluation is due at the present step and was not made."""
    step, every = state.global_step, int(state.eval_steps)
    # The last step is seldom a multiple of the interval, and may be the best one.
    is_due = step % every == 0 or step >= state.max_steps
    return is_due and step not in _evaluated_steps(state)


def is_patience_spent(state: TrainerState, patience: int) -> bool:
    """Return True after `patience` evaluations without a lower held-out loss."""
    best_step = state.best_global_step or 0
    return sum(step > best_step for step in _evaluated_steps(state)) >= patience


def is_over(state: TrainerState, patience: int) -> bool:
    """Return True if the present step is the last, and nothing is left of it."""
    is_last = state.global_step >= state.max_steps or is_patience_spent(state, patience)
    return is_last and not lacks_evaluation(state)


def _evaluated_steps(state: TrainerState) -> list[int]:
    return [entry["step"] for entry in state.log_history if "eval_loss" in entry]
