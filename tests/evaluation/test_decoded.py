"""The inference test by the decoder, against transformers model by model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import THINKING, three_models, with_settings
from support.data_stage import write_jsonl
from support.finished_run import make_plan
from support.trained_adapter import Trained

from qwen3ft.chat.templates import KNOWN_TEMPLATES
from qwen3ft.decoding import fitting
from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.fitting import RUNGS, CannotDecodeError, find_obstacle, run_within
from qwen3ft.disk.files import read_json_lines
from qwen3ft.evaluation import decoded
from qwen3ft.evaluation.inference import InferenceTester, run_inference
from qwen3ft.evaluation.wording import answered_by_text, thinking_text
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.units import GIB
from tasks.inference import compare_answers


@pytest.fixture
def request_(trained: Trained, tmp_path: Path) -> InferenceRequest:
    """Ask base, candidate and champion 6 questions, 2 of which may be thought about."""
    return three_models(trained, tmp_path)


def answer(
    request: InferenceRequest, beat: Callable[[str, int], None] = lambda *_: None
) -> tuple[InferenceReport, list[dict[str, Any]]]:
    """Return the report and the answers of all models."""
    report = run_inference(request, beat)
    return report, list(read_json_lines(Path(report.answers_path)))


def test_the_decoder_gives_the_night_of_transformers(
    request_: InferenceRequest, tmp_path: Path
) -> None:
    """Same greedy answers of all three models, thinking budgets included; same losses in fp32."""
    beats: list[tuple[str, int]] = []
    mine, answers = answer(
        with_settings(request_, tmp_path / "ours", kernels="fused"),
        lambda phase, done: beats.append((phase, done)),
    )
    theirs, plain = answer(with_settings(request_, tmp_path / "plain"))
    assert mine.answered_by.startswith("the decoder: ")
    assert theirs.answered_by == "transformers (no GPU)"
    assert {phase for phase, _ in beats} == {"load", "answers", "losses"}
    counts = [done for _, done in beats]
    assert counts == sorted(counts)  # of several ranks, the one with the lowest is behind
    assert answers == plain
    assert len({line["candidate"] for line in answers}) > 1
    assert mine.thinking_asked == theirs.thinking_asked == len(THINKING)
    assert "of 2 answers, ended within its budget: base " in thinking_text(mine)
    assert re.search(r"16 bits; [\d.]+ s$", answered_by_text(mine))  # no estimate for a CPU
    measured = mine.model_copy(update={"predicted_seconds": 9.0, "peak_bytes": 2 * GIB})
    words = answered_by_text(measured.model_copy(update={"predicted_bytes": 3 * GIB}))
    assert words.endswith(" s (9.0 predicted), peak 2.00 GB (3.00 predicted)")
    assert mine.thinking_cut == theirs.thinking_cut
    assert {*mine.generated.values()} == {len(answers)}
    for score in mine.scores:
        other = theirs.score(score.label)
        assert other is not None
        for loss in ("answer_loss", "ability_loss"):
            assert getattr(score, loss) == pytest.approx(getattr(other, loss), rel=1e-4)
        same = {"answer_loss": None, "ability_loss": None, "sampled_form": {}}
        assert score.model_copy(update=same) == other.model_copy(update=same)
        assert score.sampled_form.keys() == other.sampled_form.keys()
    assert [one.gain for one in mine.comparisons] == pytest.approx(
        [one.gain for one in theirs.comparisons], rel=1e-4
    )


def test_a_template_without_thinking_is_not_asked_to_think(
    request_: InferenceRequest, tmp_path: Path
) -> None:
    """Whatever its rows say; and where no row has reasoning, the card says that nobody was."""
    [instruct] = [key for key, name in KNOWN_TEMPLATES.items() if name == "Qwen3-Instruct-2507"]
    model = request_.model.model_copy(update={"chat_template_sha256": instruct})
    asked = request_.model_copy(update={"model": model, "champion": None})
    report, _ = answer(with_settings(asked, tmp_path / "instruct", kernels="fused"))
    assert (report.thinking_asked, thinking_text(report)) == (0, "")
    bare = report.model_copy(update={"may_think": True})
    assert thinking_text(bare).startswith("not asked for")


def test_a_reference_may_be_longer_than_any_answer(
    request_: InferenceRequest, tmp_path: Path
) -> None:
    """Its loss is that of transformers, although no answer and no chunk is as long."""
    [row] = list(read_json_lines(Path(request_.questions_path)))[:1]
    write_jsonl(Path(request_.questions_path), [{**row, "answer": "It is sold there. " * 30}] * 2)
    losses = [
        answer(with_settings(request_, tmp_path / name, kernels=name, champion=None))[0]
        .scores[0]
        .answer_loss
        for name in ("fused", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_answers_that_are_known_are_not_written_again(
    request_: InferenceRequest, tmp_path: Path
) -> None:
    """The next night asks the new adapter alone; with nothing new, nobody is asked."""
    first = with_settings(request_, tmp_path, kernels="fused")
    answer(first.model_copy(update={"adapter": first.adapter, "champion": None}))
    report, _ = answer(first)
    assert report.generated == {"base": 0, "candidate": 0, "champion": 6}
    assert answer(first)[0].answered_by == "nobody: every answer was known"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[AnswerLoad]:
    """Return what decoders are sized for, where every length is in doubt."""
    monkeypatch.setattr(decoded, "SURE_WITHIN", 0.5)
    found: list[AnswerLoad] = []
    choose = fitting.choose_sizes

    def note(load: AnswerLoad, *args: Any, **named: Any) -> DecoderSizes | None:
        found.append(load)
        return choose(load, *args, **named)

    monkeypatch.setattr(fitting, "choose_sizes", note)
    return found


def test_where_answers_may_get_far_longer_a_few_are_written_first(
    request_: InferenceRequest,
    loads: list[AnswerLoad],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is planned with their mean length, and no answer changes."""
    monkeypatch.setattr(decoded, "PILOT_ANSWERS", 4)
    first = with_settings(request_, tmp_path / "ours", kernels="fused")
    answer(first.model_copy(update={"champion": None}))
    pilot, rest = loads
    assert pilot.questions in range(4, 8)
    assert pilot.questions + rest.questions == 24
    assert pilot.typical_answer_tokens == pilot.answer_tokens / 2
    assert 1 <= rest.typical_answer_tokens < rest.answer_tokens
    _, answers = answer(first)
    assert [load.questions for load in loads[2:]] == [12]
    assert answers == answer(with_settings(request_, tmp_path / "plain"))[1]


def test_the_lengths_of_known_answers_plan_the_others(
    request_: InferenceRequest,
    loads: list[AnswerLoad],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each model its own, if there are enough; no pilot is needed then."""
    monkeypatch.setattr(decoded, "PILOT_ANSWERS", 8)
    answer(with_settings(request_, tmp_path, kernels="fused", inference_rows=4))
    first = [load.typical_answer_tokens for load in loads]
    answer(with_settings(request_, tmp_path, kernels="fused"))
    [rest] = loads[len(first) :]
    assert rest.questions == 12
    assert 1 <= rest.typical_answer_tokens < min(first)


@pytest.fixture(scope="module")
def model(trained: Trained) -> Any:
    return InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))[0]


@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "obstacle"),
    [
        ("cpu", "float32", "auto", "no GPU"),
        ("cpu", "float32", "fused", ""),
        ("cuda", "bfloat16", "plain", "kernels=plain"),
        ("cuda", "float32", "auto", "the GPU has no bfloat16"),
    ],
)
def test_why_transformers_answers_is_said(
    model: Any, device: str, dtype: str, kernels: str, obstacle: str
) -> None:
    """On a CPU unless asked for, where the settings say so, and in another type."""
    assert find_obstacle(model, device, dtype, kernels) == obstacle


def test_a_kernel_that_the_gpu_does_not_know_leaves_the_answers_to_transformers(
    request_: InferenceRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs no night, and the reason is kept."""

    def capture(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(Decoder, "capture", capture)
    report, _ = answer(with_settings(request_, tmp_path, kernels="fused"))
    assert "transformers (the decoder failed: RuntimeError: 'CUDA error: no" in report.answered_by


def test_other_errors_of_the_decoder_are_raised(
    request_: InferenceRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a defect nor a GPU that has failed is hidden behind slow answers."""
    for error in (KeyError("slot"), RuntimeError("CUDA error: an illegal memory access was met")):

        def capture(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(Decoder, "capture", capture)
        with pytest.raises(type(error)):
            answer(with_settings(request_, tmp_path, kernels="fused"))


@pytest.mark.slow
def test_a_decoder_that_takes_its_process_along_costs_no_night(
    trained: Trained, request_: InferenceRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process answers without it, and the card will say why."""
    monkeypatch.setenv("QWEN3FT_FAULTS", "exit@point=answers.begun")
    config = with_settings(request_, tmp_path, kernels="fused").config
    plan = make_plan(trained.snapshot, run_id="night")
    folder = {"run_dir": str(tmp_path), "max_memory_gb": 4.0}
    plan = plan.model_copy(
        update={**folder, "dataset": plan.dataset.model_copy(update={"path": str(tmp_path)})}
    )
    report = compare_answers.fn(config, plan, trained.saved, None)
    assert report.answered_by.startswith("transformers (the decoder's process failed: ")
    assert report.score("candidate").rows == 6


SIZES_OF_4B = {"questions": 1800, "prompt_tokens": 140, "typical_prompt_tokens": 90.0}


def load_of(trained: Trained, **changes: Any) -> AnswerLoad:
    values = {"answer_tokens": 264, "typical_answer_tokens": 128.0, **SIZES_OF_4B, **changes}
    return AnswerLoad(shape=trained.snapshot.shape, ranks=(6, 6), **values)


def test_out_of_memory_makes_a_smaller_decoder(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rung takes fewer bytes: no copies in 16 bits, then fewer slots and pages."""
    load = load_of(trained)
    monkeypatch.setattr(fitting, "free_room", lambda *_: GIB)
    tried: list[DecoderSizes] = []

    def use(sizes: DecoderSizes) -> str:
        tried.append(sizes)
        if len(tried) < len(RUNGS):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "answered"

    assert run_within(load, 13.0, "cuda", use) == (tried[-1], "answered")
    sizes = [load.bytes_of(each) for each in tried]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == len(RUNGS)
    assert tried[0].resident_blocks > tried[1].resident_blocks == 0
    tried.clear()
    with pytest.raises(CannotDecodeError, match="memory ran out with every size"):
        run_within(load, 13.0, "cuda", break_off)


def break_off(_: DecoderSizes) -> None:
    """Run out of memory within a captured step, whose end torch then complains about."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except torch.OutOfMemoryError:
        raise RuntimeError("CUDA error: operation failed due to a previous error") from None


def test_a_budget_without_room_is_left_to_transformers(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tried."""
    monkeypatch.setattr(fitting, "free_room", lambda *_: 0)
    with pytest.raises(CannotDecodeError, match="does not fit the budget"):
        run_within(load_of(trained), 13.0, "cuda", lambda _: pytest.fail("it was tried"))
