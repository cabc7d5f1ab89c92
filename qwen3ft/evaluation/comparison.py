"""Score what the models answered and write the report of the inference test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.thinking import THINK_CLOSE
from qwen3ft.disk.files import sha256_json, write_bytes_atomic
from qwen3ft.evaluation.answers import Generated, Question, choose_samples, side_by_side
from qwen3ft.evaluation.decoded import Answered
from qwen3ft.evaluation.exam import Evaluated, Exam
from qwen3ft.evaluation.form_checks import check_form
from qwen3ft.evaluation.scoring import (
    compare_models,
    run_checks,
    score_model,
    score_row,
)
from qwen3ft.logs import mask_values
from qwen3ft.records.evaluation import (
    RIVALS,
    Comparison,
    InferenceReport,
    MetricName,
    ModelLabel,
    RowScore,
)

if TYPE_CHECKING:
    from qwen3ft.records.requests import InferenceRequest

SCORES_NAME = "row_scores.jsonl"


def write_inference_report(
    request: InferenceRequest,
    exam: Exam,
    evaluated: Mapping[ModelLabel, Evaluated],
    seconds: float,
    answered: Answered,
    *,
    main_metric: MetricName,
    confidence: float,
) -> InferenceReport:
    """Score every model's exam, compare the candidate with the others, and return the report.

    Writes the answers to `request.answers_path` and the scores of each question beside them.
    `confidence` is that of the intervals.
    """
    questions = exam.questions
    splits = [question.split for question in questions]
    rows = {
        label: [
            score_row(question, answer, loss, thinking=thinking)
            for question, answer, loss, thinking in zip(
                questions, given.answers, given.losses, exam.thinking, strict=True
            )
        ]
        for label, given in evaluated.items()
    }
    scores = {
        label: score_model(
            label,
            splits,
            rows[label],
            given.ability,
            _sampled_form(exam, given.sampled),
            confidence=confidence,
        )
        for label, given in evaluated.items()
    }
    pairs = side_by_side(questions, {label: given.answers for label, given in evaluated.items()})
    answers_path = Path(request.answers_path)
    lines = [pair.model_dump_json() + "\n" for pair in pairs]
    write_bytes_atomic(answers_path, "".join(lines).encode())
    scores_path = answers_path.with_name(SCORES_NAME)
    _write_row_scores(scores_path, questions, rows)
    champion = request.champion if "champion" in scores else None
    return InferenceReport(
        adapter_path=request.adapter.path,
        questions_sha256=sha256_json([[q.text, q.reference, q.split] for q in questions]),
        scores=tuple(scores.values()),
        main_metric=main_metric,
        confidence=confidence,
        comparisons=_compare(rows, confidence),
        samples=tuple(choose_samples(pairs)),
        answers_path=request.answers_path,
        scores_path=str(scores_path),
        checks=run_checks(
            scores["candidate"], differs=any(pair.base != pair.candidate for pair in pairs)
        ),
        champion_version=champion.version if champion else None,
        generated={label: given.generated for label, given in evaluated.items()},
        seconds=seconds,
        answered_by=answered.by,
        answer_seconds=answered.seconds,
        predicted_seconds=answered.predicted_seconds,
        predicted_bytes=answered.predicted_bytes,
        may_think=exam.may_think,
        thinking_asked=sum(exam.thinking),
        thinking_cut={
            label: sum(
                answer.thinking_cut
                or (asked and not answer.stopped and THINK_CLOSE not in answer.text)
                for answer, asked in zip(given.answers, exam.thinking, strict=True)
            )
            for label, given in evaluated.items()
        },
    )


def _sampled_form(exam: Exam, sampled: Sequence[Generated]) -> list[dict[str, bool]]:
    questions, thinking = exam.questions, exam.thinking
    return [
        check_form(answer, questions[index], thinking=thinking[index])
        for index, answer in zip(exam.sampled, sampled, strict=True)
    ]


def _compare(
    rows: Mapping[ModelLabel, Sequence[RowScore]], confidence: float
) -> tuple[Comparison, ...]:
    return tuple(
        comparison
        for rival in RIVALS
        if rival in rows
        for comparison in compare_models(
            rival, rows["candidate"], rows[rival], confidence=confidence
        )
    )


def _write_row_scores(
    path: Path, questions: Sequence[Question], rows: Mapping[ModelLabel, Sequence[RowScore]]
) -> None:
    """Write one JSON line per question: its text, its split, and each model's `RowScore`."""
    lines = []
    for index, question in enumerate(questions):
        scores: dict[str, Any] = {
            label: given[index].model_dump(mode="json") for label, given in rows.items()
        }
        # sent to MLflow as it is
        line = mask_values({"question": question.text, "split": question.split, **scores})
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    write_bytes_atomic(path, "".join(lines).encode())
