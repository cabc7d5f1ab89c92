"""A real 4-bit model with real adapters answers, is scored, and stays trainable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished_run import (
    attach_lora,
    make_outcome,
    make_plan,
    write_checkpoint,
)

from qwen3ft.chat.rendering import generation_prompt, prompt_ids, tokenize_rows
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.errors import (
    DataLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    OutOfMemoryError,
    SaveError,
)
from qwen3ft.evaluation.ability import read_ability_rows
from qwen3ft.evaluation.gate import GatePolicy, decide_promotion
from qwen3ft.evaluation.generation import in_batches
from qwen3ft.evaluation.inference import (
    InferenceTester,
    answer_loss,
    answer_questions,
    run_inference,
)
from qwen3ft.files import read_json_lines, read_manifest_facts, write_manifest
from qwen3ft.model.manager import ModelManager
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.evaluation import Champion, InferenceReport
from qwen3ft.records.model import ModelSnapshot, SavedAdapter
from qwen3ft.records.requests import InferenceRequest

CHAMPION_STEPS, CANDIDATE_STEPS = 6, 40

POLICY = GatePolicy(min_rows=2, max_ability_loss_rise=6.0)
"""For few questions, and adapters that were trained on 16 rows alone."""


@dataclass(frozen=True)
class Night:
    """Files that a night leaves: a 4-bit model, the adapter in use and a better one."""

    config: TrainingConfig
    snapshot: ModelSnapshot
    rows: list[dict[str, str]]
    champion: SavedAdapter
    candidate: SavedAdapter


def training_batch(tokenizer: Any, rows: Sequence[dict[str, str]]) -> dict[str, torch.Tensor]:
    encoded = tokenize_rows(tokenizer, rows)
    width = max(len(row.input_ids) for row in encoded)
    ids, labels = [], []
    for row in encoded:
        tokens, [(prompt_tokens, _)] = row.input_ids, row.trained
        padding = width - len(tokens)
        ids.append(tokens + [0] * padding)
        labels.append([-100] * prompt_tokens + tokens[prompt_tokens:] + [-100] * padding)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


@pytest.fixture(scope="module")
def night(snapshot: ModelSnapshot, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """Train an adapter on 16 rows and save it early and late."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("night")
    config = TrainingConfig(
        model_name="embedded",
        output_dir=str(work / "out"),
        cache_dir=str(work / "cache"),
        max_new_tokens=16,
        inference_rows=12,
    )
    model, tokenizer = ModelManager(config).load_model_with_quantization(snapshot.path)
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    peft_model = attach_lora(model).train()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = training_batch(tokenizer, rows)
    saved = {}
    for step in range(1, CANDIDATE_STEPS + 1):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (CHAMPION_STEPS, CANDIDATE_STEPS):
            checkpoint = write_checkpoint(peft_model, work / f"step-{step:06d}")
            plan = make_plan(snapshot, run_id=f"run-{step}")
            saved[step] = save_adapter(make_outcome(checkpoint), plan, config)
    return Night(config, snapshot, rows, saved[CHAMPION_STEPS], saved[CANDIDATE_STEPS])


@pytest.fixture(scope="module")
def loaded(night: Night) -> tuple[Any, Any]:
    """The candidate and its tokenizer."""
    return InferenceTester(night.config).load_finetuned_model(night.candidate.path)


def request_for(night: Night, folder: Path, **changes: Any) -> InferenceRequest:
    questions = folder / "test.jsonl"
    rows = [{**row, "split": row["kind"]} for row in night.rows]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "config": night.config,
        "model": night.snapshot,
        "adapter": night.candidate,
        "questions_path": str(questions),
        "answers_path": str(folder / "answers.jsonl"),
        "device": "cpu",
        "batch_size": 5,
    }
    request = InferenceRequest(**{**values, **changes})
    # Nothing is known of any model yet, whatever ran before.
    config = request.config.model_copy(update={"cache_dir": str(folder / "cache")})
    return request.model_copy(update={"config": config})


def champion_of(night: Night, path: str) -> Champion:
    return Champion(
        registered_model="qwen3ft-embedded", version="7", source_uri="x", adapter_path=path
    )


def read_answers(report: InferenceReport) -> list[dict[str, Any]]:
    lines = Path(report.answers_path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ask(loaded: tuple[Any, Any], questions: Sequence[Any], **changes: Any) -> list[Any]:
    settings = {"batch_size": 4, "max_new_tokens": 16, "thinking": False, **changes}
    return answer_questions(*loaded, questions, **settings)


def test_three_models_are_compared_on_the_same_questions(night: Night, tmp_path: Path) -> None:
    """Longer training scores better, every answer is on disk, and the verdict follows."""
    beats: list[tuple[str, int]] = []
    champion = champion_of(night, night.champion.path)
    request = request_for(night, tmp_path, champion=champion)
    report = run_inference(request, lambda phase, done: beats.append((phase, done)))
    base, candidate = report.score("base"), report.score("candidate")
    in_use = report.score("champion")
    assert base is not None
    assert candidate is not None
    assert in_use is not None
    assert base.rows == candidate.rows == in_use.rows == night.config.inference_rows
    assert candidate.answer_loss < in_use.answer_loss < base.answer_loss
    assert candidate.exact_match > in_use.exact_match
    assert candidate.exact_match >= 0.9
    assert sum(split.rows for split in base.by_split.values()) == base.rows
    assert all(report.checks.values())
    assert report.generated == dict.fromkeys(("base", "candidate", "champion"), base.rows)
    for rival in ("base", "champion"):
        gain = report.comparison(rival, report.main_metric)
        assert gain is not None
        assert gain.low <= gain.gain <= gain.high
    assert all(0 < share <= 1 for share in candidate.sampled_form.values())
    assert len({base.ability_loss, in_use.ability_loss, candidate.ability_loss}) == 3
    answers = read_answers(report)
    assert len(answers) == base.rows
    assert {*answers[0]} == {"question", "reference", "split", "base", "candidate", "champion"}
    assert sorted(a["question"] for a in answers) == sorted(s.question for s in report.samples)
    assert (
        decide_promotion(report, night.candidate, champion=champion, policy=POLICY).decision
        == "promoted"
    )
    assert ("load", 0) in beats
    for phase in ("base answers", "candidate answers", "champion answers", "candidate loss"):
        assert max(done for name, done in beats if name == phase) == base.rows
    assert max(done for name, done in beats if name == "champion ability") == len(
        read_ability_rows(night.config)
    )
    scores = read_json_lines(Path(report.scores_path))
    assert [line["question"] for line in scores] == [answer["question"] for answer in answers]
    hits = [line["candidate"]["exact_match"] for line in scores]
    assert sum(hits) / len(hits) == candidate.exact_match


def test_what_a_model_answered_is_not_generated_again(
    night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next night asks only the new adapter; if nothing is new, no model is loaded."""
    champion = champion_of(night, night.champion.path)
    first = run_inference(request_for(night, tmp_path, champion=champion), lambda *_: None)
    phases: set[str] = set()
    other = request_for(night, tmp_path, champion=champion_of(night, night.candidate.path))
    other = other.model_copy(update={"adapter": night.champion})
    swapped = run_inference(other, lambda phase, _: phases.add(phase))
    assert swapped.generated == {"base": 0, "candidate": 0, "champion": 0}
    assert phases == {"load"}
    for mine, theirs in (("base", "base"), ("champion", "candidate"), ("candidate", "champion")):
        again, before = swapped.score(mine), first.score(theirs)
        assert again is not None
        assert before is not None
        assert again.model_copy(update={"label": theirs}) == before
    longer = other.config.model_copy(update={"max_new_tokens": 17})
    changed = other.model_copy(update={"config": longer, "champion": None})
    monkeypatch.setattr("qwen3ft.evaluation.inference.read_ability_rows", lambda _: [])
    report = run_inference(changed, lambda phase, _: phases.add(phase))
    assert report.generated == dict.fromkeys(("base", "candidate"), night.config.inference_rows)
    assert "base answers" in phases


def test_base_answers_are_those_of_the_bare_base(night: Night, tmp_path: Path) -> None:
    """Switching the adapters off leaves no trace of them."""
    report = run_inference(request_for(night, tmp_path), lambda *_: None)
    bare = ModelManager(night.config).load_model_with_quantization(night.snapshot.path)
    answers = read_answers(report)
    direct = ask(bare, [answer["question"] for answer in answers], batch_size=5)
    assert [answer["base"] for answer in answers] == [generated.text for generated in direct]
    assert report.champion_version is None


@pytest.mark.parametrize("harm", ["damaged", "other base", "not fetched"])
def test_a_champion_that_cannot_be_compared_defers_the_verdict(
    night: Night, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The candidate is still tested; nothing is promoted over an adapter that was not scored."""
    folder = tmp_path / "champion"
    if harm == "damaged":
        shutil.copytree(night.champion.path, folder)
        (folder / "provenance.json").write_text("{}")
    elif harm == "other base":
        source = night.snapshot.source.model_copy(update={"revision": "f" * 64})
        plan = make_plan(night.snapshot.model_copy(update={"source": source}), run_id="champion")
        config = night.config.model_copy(update={"output_dir": str(tmp_path)})
        checkpoint = Path(night.champion.path).parents[1] / f"step-{CHAMPION_STEPS:06d}"
        save_adapter(make_outcome(checkpoint), plan, config)
    champion = champion_of(night, str(folder))
    config = night.config.model_copy(update={"inference_rows": 2})
    request = request_for(night, tmp_path, champion=champion, config=config)
    report = run_inference(request, lambda *_: None)
    assert report.score("champion") is None
    assert (
        decide_promotion(report, night.candidate, champion=champion, policy=POLICY).decision
        == "deferred"
    )
    assert "the champion is left out" in caplog.text


def test_no_questions_is_an_error(night: Night, tmp_path: Path) -> None:
    """A comparison on no questions proves nothing."""
    request = request_for(night, tmp_path)
    Path(request.questions_path).write_text("")
    with pytest.raises(DataLoadingError, match="no held-out questions"):
        run_inference(request, lambda *_: None)


def test_answers_come_back_in_the_order_of_the_questions(
    night: Night, loaded: tuple[Any, Any]
) -> None:
    """Sorting by length and padding change neither order nor answers.

    Some questions are unlike the training rows: their answers are uncertain, so a single padding
    token that is not masked would change them.
    """
    questions = [row["question"] for row in night.rows[:6]]
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


def test_progress_is_told_while_answers_are_generated(
    night: Night, loaded: tuple[Any, Any]
) -> None:
    """Progress comes after every batch, and every few tokens within one."""
    seen: list[int] = []
    ask(loaded, [row["question"] for row in night.rows[:8]], progress=seen.append)
    assert {4, 8} <= set(seen)
    assert seen == sorted(seen)


def test_the_tester_answers_as_the_spec_asks(night: Night, loaded: tuple[Any, Any]) -> None:
    """Its three methods load, ask and judge."""
    tester = InferenceTester(night.config)
    row = night.rows[0]
    assert tester.test_inference(*loaded, row["question"]) == row["answer"]
    assert tester.validate_model_quality([row["answer"] for row in night.rows])
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


def test_the_loss_is_the_mean_over_answer_tokens(night: Night, loaded: tuple[Any, Any]) -> None:
    """It equals the model's own loss on the batch that training would see, in any batching."""
    model, tokenizer = loaded
    batch = training_batch(tokenizer, night.rows)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for batch_size in (1, 5, 16):
        found = answer_loss(model, tokenizer, night.rows, batch_size)
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_conversation_is_continued_and_its_last_answer_is_scored(
    night: Night, loaded: tuple[Any, Any]
) -> None:
    """Earlier turns are context: the answer follows them, and the loss is not on them."""
    model, tokenizer = loaded
    first, second = night.rows[:2]
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
    assert answer_loss(model, tokenizer, [row], 1) == pytest.approx(expected.loss.item(), rel=1e-4)
    assert prompt_ids(tokenizer, row, False) == tokens.input_ids[:start]


def test_generation_leaves_the_4_bit_model_trainable(night: Night) -> None:
    """After answering in eval mode, every adapter gets the gradients it got before.

    Non-zero gradients would prove little: they reach the first layer past the 4-bit weights too,
    through the residual stream and the adapters.
    """
    loaded = InferenceTester(night.config).load_finetuned_model(night.candidate.path)
    before = adapter_gradients(loaded, night.rows[:4])
    ask(loaded, [row["question"] for row in night.rows[:4]])
    answer_loss(*loaded, night.rows[:4], 2)
    after = adapter_gradients(loaded, night.rows[:4])
    assert len(before) == 2 * 7 * night.snapshot.shape.num_hidden_layers
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
    """Every item is done once and in order, and the size that failed is not tried again."""
    sizes: list[int] = []

    def run(batch: Sequence[int]) -> list[int]:
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


def test_the_tensors_of_a_failed_batch_are_gone_before_the_next() -> None:
    """Nothing, not even the traceback, keeps the memory of the failed call."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def run(batch: Sequence[int]) -> int:
        if held:
            assert held[-1]() is None
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return len(batch)

    assert len(list(in_batches([1, 2], 2, run))) == 2


def test_a_damaged_or_missing_adapter_is_refused(night: Night, tmp_path: Path) -> None:
    """One changed byte is enough, and any other folder is not an adapter."""
    folder = tmp_path / "adapter"
    shutil.copytree(night.candidate.path, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    tester = InferenceTester(night.config)
    with pytest.raises(SaveError, match="sha256"):
        tester.load_finetuned_model(str(folder))
    with pytest.raises(ModelNotFoundError, match="is not a saved adapter"):
        tester.load_finetuned_model(str(MODEL_DIR))


def save_on_copied_base(night: Night, work: Path) -> tuple[SavedAdapter, Path]:
    """Save the candidate as trained on a copy of the snapshot, and return both."""
    base = work / "base"
    shutil.copytree(night.snapshot.path, base)
    plan = make_plan(night.snapshot.model_copy(update={"path": str(base)}), run_id="moved")
    checkpoint = Path(night.candidate.path).parents[1] / f"step-{CANDIDATE_STEPS:06d}"
    config = night.config.model_copy(update={"output_dir": str(work)})
    return save_adapter(make_outcome(checkpoint), plan, config), base


@pytest.mark.parametrize("harm", ["gone", "another"])
def test_an_adapter_without_its_base_says_what_to_do(
    night: Night, tmp_path: Path, harm: str
) -> None:
    """A base that was deleted, or is of another revision, is never silently replaced."""
    saved, base = save_on_copied_base(night, tmp_path)
    if harm == "gone":
        shutil.rmtree(base)
    else:
        source = {**night.snapshot.source.model_dump(), "revision": "f" * 64}
        write_manifest(base, {**read_manifest_facts(base), "source": source})
    with pytest.raises(ModelUnavailableError) as raised:
        InferenceTester(night.config).load_finetuned_model(saved.path)
    assert raised.value.next_command == "qwen3ft plan --set model_name=embedded"


def test_a_base_quantised_again_is_used_and_mentioned(
    night: Night, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A library upgrade must not cost the adapters that were trained before it."""
    saved, base = save_on_copied_base(night, tmp_path)
    (base / "note.txt").write_text("written by a newer version")
    write_manifest(base, read_manifest_facts(base))
    loaded = InferenceTester(night.config).load_finetuned_model(saved.path)
    row = night.rows[0]
    assert ask(loaded, [row["question"]])[0].answer == row["answer"]
    assert "quantised again" in caplog.text


def test_an_adapter_of_another_architecture_is_refused(night: Night, tmp_path: Path) -> None:
    """PEFT would load what fits and warn about the rest; that would test another model."""
    from safetensors.torch import load_file, save_file

    checkpoint = Path(night.candidate.path).parents[1] / f"step-{CANDIDATE_STEPS:06d}"
    other = tmp_path / "step-000001"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "adapter_model.safetensors")
    renamed = {name.replace("layers.2.", "layers.7."): value for name, value in tensors.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    write_manifest(other)
    config = night.config.model_copy(update={"output_dir": str(tmp_path)})
    saved = save_adapter(make_outcome(other), make_plan(night.snapshot), config)
    with pytest.raises(SaveError, match="does not fit its base model"):
        InferenceTester(night.config).load_finetuned_model(saved.path)
