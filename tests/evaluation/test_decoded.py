"""The exams of all models at once on the decoder, against transformers model by model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data_stage import write_jsonl
from support.trained_adapter import Trained

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.embedded import corpus
from qwen3ft.evaluation import inference
from qwen3ft.evaluation.answer_cache import AnswerCache
from qwen3ft.evaluation.decoded import compute_decoded, find_obstacle
from qwen3ft.evaluation.exam import Evaluation, Exam
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.records.requests import InferenceRequest


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> tuple[Any, Any]:
    return InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))


@pytest.fixture
def request_(trained: Trained, tmp_path: Path) -> InferenceRequest:
    return InferenceRequest(
        config=trained.config,
        model=trained.snapshot,
        adapter=trained.saved,
        questions_path=str(tmp_path / "test.jsonl"),
        answers_path=str(tmp_path / "answers.jsonl"),
        device="cpu",
        batch_size=4,
    )


def test_both_paths_give_the_same_answers_and_losses(
    trained: Trained, loaded: tuple[Any, Any], request_: InferenceRequest, tmp_path: Path
) -> None:
    """Greedy answers are equal, thinking budgets included; losses agree in fp32."""
    rows: list[dict[str, Any]] = [dict(row) for row in trained.rows[:5]]
    rows[1]["reasoning"] = rows[3]["reasoning"] = "It is known."
    exam = Exam(
        rows=rows,
        ability=corpus.draw_ability_rows()[:2],
        batch_size=4,
        max_new_tokens=8,
        max_thinking_tokens=3,
        escape=False,
    )

    def evaluations(name: str) -> dict[Any, Evaluation]:
        return {
            label: Evaluation(exam, AnswerCache(tmp_path / name, [label]))
            for label in ("base", "candidate")
        }

    model, tokenizer = loaded
    ours, plain = evaluations("ours"), evaluations("plain")
    beats: list[str] = []
    words = compute_decoded(
        request_, loaded, ours, ["candidate"], lambda phase, _: beats.append(phase)
    )
    assert words.startswith("the decoder: ")
    assert {*beats} == {"answers", "losses"}
    with model.disable_adapter():
        plain["base"].compute(model, tokenizer, "base", lambda *_: None)
    plain["candidate"].compute(model, tokenizer, "candidate", lambda *_: None)
    for label in ours:
        mine, theirs = ours[label].results(), plain[label].results()
        assert mine.answers == theirs.answers
        for given in ("losses", "ability"):
            pairs = zip(getattr(mine, given), getattr(theirs, given), strict=True)
            for one, other in pairs:
                assert one.tokens == other.tokens
                assert one.nats == pytest.approx(other.nats, rel=1e-4)
        assert len(mine.sampled) == len(theirs.sampled)


def test_why_transformers_answers_is_said(
    loaded: tuple[Any, Any], request_: InferenceRequest
) -> None:
    """On a CPU, where the settings ask for it, and in another type."""
    model, _ = loaded
    assert find_obstacle(request_, model) == "no GPU"
    plain = request_.config.model_copy(update={"kernels": "plain"})
    assert find_obstacle(request_.model_copy(update={"config": plain}), model) == "kernels=plain"


def test_a_decoder_that_fails_leaves_the_answers_to_transformers(
    trained: Trained,
    request_: InferenceRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that does not compile for a GPU costs no night, and the reason is kept."""

    def capture(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(inference, "find_obstacle", lambda *_: "")
    monkeypatch.setattr(Decoder, "capture", capture)
    write_jsonl(Path(request_.questions_path), [dict(row) for row in trained.rows[:2]])
    config = request_.config.model_copy(update={"max_new_tokens": 8})
    report = inference.run_inference(
        request_.model_copy(update={"config": config}), lambda *_: None
    )
    assert "transformers (the decoder failed: RuntimeError: 'no kernel image" in report.answered_by
