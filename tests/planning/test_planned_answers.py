"""The inference test in a plan: what answers, how long it may think, its peak and its time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.plans import QWEN3_4B, manifest

from qwen3ft.chat.templates import KNOWN_TEMPLATES
from qwen3ft.config import TrainingConfig
from qwen3ft.planning.answers import AnswersPlan, answer_lines, plan_answers
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes
from qwen3ft.planning.fit import choose
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.planning.workload import FitRequest, template_may_think
from qwen3ft.records.data import DatasetManifest
from qwen3ft.units import GIB

MEASURED = Path(__file__).parents[2] / "benchmarks/results/answers-h200-20261129.json"


def request_on(gpu: str = "h200", count: int = 1, **wanted: Any) -> FitRequest:
    config = TrainingConfig(model_name="4b", gpus=str(count), **wanted)
    return shape_request(config, described_machine(require_gpu_spec(gpu), count))


def planned(
    request: FitRequest, dataset: DatasetManifest | None = None, gpu: str = "h200"
) -> AnswersPlan:
    fit = choose(request)
    return plan_answers(request, fit.parts, fit.budget_gb, require_gpu_spec(gpu), dataset)


def test_the_estimate_is_near_what_was_measured() -> None:
    """Within 15 % of both stored cases: 600 questions of one model, half of 256 tokens each."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        load = AnswerLoad(QWEN3_4B, (6,), 600, 140, 90.0, 256, row["tokens"] / 600, drawn=False)
        sizes = DecoderSizes(**row["sizes"])
        assert load.seconds(sizes) == pytest.approx(row["seconds"], rel=0.15)
        beside = row["nvml_gb"] * GIB - load.bytes_of(sizes)
        assert 0 < beside < 4 * GIB  # the model, the process


def test_ranks_share_the_questions_and_have_the_sizes_of_one() -> None:
    """So that the answers are those of one; the plan says how many there are, and the time."""
    one, four = (planned(request_on(count=count, max_memory_gb=13.0)) for count in (1, 4))
    assert (four.slots, four.peak_bytes) == (one.slots, one.peak_bytes)
    assert four.seconds == pytest.approx((one.seconds or 0) / 4, rel=0.25)
    [line, _] = answer_lines(four)
    assert "on each of 4 ranks" in line.why
    assert f"about {four.seconds:,.0f} s" in line.why


def test_the_test_stays_within_the_budget() -> None:
    """A smaller one has fewer slots and takes longer; a slower GPU takes longer too."""
    plans = [planned(request_on(max_memory_gb=budget)) for budget in (6.0, 13.0)]
    for budget, plan in zip((6.0, 13.0), plans, strict=True):
        assert plan.peak_bytes is not None
        assert 0.9 * budget * GIB < plan.peak_bytes <= budget * GIB
    assert plans[0].slots < plans[1].slots
    seconds = [plan.seconds or 0 for plan in plans]
    assert seconds[0] > seconds[1] > 0
    slower = planned(request_on("a100 80gb", max_memory_gb=13.0), gpu="a100 80gb")
    assert (slower.seconds or 0) > 2 * seconds[1]


def test_a_plan_says_how_long_the_longest_answers_would_take() -> None:
    """Where that is far from what references make expect, as with room for 2,048 tokens."""
    short, long = (planned(request_on(max_new_tokens=tokens), manifest()) for tokens in (64, 2048))
    assert (long.most_seconds or 0) > 10 * (short.most_seconds or 0)
    lines = ["\n".join(line.why for line in answer_lines(plan)) for plan in (short, long)]
    assert "all its tokens" not in lines[0]
    assert f"({long.most_seconds:,.0f} s if every answer takes all its tokens)" in lines[1]


def test_thinking_has_a_budget_where_rows_and_model_have_reasoning() -> None:
    """Elsewhere answers come at once, and the plan says why."""
    request, rows = request_on(), manifest()
    reasoned = rows.model_copy(update={"usable_rows": 10, "reasoning_rows": 5})
    thinking = planned(request, reasoned)
    assert (thinking.thinking_tokens, thinking.answer_tokens) == (2048, 512)
    assert "50%" in thinking.about_thinking
    bare = planned(request, rows)
    assert bare.thinking_tokens == 0
    assert "No row has reasoning" in bare.about_thinking
    assert (thinking.seconds or 0) > 2 * (bare.seconds or 0)
    instruct = planned(replace(request, may_think=False), reasoned)
    assert instruct.thinking_tokens == 0
    assert "no thinking" in instruct.about_thinking
    values = {line.name: line.value for line in answer_lines(thinking)}
    assert values["answers"].endswith("x 2,048 + 512 tokens")


@pytest.mark.parametrize(("wanted", "why"), [({"kernels": "plain"}, "plain"), ({}, "bfloat16")])
def test_a_plan_says_why_transformers_answers(wanted: dict[str, Any], why: str) -> None:
    """There is no estimate then."""
    request = request_on(**wanted)
    gpu = request.environment.gpus[0].model_copy(
        update={} if wanted else {"compute_capability": "7.5"}
    )
    machine = request.environment.model_copy(update={"gpus": (gpu,)})
    plan = planned(replace(request, environment=machine))
    assert plan.answered_by.startswith("transformers: ")
    assert why in plan.answered_by
    assert (plan.seconds, plan.peak_bytes) == (None, None)


def test_families_are_known_by_their_templates() -> None:
    """Only an Instruct model of 2507 has no thinking; unknown templates are asked to think."""
    thinks = {name: template_may_think(sha256) for sha256, name in KNOWN_TEMPLATES.items()}
    assert [name for name, does in thinks.items() if not does] == ["Qwen3-Instruct-2507"]
    assert template_may_think("0" * 64)
