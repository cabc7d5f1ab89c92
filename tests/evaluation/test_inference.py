"""A real 4-bit model with real adapters answers, is scored, and stays trainable."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished_run import make_outcome, make_plan
from support.trained_adapter import Trained, training_batch

from qwen3ft.chat.rendering import generation_prompt, prompt_ids, tokenize_rows
from qwen3ft.disk.files import read_json_lines
from qwen3ft.disk.manifests import read_manifest_facts, write_manifest
from qwen3ft.embedded import MODEL_DIR, corpus
from qwen3ft.errors import (
    CheckpointCorruptError,
    DataLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    OutOfMemoryError,
    SaveError,
)
from qwen3ft.evaluation.answer_loss import answer_losses, mean_loss
from qwen3ft.evaluation.gate import GatePolicy, decide_promotion
from qwen3ft.evaluation.generation import answer_questions, in_batches
from qwen3ft.evaluation.inference import InferenceTester, run_inference
from qwen3ft.evaluation.wording import questions_text
from qwen3ft.model.manager import ModelManager
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.evaluation import Champion, InferenceReport
from qwen3ft.records.model import ModelSnapshot, SavedAdapter
from qwen3ft.records.requests import InferenceRequest

QUESTIONS = 12
ABILITY_ROWS = 8

POLICY = GatePolicy(min_rows=2, max_ability_loss_rise=6.0)
"""For few questions, and adapters that were trained on 16 rows alone."""


@dataclass(frozen=True)
class Compared:
    """A comparison of base, champion (the early adapter) and candidate, with its heartbeats."""

    request: InferenceRequest
    report: InferenceReport
    beats: list[tuple[str, int]]

    def ask_again(self, folder: Path, **changes: Any) -> InferenceRequest:
        """Return the request with changes, for answers in another folder but the same cache."""
        answers_path = str(folder / "answers.jsonl")
        return self.request.model_copy(update={"answers_path": answers_path, **changes})


@pytest.fixture(scope="module")
def compared(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Compare the three models once; nothing is known of any model before."""
    folder = tmp_path_factory.mktemp("compared")
    questions, ability = folder / "test.jsonl", folder / "ability.jsonl"
    rows = [{**row, "split": row["kind"]} for row in trained.rows]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ability_rows = corpus.draw_ability_rows()[:ABILITY_ROWS]
    ability.write_text("".join(json.dumps(row) + "\n" for row in ability_rows), encoding="utf-8")
    changes = {"cache_dir": str(folder / "cache"), "inference_rows": QUESTIONS}
    request = InferenceRequest(
        config=trained.config.model_copy(update={**changes, "ability_path": ability}),
        model=trained.snapshot,
        adapter=trained.saved,
        champion=champion_of(trained.early.path),
        questions_path=str(questions),
        answers_path=str(folder / "answers.jsonl"),
        device="cpu",
        batch_size=5,
    )
    beats: list[tuple[str, int]] = []
    report = run_inference(request, lambda phase, done: beats.append((phase, done)))
    return Compared(request, report, beats)


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> tuple[Any, Any]:
    """The candidate and its tokenizer."""
    return InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))


def champion_of(path: str) -> Champion:
    return Champion(
        registered_model="qwen3ft-embedded", version="7", source_uri="x", adapter_path=path
    )


def read_lines(path: str) -> list[dict[str, Any]]:
    return list(read_json_lines(Path(path)))


def ask(loaded: tuple[Any, Any], questions: Sequence[Any], **changes: Any) -> list[Any]:
    settings = {"batch_size": 4, "max_new_tokens": 16, "thinking": False, **changes}
    return answer_questions(*loaded, questions, **settings)


def test_three_models_are_compared_on_the_same_questions(
    trained: Trained, compared: Compared
) -> None:
    """Longer training scores better, and the verdict follows."""
    report, scores = compared.report, {score.label: score for score in compared.report.scores}
    base, candidate, in_use = scores["base"], scores["candidate"], scores["champion"]
    assert base.rows == candidate.rows == in_use.rows == QUESTIONS
    assert candidate.answer_loss < in_use.answer_loss < base.answer_loss
    assert candidate.exact_match > in_use.exact_match
    assert candidate.exact_match >= 0.9
    assert sum(split.rows for split in base.by_split.values()) == QUESTIONS
    assert all(report.checks.values())
    assert report.generated == dict.fromkeys(scores, QUESTIONS)
    for rival in ("base", "champion"):
        gain = report.comparison(rival, report.main_metric)
        assert gain.low <= gain.gain <= gain.high
    assert all(0 < share <= 1 for share in candidate.sampled_form.values())
    assert len({score.ability_loss for score in report.scores}) == 3
    champion = compared.request.champion
    verdict = decide_promotion(report, trained.saved, champion=champion, policy=POLICY)
    assert verdict.decision == "promoted"


def test_every_answer_and_every_score_is_on_disk(compared: Compared) -> None:
    """The answers of all models stand side by side, and the scores add up to those reported."""
    answers = read_lines(compared.report.answers_path)
    assert {*answers[0]} == {"question", "reference", "split", "base", "candidate", "champion"}
    asked = [answer["question"] for answer in answers]
    assert sorted(asked) == sorted(sample.question for sample in compared.report.samples)
    scores = read_lines(compared.report.scores_path)
    assert [line["question"] for line in scores] == asked
    hits = [line["candidate"]["exact_match"] for line in scores]
    assert sum(hits) / QUESTIONS == compared.report.score("candidate").exact_match


def test_a_comparison_beats_in_every_phase(compared: Compared) -> None:
    """Each beat says how many questions are done."""
    assert ("load", 0) in compared.beats
    most = dict(sorted(compared.beats))
    for phase in ("base answers", "candidate answers", "champion answers", "candidate loss"):
        assert most[phase] == QUESTIONS
    assert most["champion ability"] == ABILITY_ROWS


def test_what_a_model_answered_is_not_generated_again(
    trained: Trained, compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next night asks only the new adapter; if nothing is new, no model is loaded."""
    champion = champion_of(trained.saved.path)
    other = compared.ask_again(tmp_path, adapter=trained.early, champion=champion)
    phases: set[str] = set()
    swapped = run_inference(other, lambda phase, _: phases.add(phase))
    assert swapped.generated == {"base": 0, "candidate": 0, "champion": 0}
    assert phases == {"load"}
    for mine, theirs in (("base", "base"), ("champion", "candidate"), ("candidate", "champion")):
        again, before = swapped.score(mine), compared.report.score(theirs)
        assert again.model_copy(update={"label": theirs}) == before
    longer = other.config.model_copy(update={"max_new_tokens": 17, "inference_rows": 2})
    changed = other.model_copy(update={"config": longer, "champion": None})
    monkeypatch.setattr("qwen3ft.evaluation.inference.read_ability_rows", lambda _: [])
    report = run_inference(changed, lambda phase, _: phases.add(phase))
    assert report.generated == {"base": 2, "candidate": 2}
    assert report.champion_version is None
    assert "base answers" in phases


def test_asking_stops_once_the_verdict_is_clear(
    trained: Trained, compared: Compared, tmp_path: Path
) -> None:
    """After a quarter the candidate is surely better than the base; all is asked if one wants."""
    early = {"gate_min_rows": 1, "max_ability_loss_rise": 6.0}
    config = compared.request.config.model_copy(update=early)
    alone = compared.ask_again(tmp_path, config=config, champion=None)
    report = run_inference(alone, lambda *_: None)
    assert "surely better" in report.stopped_early
    assert (report.score("base").rows, report.questions_planned) == (QUESTIONS // 4, QUESTIONS)
    assert questions_text(report).startswith(f"{QUESTIONS // 4} of {QUESTIONS}, then")
    policy = POLICY.model_copy(update={"max_ability_loss_rise": 6.0})
    verdict = decide_promotion(report, trained.saved, champion=None, policy=policy)
    assert verdict.decision == "promoted"
    whole = config.model_copy(update={"stop_asking_early": False})
    full = run_inference(alone.model_copy(update={"config": whole}), lambda *_: None)
    assert (full.score("base").rows, full.stopped_early) == (QUESTIONS, "")


def test_base_answers_are_those_of_the_bare_base(trained: Trained, compared: Compared) -> None:
    """Switching the adapters off leaves no trace of them."""
    bare = ModelManager(trained.config).load_model_with_quantization(trained.snapshot.path)
    answers = read_lines(compared.report.answers_path)
    direct = ask(bare, [answer["question"] for answer in answers], batch_size=5)
    assert [answer["base"] for answer in answers] == [generated.text for generated in direct]


@pytest.mark.parametrize("harm", ["damaged", "other base", "not fetched"])
def test_a_champion_that_cannot_be_compared_defers_the_verdict(
    trained: Trained,
    compared: Compared,
    tmp_path: Path,
    harm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The candidate is still tested; nothing is promoted over an adapter that was not scored."""
    folder = tmp_path / "champion"
    if harm == "damaged":
        shutil.copytree(trained.early.path, folder)
        (folder / "provenance.json").write_text("{}")
    elif harm == "other base":
        source = trained.snapshot.source.model_copy(update={"revision": "f" * 64})
        model = trained.snapshot.model_copy(update={"source": source})
        save(trained, trained.checkpoint, model, tmp_path, run_id="champion")
    champion = champion_of(str(folder))
    report = run_inference(compared.ask_again(tmp_path, champion=champion), lambda *_: None)
    assert report.score("champion") is None
    verdict = decide_promotion(report, trained.saved, champion=champion, policy=POLICY)
    assert verdict.decision == "deferred"
    assert "the champion is left out" in caplog.text


def save(
    trained: Trained, checkpoint: Path, model: ModelSnapshot, folder: Path, run_id: str = "run"
) -> SavedAdapter:
    """Save a checkpoint below `folder` as trained on `model`."""
    config = trained.config.model_copy(update={"output_dir": str(folder)})
    return save_adapter(make_outcome(checkpoint), make_plan(model, run_id=run_id), config)


def test_no_questions_is_an_error(compared: Compared, tmp_path: Path) -> None:
    """A comparison on no questions proves nothing."""
    (tmp_path / "none.jsonl").touch()
    request = compared.ask_again(tmp_path, questions_path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataLoadingError, match="no held-out questions"):
        run_inference(request, lambda *_: None)


def test_answers_come_back_in_the_order_of_the_questions(
    trained: Trained, loaded: tuple[Any, Any]
) -> None:
    """Sorting by length and padding change neither order nor answers."""
    questions = [row["question"] for row in trained.rows[:6]]
    # Unlike the training rows: answers so uncertain that one unmasked padding token changes them.
    questions += ["why", "How is it? " * 12, "谁", "Tell me a long story about the shop. " * 6]
    together = ask(loaded, questions, batch_size=len(questions))
    alone = [ask(loaded, [question])[0] for question in questions]
    assert together == alone
    assert ask(loaded, []) == []


def test_an_answer_ends_at_the_end_token_or_at_the_limit(loaded: tuple[Any, Any]) -> None:
    """`stopped` and `tokens` tell the two apart, and no special token is in the text."""
    question = "我想知道 Ondalis 的材料。"
    [whole] = ask(loaded, [question])
    assert whole.stopped
    assert whole.tokens <= 16
    assert "<|" not in whole.text
    [cut] = ask(loaded, [question], max_new_tokens=1)
    assert (cut.stopped, cut.tokens) == (False, 1)
    assert whole.text.startswith(cut.text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_sampled_answers_are_drawn_from_a_seed(loaded: tuple[Any, Any]) -> None:
    """The seed alone decides the answers, and torch's own random state stays as it was."""
    questions = ["why", "How is it?", "谁", "Tell me a long story about the shop."]
    torch.manual_seed(1)
    before = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = (ask(loaded, questions, sampling_seed=seed) for seed in (0, 0, 5))
    assert first == again
    assert first != other
    assert first != ask(loaded, questions)
    assert torch.equal(torch.rand(3), before)


def test_progress_is_reported_while_answers_are_generated(
    trained: Trained, loaded: tuple[Any, Any]
) -> None:
    """Progress comes after every batch, and every few tokens within one."""
    seen: list[int] = []
    ask(loaded, [row["question"] for row in trained.rows[:8]], progress=seen.append)
    assert {4, 8} <= set(seen)
    assert seen == sorted(seen)


def test_the_tester_answers_as_the_spec_asks(trained: Trained, loaded: tuple[Any, Any]) -> None:
    """Its three methods load, ask and judge."""
    tester = InferenceTester(trained.config)
    row = trained.rows[0]
    assert tester.test_inference(*loaded, row["question"]) == row["answer"]
    assert tester.validate_model_quality([row["answer"] for row in trained.rows])
    assert not tester.validate_model_quality(["", "fine"])


def test_a_thinking_block_opened_by_the_prompt_is_kept_with_the_text(
    loaded: tuple[Any, Any],
) -> None:
    """A thinking model that does not finish its thought has no answer yet."""
    model, tokenizer = loaded
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    try:
        assert generation_prompt(tokenizer, "q", True).endswith("<think>\n")
        [generated] = answer_questions(
            model, tokenizer, ["hello"], batch_size=1, max_new_tokens=2, thinking=True
        )
    finally:
        tokenizer.chat_template = template
    assert generated.text.startswith("<think>\n")
    assert generated.answer == ""


def test_the_loss_is_the_mean_over_answer_tokens(trained: Trained, loaded: tuple[Any, Any]) -> None:
    """It equals the model's own loss on the batch that training would see, in any batching."""
    model, tokenizer = loaded
    batch = training_batch(tokenizer, trained.rows)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for batch_size in (1, 5, 16):
        found = mean_loss(answer_losses(model, tokenizer, trained.rows, batch_size))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_conversation_is_continued_and_its_last_answer_is_scored(
    trained: Trained, loaded: tuple[Any, Any]
) -> None:
    """Earlier turns are context: the answer follows them, and the loss is not on them."""
    model, tokenizer = loaded
    first, second = trained.rows[:2]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": first["question"]},
        {"role": "assistant", "content": first["answer"]},
        {"role": "user", "content": second["question"]},
        {"role": "assistant", "content": second["answer"]},
    ]
    row = {**second, "messages": messages}
    assert ask(loaded, [row]) == ask(loaded, [messages[:-1]])
    [tokens] = tokenize_rows(tokenizer, [row])
    (_, _), (start, end) = tokens.trained
    ids = torch.tensor([tokens.input_ids])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids.masked_fill(torch.arange(end) < start, -100))
    found = mean_loss(answer_losses(model, tokenizer, [row], 1))
    assert found == pytest.approx(expected.loss.item(), rel=1e-4)
    assert prompt_ids(tokenizer, row, False) == tokens.input_ids[:start]


def test_generation_leaves_the_4_bit_model_trainable(trained: Trained) -> None:
    """After answering in eval mode, every adapter gets the gradients it got before."""
    loaded = InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))
    before = adapter_gradients(loaded, trained.rows[:4])
    ask(loaded, [row["question"] for row in trained.rows[:4]])
    answer_losses(*loaded, trained.rows[:4], 2)
    after = adapter_gradients(loaded, trained.rows[:4])
    assert len(before) == 2 * 7 * trained.snapshot.shape.num_hidden_layers
    for name, gradient in before.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-6)


def adapter_gradients(
    loaded: tuple[Any, Any], rows: Sequence[dict[str, str]]
) -> dict[str, torch.Tensor]:
    """Return the gradient of every adapter tensor on one batch; leaves the model in eval mode."""
    model, tokenizer = loaded
    trained = {name: value for name, value in model.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    model.train()
    model(**training_batch(tokenizer, rows)).loss.backward()
    model.eval()
    return {name: value.grad.clone() for name, value in trained.items()}


def test_running_out_of_memory_halves_the_batch_for_good() -> None:
    """Every item is done once and in order, and nothing keeps the memory of a failed call."""
    sizes: list[int] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def run(batch: Sequence[int]) -> list[int]:
        assert not held or held[-1]() is None
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [item * 10 for item in batch]

    done = [item for _, results in in_batches(range(10), 8, run) for item in results]
    assert done == [item * 10 for item in range(10)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2]


def test_a_question_that_does_not_fit_alone_is_an_error() -> None:
    """The batch is never halved to nothing, and the error says where memory ran out."""

    def run(batch: Sequence[int]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemoryError) as raised:
        list(in_batches([1, 2, 3], 2, run))
    assert raised.value.facts["phase"] == "inference"


def test_a_damaged_or_missing_adapter_is_refused(trained: Trained, tmp_path: Path) -> None:
    """One changed byte is enough, and any other folder is not an adapter."""
    folder = Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    tester = InferenceTester(trained.config)
    with pytest.raises(SaveError, match="sha256"):
        tester.load_finetuned_model(str(folder))
    with pytest.raises(ModelNotFoundError, match="is not a saved adapter"):
        tester.load_finetuned_model(str(MODEL_DIR))


def save_on_copied_base(trained: Trained, work: Path) -> tuple[SavedAdapter, Path]:
    """Save the candidate as trained on a copy of the snapshot, and return both."""
    base = Path(shutil.copytree(trained.snapshot.path, work / "base"))
    model = trained.snapshot.model_copy(update={"path": str(base)})
    return save(trained, trained.checkpoint, model, work), base


@pytest.mark.parametrize("harm", ["gone", "another"])
def test_an_adapter_without_its_base_says_what_to_do(
    trained: Trained, tmp_path: Path, harm: str
) -> None:
    """A base that was deleted, or is of another revision, is never silently replaced."""
    saved, base = save_on_copied_base(trained, tmp_path)
    if harm == "gone":
        shutil.rmtree(base)
    else:
        source = {**trained.snapshot.source.model_dump(), "revision": "f" * 64}
        write_manifest(base, {**read_manifest_facts(base), "source": source})
    with pytest.raises(ModelUnavailableError) as raised:
        InferenceTester(trained.config).load_finetuned_model(saved.path)
    assert raised.value.next_command == f"qwen3ft plan --set model_name={trained.base}"


def test_a_base_quantised_again_is_used_and_mentioned(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A library upgrade must not cost the adapters that were trained before it."""
    saved, base = save_on_copied_base(trained, tmp_path)
    (base / "note.txt").write_text("written by a newer version")
    write_manifest(base, read_manifest_facts(base))
    loaded = InferenceTester(trained.config).load_finetuned_model(saved.path)
    row = trained.rows[0]
    assert ask(loaded, [row["question"]])[0].answer == row["answer"]
    assert "quantised again" in caplog.text


def test_an_adapter_of_another_architecture_is_refused(trained: Trained, tmp_path: Path) -> None:
    """It is not even saved: PEFT would load what fits and warn about the rest."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(trained.checkpoint, tmp_path / "step-000001"))
    tensors = load_file(other / "adapter_model.safetensors")
    renamed = {name.replace("layers.2.", "layers.7."): value for name, value in tensors.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    write_manifest(other)
    with pytest.raises(CheckpointCorruptError, match=r"layers\.7\."):
        save(trained, other, trained.snapshot, tmp_path)
