"""The parts of a run's report: changes in words, curves, escaped texts, names and metric keys."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.finished_run import make_outcome, make_plan, make_snapshot
from support.reported_run import CHAMPION, HOSTILE, SECRET, make_facts, make_report

from deployments.automations import definitions
from qwen3ft.data.safety import safe_excerpt
from qwen3ft.errors import FinetuneError, error_kinds
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.records.preflight import PreflightReport, WorstBatches
from qwen3ft.records.run_card import COMPLETED_STATES, Outcome
from qwen3ft.records.training import Failure, MemoryStatus, TrainingMetrics
from qwen3ft.recovery.adjust import FailedAttempt
from qwen3ft.report import attempts
from qwen3ft.report.build import build_card
from qwen3ft.report.charts import loss_chart, loss_curve, memory_chart, thin
from qwen3ft.report.safe_text import escape_markdown
from qwen3ft.report.score_figure import scores_figure
from qwen3ft.tracking import run_metrics
from qwen3ft.units import GIB
from tasks.names import adjust_name, inference_name, promote_name, save_name, train_name
from tasks.progress import StepProgress

OUTCOMES = get_args(Outcome)
DOCS = Path(__file__).parents[2] / "docs" / "tracking.md"


# --- attempts ---


def test_only_what_changed_is_shown_with_its_reason() -> None:
    """Switches are on or off, sizes are in GB, and each reason is given once."""
    before = make_plan(make_snapshot(), activation_bytes=2 * GIB)
    why = "Memory ran out: less is kept."
    changed = {"micro_batch_size": 2, "gradient_checkpointing": True}
    after = before.with_settings(
        **changed, activation_bytes=GIB, reasons=dict.fromkeys(changed, why), attempt=2
    )
    shown = attempts.changes(before, after)
    assert [(change.name, change.before, change.after) for change in shown] == [
        ("batch", "4 x 1", "2 x 2"),
        ("recomputation", "off", "on"),
        ("kept activations per row", "2.00 GB", "1.00 GB"),
    ]
    assert attempts.changes(before, before) == ()
    assert attempts.reasons_text(attempts.summarise(after, None, 1.0, before)) == why


def test_an_attempt_with_the_same_settings_says_so() -> None:
    """The text also says from which step it resumed."""
    plan = make_plan(make_snapshot())
    failure = Failure(kind="StalledError", what="silent")
    first = attempts.summarise(plan, failure, 1.0)
    again = plan.model_copy(update={"attempt": 2, "resume_from": "x/step-000040"})
    assert attempts.changes_text(first, None) == "as planned"
    text = attempts.changes_text(attempts.summarise(again, None, 1.0, plan), first)
    assert text == "the same settings, a fresh process; from the checkpoint of step 40"


def test_attempts_are_read_from_the_folder_even_if_they_never_ended(tmp_path: Path) -> None:
    """They failed, were interrupted or completed; a folder without a plan is skipped."""
    run = RunDir(tmp_path)
    plan = make_plan(make_snapshot())
    for number in (1, 2, 3):
        run.attempt(number).create(plan.model_copy(update={"attempt": number}))
    write_record(run.attempt(1).failure, Failure(kind="OutOfMemoryError", what="5 of 4 GB"))
    write_record(run.attempt(3).outcome, make_outcome(Path("step-10")))
    run.attempt(4).path.mkdir()
    found = [(one.attempt, one.outcome) for one in attempts.read_attempts(run, ())]
    assert found == [(1, "OutOfMemoryError"), (2, "interrupted"), (3, "completed")]


def test_every_kind_of_failure_has_plain_words() -> None:
    """`OutOfMemoryError` reads `out of memory`."""
    assert attempts.kind_text("OutOfMemoryError") == "out of memory"
    assert attempts.kind_text("interrupted") == "interrupted"
    for kind in error_kinds(FinetuneError):
        assert re.fullmatch("[a-z]+( [a-z]+)*", attempts.kind_text(kind.__name__))


# --- curves ---


@given(st.lists(st.floats(width=32), max_size=900), st.integers(1, 100).map(lambda half: 2 * half))
def test_a_thinned_curve_is_short_finite_in_order_and_keeps_its_extremes(
    values: list[float], most: int
) -> None:
    """This holds for any measurements."""
    points = thin(enumerate(values), most)
    finite = [float(f"{value:.6g}") for value in values if math.isfinite(value)]
    assert len(points) <= most
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    heights = [y for _, y in points]
    assert all(map(math.isfinite, heights))
    if finite:
        assert (min(heights), max(heights)) == (min(finite), max(finite))


def test_charts_stay_within_their_box_and_have_ticks() -> None:
    """A single point and a flat curve are drawn too."""
    facts = make_facts()
    assert loss_chart([loss_curve(1, [])]) is None
    assert memory_chart([]) is None
    single = loss_chart([facts.loss[0].model_copy(update={"training": ((1, 2.0),)})])
    for chart in (loss_chart(facts.loss), memory_chart(facts.memory), single):
        assert 2 <= len(chart.x_ticks) <= 8
        assert 2 <= len(chart.y_ticks) <= 8
        for _, path in chart.paths:
            numbers = [float(n) for n in re.findall(r"[\d.]+", path.partition("h")[0])]
            assert all(0 <= x <= 640 for x in numbers[::2])
            assert all(0 <= y <= 300 for y in numbers[1::2])


# --- texts ---


@given(st.text() | st.sampled_from(HOSTILE), st.integers(1, 60))
def test_shown_text_is_cut_and_has_no_controls(text: str, most: int) -> None:
    """Line breaks may stay; only the note of how much is missing is added."""
    shown = safe_excerpt(text, most)
    assert len(shown) <= most + 40
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)


def test_half_a_secret_is_never_shown() -> None:
    """It does not matter where the cut is, or if a control character splits the secret."""
    text = f"before {SECRET} after"
    for most in range(1, 60):
        assert SECRET[:9] not in safe_excerpt(text, most)
    assert SECRET[:9] not in safe_excerpt(f"x {SECRET[:12]}\x00{SECRET[12:]} y", 60)


@given(st.text(alphabet="ab 1.)-+*_#<>&|[]()!`~\\\n:/w", max_size=30))
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    """This holds in a paragraph, a list and a table cell (CommonMark with GitHub's tables)."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    plain = " ".join(text.split())
    escaped = escape_markdown(text)
    for form in (escaped, f"- {escaped}", f"| a | b |\n|---|---|\n| {escaped} | x |"):
        tokens = parser.parse(form)
        inline = [token for token in tokens if token.type == "inline"]
        kinds = {child.type for token in inline for child in token.children}
        assert kinds <= {"text", "text_special"}
        shown_texts = ["".join(child.content for child in token.children) for token in inline]
        assert plain in shown_texts or not plain


# --- numbers ---


def documented() -> dict[str, set[str]]:
    """Return the keys in the tables of docs/tracking.md, by heading."""
    found: dict[str, set[str]] = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            keys = found.setdefault(line.removeprefix("## "), set())
        elif line.startswith("| `"):
            keys.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


def test_every_key_that_is_logged_is_documented_and_no_other() -> None:
    """The run logs scores, a preflight, a failure and a version."""
    stages = dict.fromkeys(
        (name.partition("/")[2] for name in run_metrics.METRICS if "seconds/" in name), 1.0
    )
    stages.pop("total")
    card = build_card(make_facts(seconds_by_stage=stages, error=KeyError("x")))
    report = PreflightReport(
        key="k",
        device="cpu",
        parts=(),
        phases=(),
        fitted=True,
        budget_bytes=2,
        predicted_bytes=1,
        measured_bytes=1,
        seconds=1.0,
        batches=WorstBatches(train=(), evaluate=(), accumulates=False, steps_looked_at=1),
    )
    logged = run_metrics.card_metrics(card) | run_metrics.preflight_metrics(report)
    logged |= run_metrics.report_metrics(make_report())
    found = {*logged, *run_metrics.CURVES}  # see tests/tracking/test_sender.py
    assert found == set(run_metrics.METRICS) == documented()["Metrics of a run"]
    logged_at_start = {"prefect.flow_run_id", "prefect.flow_run_url", "changed_settings"}
    tags = {*run_metrics.card_tags(card), *logged_at_start}
    assert tags == set(run_metrics.TAGS) == documented()["Tags of a run"]


def test_numbers_that_are_none_are_not_logged() -> None:
    """Examples are a loss that is not finite and a run that did not train."""
    report = make_report(None)
    assert "ability_loss/candidate" not in run_metrics.report_metrics(report)
    nothing = {"verdict": None, "report": None, "saved": None, "trained": None, "plan": None}
    card = build_card(make_facts(**nothing, attempts=(), memory=(), error=KeyError("x")))
    assert all(map(math.isfinite, run_metrics.card_metrics(card).values()))
    assert not {"gain", "memory/peak_gb", "attempts"} & set(run_metrics.card_metrics(card))


def test_tags_are_words_to_filter_by() -> None:
    """The verdict is one of five words; a run that is not degraded says 'no'."""
    tags = run_metrics.card_tags(build_card(make_facts()))
    assert (tags["verdict"], tags["degraded"], tags["champion_before"]) == ("promoted", "no", "7")
    assert tags["verdict_sentence"].startswith("promoted: better than champion v7")
    assert run_metrics.card_tags(build_card(make_facts(champion=None)))["champion_before"] == "none"


def test_every_verdict_has_a_state_that_the_zombie_automation_knows() -> None:
    """Or the server would take a run that ended under that name for one that fell silent."""
    card = build_card(make_facts())
    states = {card.model_copy(update={"outcome": outcome}).state_name for outcome in OUTCOMES}
    kept = card.model_copy(update={"outcome": "kept", "degraded": ("half the rank",)})
    states |= {kept.state_name, *COMPLETED_STATES}
    assert kept.state_name == "Degraded"
    assert {"Promoted", "Kept", "Deferred", "Nothing new", "Failed"} <= states
    [zombies, _] = definitions("deployment")
    assert {f"prefect.flow-run.{state}" for state in states} <= set(zombies["trigger"]["expect"])


def test_progress_says_step_losses_and_time_left() -> None:
    """The time left comes from the mean speed so far; at the end there is none."""
    progress = StepProgress(1300)
    assert progress.text() == "step 0 of 1,300"
    for step, loss, held_out in ((100, 2.0, None), (250, None, 0.77), (300, 0.5312, None)):
        progress.add(measured(step, loss, held_out))
    seen = "step 300 of 1,300, loss 0.531, held-out loss 0.770"
    assert progress.text() == f"{seen}, 16 min 40 s left"
    assert progress.text(ended=True) == seen


def measured(step: int, loss: float | None, held_out_loss: float | None) -> TrainingMetrics:
    """Return a line of metrics of a training that takes a second a step."""
    status = MemoryStatus(
        allocated_gb=0.5, cached_gb=0.5, total_gb=2.0, available_gb=1.0, is_safe=True
    )
    return TrainingMetrics(
        epoch=0.0,
        step=step,
        loss=loss,
        held_out_loss=held_out_loss,
        learning_rate=1e-4,
        memory_usage=status,
        timestamp=datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=step),
    )


def test_scores_of_all_models_are_bars_on_one_axis() -> None:
    """One group of bars for each score that is a share, one bar for each model."""
    report = make_report()
    figure = scores_figure(report)
    [axes] = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert len(labels) == len(report.scores)
    heights = [[bar.get_height() for bar in group] for group in axes.containers if len(group) == 2]
    assert [group[0] for group in heights] == [100 * one.exact_match for one in report.scores]


# --- names of task runs ---


def test_names_of_task_runs_say_what_is_known_when_they_start(tmp_path: Path) -> None:
    """The second attempt's name says its batch, its first step, and the failure before it."""
    plan = make_plan(make_snapshot(), run_dir=str(tmp_path))
    assert train_name({"plan": plan}) == "train-1 (micro-batch 4 x 1)"
    job = RunDir(tmp_path).attempt(1).create(plan)
    failure = Failure(kind="OutOfMemoryError", what="x")
    write_record(job.failure, failure)
    second = plan.with_settings(attempt=2, micro_batch_size=2, resume_from="a/step-000040")
    name = "train-2 (micro-batch 2 x 2 from step 40"
    assert train_name({"plan": second}) == f"{name} after out of memory)"
    job.failure.write_text("{")
    assert train_name({"plan": second}) == f"{name})"
    failed = [FailedAttempt(plan, failure)]
    assert adjust_name({"failed": failed}) == "adjust-1 (out of memory)"
    saved = make_facts().saved
    assert promote_name({"saved": saved, "champion": CHAMPION}) == "promote (v8 against v7)"
    assert promote_name({"saved": saved, "champion": None}) == "promote (v8 against the base model)"
    assert inference_name({"champion": CHAMPION}) == "inference (candidate, base and champion v7)"
    outcome = make_outcome(Path("step-10"))
    assert save_name({"outcome": outcome}) == "save (step 10 of attempt 1)"
