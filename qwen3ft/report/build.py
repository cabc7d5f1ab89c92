"""Build the run card from whatever is known of a run; one that failed has a card too.

`report.markdown`, `report.html` and `flows.cli.views` show it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen3ft.chat.thinking import split_thinking
from qwen3ft.config import EMBEDDED_MODEL_NAME, TrainingConfig
from qwen3ft.data.safety import safe_excerpt
from qwen3ft.errors import FinetuneError
from qwen3ft.evaluation.answers import exact_match
from qwen3ft.evaluation.wording import answered_by_text, judge_note, questions_text, thinking_text
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import mask_secrets
from qwen3ft.planning.table import PlanTable
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.evaluation import (
    MODELS,
    Champion,
    InferenceReport,
    ModelScore,
    SideBySide,
    Verdict,
)
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.run_card import (
    NO_CHAMPION,
    AnsweredQuestion,
    AttemptSummary,
    FailureSection,
    LossCurve,
    MemoryCurve,
    ModelAnswer,
    NextStep,
    Outcome,
    PlanSection,
    RunCard,
)
from qwen3ft.records.training import AttemptOutcome
from qwen3ft.report.data_section import data_section
from qwen3ft.report.safe_text import ANSWER_CHARACTERS, QUESTION_CHARACTERS
from qwen3ft.text.commands import shell_setup

EMBEDDED_NOTE = (
    "The embedded model is for demonstration: 0.8 M weights, pretrained on questions about "
    "invented products. Fine-tuning adds facts and one date format, not language understanding."
)
NOVEL_NOTE = "The questions of 'novel' are worded like none of the training rows."
FAILURE_CHARACTERS, REASON_CHARACTERS = 3000, 1000


@dataclass
class RunFacts:
    """Everything that is known of a run; its stages add to it as they end."""

    config: TrainingConfig
    run_id: str
    champion: Champion | None = None
    """The adapter in use before the run."""
    dataset: DatasetManifest | None = None
    change: DataChange = field(default_factory=DataChange)
    table: PlanTable | None = None
    plan: TrainPlan | None = None
    trained: AttemptOutcome | None = None
    saved: SavedAdapter | None = None
    report: InferenceReport | None = None
    verdict: Verdict | None = None
    nothing_since: str | None = None
    """The version since which there is no new data, if that ended the run."""
    error: BaseException | None = None
    changed_settings: str = ""
    """Settings that changed when the run was resumed, before and now; '' if none did."""
    cancelled_by: str = ""
    """Signal that ended the run before its verdict; '' if none did."""
    attempts: Sequence[AttemptSummary] = ()
    loss: Sequence[LossCurve] = ()
    memory: Sequence[MemoryCurve] = ()
    seconds_by_stage: Mapping[str, float] = field(default_factory=dict)
    damaged_lines: tuple[int, ...] = ()
    """Lines of the journal that were skipped."""


def build_card(facts: RunFacts) -> RunCard:
    """Build the card from the run's records."""
    outcome, sentence = _ending(facts)
    trained, saved, plan = facts.trained, facts.saved, facts.plan
    return RunCard(
        title=f"{facts.config.model_name}: {outcome}",
        outcome=outcome,
        verdict=sentence,
        reasons=facts.verdict.reasons if facts.verdict else (),
        run_id=facts.run_id,
        model=facts.config.model_name,
        data=data_section(facts.dataset, facts.change) if facts.dataset else None,
        plan=_plan_section(facts.table) if facts.table else None,
        attempts=tuple(facts.attempts),
        loss=tuple(facts.loss),
        memory=tuple(facts.memory),
        trained_on=_trained_on(facts.dataset) if facts.dataset else "",
        confidence=_confidence(facts),
        champion_version=_champion_version(facts),
        compared_with=_compared_with(facts),
        version=saved.version if saved else None,
        held_out_loss_before=_finite(trained.first_held_out_loss) if trained else None,
        held_out_loss_after=_finite(trained.best_held_out_loss) if trained else None,
        # a failed run has no outcome, but it has samples of its memory
        peak_memory_gb=trained.peak_memory_gb if trained else _highest_gb(facts.memory),
        budget_gb=plan.max_memory_gb if plan else None,
        tokens_per_second=_finite(trained.tokens_per_second) if trained else None,
        kernels=f"{plan.memory.kernels}: {plan.reasons.get('kernels', '')}".rstrip(": ")
        if plan
        else "",
        seconds_by_stage=dict(facts.seconds_by_stage),
        failure=_failure(facts.error) if facts.error else None,
        degraded=saved.degraded if saved else plan.degraded if plan else (),
        damaged_lines=facts.damaged_lines,
        adapter_path=saved.path if saved else None,
        roll_back=_roll_back(facts),
        next_steps=tuple(_next_steps(facts)),
        prepare_shell=shell_setup(),
        notes=tuple(_notes(facts)),
    ).model_copy(update=_scores(facts))


def _ending(facts: RunFacts) -> tuple[Outcome, str]:
    """Return the outcome, and the sentence that says why."""
    if facts.verdict is not None:
        return facts.verdict.decision, facts.verdict.sentence
    if facts.nothing_since is not None:
        return "nothing new", f"nothing new since {facts.nothing_since}"
    if facts.cancelled_by:
        stages = list(facts.seconds_by_stage)
        during = f" during the stage {stages[-1]}" if stages else ""
        return "cancelled", f"cancelled by {facts.cancelled_by}{during}; it can be resumed"
    failure = _failure(facts.error)
    return "failed", f"failed: {failure.what.splitlines()[0]}"


def _champion_version(facts: RunFacts) -> str | None:
    """Return the version before the run; 'none' if the registry was asked and had none."""
    if facts.champion is not None:
        return facts.champion.version
    judged = facts.verdict is not None and facts.verdict.decision in ("promoted", "kept")
    return NO_CHAMPION if judged else None


def _confidence(facts: RunFacts) -> float:
    reported = facts.report.confidence if facts.report else None
    return reported or facts.config.gate_confidence


def _compared_with(facts: RunFacts) -> str:
    """Name the models that the candidate was compared with; '' if it was not."""
    if facts.report is None:
        return ""
    champion, paths = facts.champion, facts.change.champion_paths
    if champion is None:
        return f"the base model; no adapter of {facts.config.registered_name} was in use"
    name = f"{champion.registered_model} v{champion.version}"
    if facts.report.score("champion") is None:
        return f"the base model; {name} could not be compared"
    if paths is None:
        return f"the base model and {name}"
    ours = tuple(map(mask_secrets, facts.config.data_paths))  # as an adapter's settings are
    other = "" if paths == ours else ", which are others than this run's"
    named = safe_excerpt(", ".join(paths), QUESTION_CHARACTERS)
    data = f"'{named}'" if paths else "the bundled rows"
    return f"the base model and {name}, trained on {data}{other}"


def _failure(error: BaseException | None) -> FailureSection:
    kind = type(error).__name__ if error else "unknown"
    what, why = str(error or ""), ""
    if isinstance(error, FinetuneError):
        what, why = error.what, error.why
    what = safe_excerpt(what, FAILURE_CHARACTERS) or kind
    return FailureSection(kind=kind, what=what, why=safe_excerpt(why, REASON_CHARACTERS))


def _plan_section(table: PlanTable) -> PlanSection:
    return PlanSection(
        title=table.title,
        headline=table.headline,
        settings=table.settings,
        predicted_gb=table.peak_gb,
        budget_gb=table.budget_gb,
    )


def _trained_on(data: DatasetManifest) -> str:
    return (
        f"{data.train.rows:,} rows ({data.train.tokens:,} tokens), "
        f"{data.dev.rows:,} held out for stopping, {data.test_rows:,} for the test"
    )


# --- scores and answers ---


def _scores(facts: RunFacts) -> dict[str, object]:
    """Return the fields of the card that come from the inference report."""
    report = facts.report
    base, tuned = (report.score(label) if report else None for label in ("base", "candidate"))
    if report is None or base is None or tuned is None:
        return {}
    return {
        "base_score": base.exact_match,
        "tuned_score": tuned.exact_match,
        "scores_by_split": {
            split: (base.by_split[split].exact_match, score.exact_match, score.rows)
            for split, score in tuned.by_split.items()
            if split in base.by_split
        },
        "scores": report.scores,
        "main_metric": report.main_metric,
        "answered_by": answered_by_text(report),
        "questions": questions_text(report),
        "thinking": thinking_text(report),
        # JSON has no NaN, which is the bound of a gain that could not be resampled
        "comparisons": tuple(
            one for one in report.comparisons if all(map(math.isfinite, (one.low, one.high)))
        ),
        "forgetting": _forgetting(base, tuned, facts.config.max_ability_loss_rise),
        "judge": report.judge,
        "answers": tuple(answered_question(pair) for pair in report.samples),
    }


def answered_question(pair: SideBySide) -> AnsweredQuestion:
    """Return a question with its answers, masked and cut, without their reasoning."""
    given = {"base": pair.base, "champion": pair.champion, "candidate": pair.candidate}
    return AnsweredQuestion(
        question=safe_excerpt(pair.question, QUESTION_CHARACTERS),
        reference=safe_excerpt(pair.reference, ANSWER_CHARACTERS),
        split=pair.split,
        answers=tuple(
            ModelAnswer(model=label, text=_answer(text), right=exact_match(text, pair.reference))
            for label in MODELS
            if (text := given[label]) is not None
        ),
    )


def _answer(text: str) -> str:
    thinking, answer = split_thinking(text)
    if answer:
        return safe_excerpt(answer, ANSWER_CHARACTERS)
    return "(no answer: the reasoning did not end)" if thinking else "(no answer)"


def _forgetting(base: ModelScore, tuned: ModelScore, limit: float) -> str:
    """Describe the change of the loss on the ability set."""
    before, after = base.ability_loss, tuned.ability_loss
    if before is None or after is None:
        return "not measured"
    rise = f"{after - before:+.3f} nats per token, limit {limit:+.2f}"
    return f"loss on the ability set {before:.3f} → {after:.3f} ({rise})"


# --- next steps ---


def _roll_back(facts: RunFacts) -> NextStep:
    """Return the command that rolls back, and what would then be in use."""
    name, before = facts.config.registered_name, facts.champion
    if facts.verdict is None or facts.verdict.decision != "promoted":
        if before is None:
            return NextStep(what="This run changed nothing that is in use.")
        return NextStep(what=f"This run changed nothing: {name} v{before.version} stays in use.")
    mine = f"{name} v{facts.verdict.version}"
    command = f'qwen3ft rollback --reason "..." {_about(facts)}'
    if before is None:
        what = f"Nothing was in use before {mine}, so there is no version to go back to."
        return NextStep(what=what)
    again = f"{name} v{before.version}"
    if again == mine:  # the run was resumed after it had promoted its own adapter
        again = "the version before it"
    what = f"This puts {again} back into use instead of {mine}, which no run will promote again."
    return NextStep(what=what, command=command)


def _next_steps(facts: RunFacts) -> Iterator[NextStep]:
    verdict, saved = facts.verdict, facts.saved
    decision = verdict.decision if verdict else None
    if saved is not None and decision is not None:
        adapter = f"--adapter {shlex.quote(saved.path)}"
        yield NextStep(what="Chat with this run's adapter", command=f"qwen3ft chat {adapter}")
        yield NextStep(what="Merge it for serving", command=f"qwen3ft export exported {adapter}")
    if saved is not None and decision == "kept" and saved.version is not None:
        consent = " --allow-degraded" if saved.degraded else ""
        command = f"qwen3ft promote {saved.version}{consent} {_about(facts)}"
        yield NextStep(what="Promote it anyway", command=command)
    if isinstance(facts.error, FinetuneError) and facts.error.next_command:
        yield NextStep(what="Suggested command", command=facts.error.next_command)
    if decision == "deferred" or facts.error is not None or facts.cancelled_by:
        where = "from its last checkpoint" if facts.attempts else "after the stages that are done"
        run = RunDir(Path(facts.config.runs_dir).resolve() / facts.run_id)
        yield NextStep(what=f"Resume the run {where}", command=run.resume_command)
    yield NextStep(
        what="Show what is in use, and every promotion and rollback",
        command=f"qwen3ft history {_about(facts)}",
    )


def _about(facts: RunFacts) -> str:
    """Return the option that names this model, whatever the deployment's settings are."""
    return f"--set {shlex.quote(f'name={facts.config.registered_name}')}"


def _notes(facts: RunFacts) -> Iterator[str]:
    if facts.changed_settings:
        yield f"Settings changed when the run was resumed: {facts.changed_settings}."
    tuned = facts.report.score("candidate") if facts.report else None
    if facts.config.model_name == EMBEDDED_MODEL_NAME and tuned is not None:
        yield EMBEDDED_NOTE
    if tuned is not None and "novel" in tuned.by_split:
        yield NOVEL_NOTE
    if facts.report and facts.report.judge and (note := judge_note(facts.report.judge)):
        yield note
    if facts.saved is not None:
        yield from (f"Degraded: {reason}." for reason in facts.saved.degraded)


def _highest_gb(curves: Sequence[MemoryCurve]) -> float | None:
    return max((gb for curve in curves for _, gb in curve.process), default=None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
