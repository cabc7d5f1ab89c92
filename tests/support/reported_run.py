"""A run with everything that a card can show, and with hostile texts of users."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from support.finished_run import make_outcome, make_plan, make_snapshot
from support.verdicts import gain, report, saved, score

from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.form_checks import FORM_CHECKS
from qwen3ft.evaluation.gate import decide_promotion
from qwen3ft.evaluation.scoring import wilson_interval
from qwen3ft.evaluation.wording import METRIC_NAMES
from qwen3ft.planning.table import PlanTable
from qwen3ft.records.data import DataChange
from qwen3ft.records.evaluation import (
    Champion,
    InferenceReport,
    JudgeReport,
    ModelLabel,
    ModelScore,
    SideBySide,
    SplitScore,
)
from qwen3ft.records.plan import MemoryPart
from qwen3ft.records.run_card import SettingLine
from qwen3ft.records.training import Failure, MemoryStatus, TrainingMetrics
from qwen3ft.report.attempts import summarise
from qwen3ft.report.build import RunFacts
from qwen3ft.report.charts import loss_curve, memory_curves
from qwen3ft.report.figures import AttemptMemory, MemorySample
from qwen3ft.units import GIB

CHAMPION = Champion(registered_model="qwen3ft-embedded", version="7", source_uri="models:/x/7")
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

TOO_MUCH = "4.10 of 4 GB <b>needed</b> | step 41"
SECRET = "hf_" + "abcdefghijklmnopqrstuvwx"
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "</title></svg></main><style>*{display:none}</style>",
    "a | b |\n|---|---|\n| c | d |",
    "# heading\n- list\n> quote\n```\ncode",
    "[click](javascript:alert(3)) ![p](http://evil.example/p.png) https://evil.example",
    "{{ 7 * 7 }} {% raw %} ${x}",
    "what is \u202eevil\u202c? \x00\x1b[31m",
    "מה השעה? ما هو الوقت؟ 现在几点?",
    f"use {SECRET} here",
    "long " * 2000,
)
"""Questions and answers that pages must survive."""


JUDGE = JudgeReport(
    model="<b>qwen</b>|x",
    rival="champion",
    rows=53,
    seconds=7.0,
    wins=31,
    ties=10,
    losses=9,
    unreadable=1,
    win_share=0.62,
    low=0.48,
    high=0.74,
    problem="it answers HTTP 500",
)


def make_report(ability: float | None = 1.6, texts: tuple[str, ...] = HOSTILE) -> InferenceReport:
    """Return the report of a candidate that is better than base and champion."""
    samples = [
        SideBySide(question=text, reference=text, base="no", champion=text, candidate=f"{text}!")
        for text in texts
    ]
    scores = (
        _score("base", 0.1, 2.0, 1.5),
        _score("champion", 0.5, 1.0, 1.6),
        _score("candidate", 0.9, 0.5, ability),
    )
    gains = tuple(
        gain(value, rival, half=0.02, metric=metric, rows=40)
        for rival, value in (("base", 0.8), ("champion", 0.4))
        for metric in METRIC_NAMES
    )
    made = report(*scores, gains=gains)
    return made.model_copy(update={"samples": tuple(samples), "judge": JUDGE})


def _score(label: ModelLabel, share: float, loss: float, ability: float | None) -> ModelScore:
    changes = {"rows": 40, "answer_loss": loss, "ability_loss": ability, "sampled_form": {}}
    return score(
        label,
        share,
        **changes,
        exact_match_interval=wilson_interval(round(40 * share), 40, 0.95),
        form=dict.fromkeys(FORM_CHECKS, 1.0),
        by_split={"fact": SplitScore(rows=40, exact_match=share)},
    )


def make_facts(ability: float | None = 1.6, **changes: Any) -> RunFacts:
    """Return the facts of a run that ran out of memory once and then beat the champion."""
    adapter, compared = saved(path="/out/night 1", version="8"), make_report(ability)
    first = make_plan(make_snapshot())
    second = first.with_settings(
        attempt=2,
        micro_batch_size=2,
        resume_from="attempts/01/checkpoints/step-000040",
        reasons={"micro_batch_size": "Memory ran out: micro-batch of 2."},
    )
    names = ("data/<b>new</b>.jsonl", "data/old.jsonl")
    files = [first.dataset.sources[0].model_copy(update={"path": name}) for name in names]
    values: dict[str, Any] = {
        "config": TrainingConfig(model_name="embedded"),
        "run_id": "night-1",
        "champion": CHAMPION,
        "dataset": first.dataset.model_copy(update={"sources": tuple(files)}),
        "change": DataChange(
            since="qwen3ft-embedded v7",
            new_files=names[:1],
            new_rows=3,
            new_rows_by_file={names[0]: 3},
            examples=HOSTILE,
        ),
        "table": PlanTable(
            title="embedded on the CPU, 4 GB, rows of up to 64 tokens",
            headline="Fits: up to 1.25 of 4 GB; no estimate of speed for a CPU.",
            settings=(SettingLine(name="batch", value="4 x 1", why="All of a step | at once."),),
            parts=(),
            peak_gb=1.25,
            budget_gb=4.0,
            speed=None,
        ),
        "plan": second,
        "trained": make_outcome(Path("step-000010")),
        "saved": adapter,
        "report": compared,
        "verdict": decide_promotion(compared, adapter, champion=CHAMPION),
        "attempts": (
            summarise(first, Failure(kind="OutOfMemoryError", what=TOO_MUCH), 61.0),
            summarise(second, None, 664.0, first),
        ),
        "loss": [loss_curve(number, make_metrics(number)) for number in (1, 2)],
        "memory": memory_curves(
            [make_memory(1, 300, failure="OutOfMemoryError"), make_memory(2, 600)]
        ),
        "seconds_by_stage": {"model": 4.0, "train": 725.0},
    }
    return RunFacts(**{**values, **changes})


def make_metrics(attempt: int) -> list[TrainingMetrics]:
    """Return the metrics of 300 steps with a spike and a loss that is NaN."""
    status = MemoryStatus(
        allocated_gb=0.5, cached_gb=0.75, total_gb=2.0, available_gb=1.25, is_safe=True
    )
    lines = []
    for step in range(1, 301):
        loss = 9.0 if step == 77 else float("nan") if step == 50 else 4.0 / step
        values = {"step": step, "memory_usage": status, "learning_rate": 1e-4, "epoch": 0.0}
        lines.append(TrainingMetrics(**values, loss=loss))
        if step % 50 == 0:
            lines.append(TrainingMetrics(**values, held_out_loss=5.0 / step * attempt))
    return lines


def make_memory(
    number: int, after_seconds: float, *, beside_gb: float = 0.0, **changes: Any
) -> AttemptMemory:
    """Return the memory of an attempt of 100 s, so many seconds after the run's start."""
    started = START + timedelta(seconds=after_seconds)
    sizes = {"allocated_gb": 1.0, "available_gb": 1.0, "beside_gb": beside_gb}
    samples = tuple(
        MemorySample(
            step=step,
            timestamp=started + timedelta(seconds=step),
            cached_gb=1.0 + step / 100,
            **sizes,
        )
        for step in range(1, 100)
    )
    values: dict[str, Any] = {
        "started": started,
        "ended": started + timedelta(seconds=100),
        "budget_gb": 4.0,
        "predicted": make_parts(weights=1.25),
        "samples": samples,
    }
    return AttemptMemory(number=number, **{**values, **changes})


def make_parts(**sizes_gb: float) -> tuple[MemoryPart, ...]:
    """Return parts of a prediction, in GB by name."""
    return tuple(
        MemoryPart(name=name, bytes=int(size_gb * GIB), formula="n")
        for name, size_gb in sizes_gb.items()
    )
