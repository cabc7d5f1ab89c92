"""What a fine-tuned model answers, beside the base model and the adapter in use.

Guarantees: the 4-bit base is loaded once, and base, candidate and champion answer the same
questions by the same greedy decoding on it; only adapters whose manifest holds are loaded, from
safetensors, and every tensor of theirs is attached. How answers are generated and scored is in
`qwen3ft.generation` and `qwen3ft.quality`; what follows from the scores in `qwen3ft.promote`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.errors import (
    DataLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    SaveError,
)
from qwen3ft.generation import answer_loss, answer_questions
from qwen3ft.logs import get_logger
from qwen3ft.quality import (
    Generated,
    ModelLabel,
    Question,
    answers_are_sound,
    choose_questions,
    choose_samples,
    run_checks,
    score_answers,
    side_by_side,
)
from qwen3ft.records import ModelSnapshot
from qwen3ft.result_records import Champion, InferenceReport
from qwen3ft.saved_adapter import ADAPTER_FILE, check_adapter, find_base, read_header, read_run_card
from qwen3ft.storage import (
    read_json_lines,
    sha256_json,
    write_bytes_atomic,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwen3ft.config import TrainingConfig
    from qwen3ft.requests import InferenceRequest

__all__ = ["InferenceTester", "answer_loss", "answer_questions", "run_inference"]

logger = get_logger("inference")


class InferenceTester:
    """Loads a saved adapter on its 4-bit base and asks it questions."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def load_finetuned_model(self, model_path: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The adapter in the folder `model_path` on the 4-bit base that its run card names.

        Raises:
            ModelNotFoundError: there is no adapter at `model_path`.
            SaveError: the folder is damaged.
            ModelUnavailableError: the 4-bit base is gone, or not the one trained on.
        """
        folder = Path(model_path)
        check_adapter(folder)
        return _load(self.config, find_base(folder), {"candidate": folder})

    def test_inference(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
    ) -> str:
        """The greedy answer to `prompt`: no special tokens, and the thinking left out.

        '' if the thinking did not end within `config.max_new_tokens`.
        """
        [generated] = answer_questions(
            model,
            tokenizer,
            [prompt],
            batch_size=1,
            max_new_tokens=self.config.max_new_tokens,
            thinking=self.config.reasoning_separator is not None,
        )
        return generated.answer

    def validate_model_quality(self, responses: list[str]) -> bool:
        """Whether enough responses are not empty (95 %) and do not loop (95 %)."""
        return answers_are_sound(responses)


def run_inference(request: InferenceRequest, beat: Callable[[str, int], None]) -> InferenceReport:
    """Answer held-out questions with base, candidate and champion, and compare them.

    Writes every answer to `request.answers_path` (JSON lines). A champion that cannot be compared
    (damaged, or of another base model) is left out of the scores; `qwen3ft.promote` then waits.

    Args:
        request: What to load and to ask.
        beat: Called with the phase and the number of questions done as progress is made.

    Raises:
        DataLoadingError: there are no questions.
        ModelNotFoundError, SaveError: the candidate is missing or damaged.
        OutOfMemoryError: not even one question fits.
    """
    started = time.monotonic()
    rows = _read_rows(Path(request.questions_path), request.config.inference_rows)
    questions = [_question(row) for row in rows]
    beat("load", 0)
    adapters = _choose_adapters(request)
    model, tokenizer = _load(request.config, request.model.path, adapters)
    labels: list[ModelLabel] = ["base", *adapters]
    escape = request.config.special_tokens_in_text == "escape"
    answers: dict[ModelLabel, list[Generated]] = {}
    losses: dict[ModelLabel, float] = {}
    for label in labels:
        with _active(model, label):
            answers[label] = answer_questions(
                model,
                tokenizer,
                rows,
                batch_size=request.batch_size,
                max_new_tokens=request.config.max_new_tokens,
                thinking=[bool(row.get("reasoning")) for row in rows],
                progress=partial(beat, f"{label} answers"),
                escape=escape,
            )
            losses[label] = answer_loss(
                model,
                tokenizer,
                rows,
                request.batch_size,
                partial(beat, f"{label} loss"),
                escape=escape,
            )
    return _report(request, questions, answers, losses, time.monotonic() - started)


def _report(
    request: InferenceRequest,
    questions: Sequence[Question],
    answers: Mapping[ModelLabel, Sequence[Generated]],
    losses: Mapping[ModelLabel, float],
    seconds: float,
) -> InferenceReport:
    """Score the answers of every model, and write them to `request.answers_path`."""
    scores = {
        label: score_answers(label, questions, given, losses[label])
        for label, given in answers.items()
    }
    pairs = side_by_side(questions, answers)
    lines = [pair.model_dump_json() + "\n" for pair in pairs]
    write_bytes_atomic(Path(request.answers_path), "".join(lines).encode())
    scored_champion = request.champion if "champion" in scores else None
    return InferenceReport(
        adapter_path=request.adapter.path,
        questions_sha256=sha256_json([[q.text, q.reference, q.split] for q in questions]),
        scores=tuple(scores.values()),
        samples=tuple(choose_samples(pairs)),
        answers_path=request.answers_path,
        checks=run_checks(scores["candidate"], pairs),
        champion_version=scored_champion.version if scored_champion else None,
        seconds=seconds,
    )


def _read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows of the file, spread over its splits.

    Raises:
        DataLoadingError: there are none.
    """
    rows, _ = read_json_lines(path)
    if not rows:
        raise DataLoadingError(
            f"There are no held-out questions in {path}.",
            why="Without them nothing shows whether the new adapter is better.",
            next_command="qwen3ft plan --set held_out_fraction=0.1",
            path=str(path),
        )
    questions = [_question(row) for row in rows]
    return [rows[index] for index in choose_questions(questions, limit)]


def _question(row: Mapping[str, Any]) -> Question:
    return Question(row["question"], row["answer"], row.get("split") or row.get("kind") or "test")


def _choose_adapters(request: InferenceRequest) -> dict[ModelLabel, Path]:
    """The adapters to compare, verified; the candidate first."""
    candidate = Path(request.adapter.path)
    check_adapter(candidate)
    adapters: dict[ModelLabel, Path] = {"candidate": candidate}
    if request.champion is not None:
        try:
            adapters["champion"] = _check_champion(request.champion, request.model)
        except (ModelNotFoundError, SaveError, ModelUnavailableError) as error:
            logger.warning("the champion is not compared: %s", error)
    return adapters


def _check_champion(champion: Champion, model: ModelSnapshot) -> Path:
    """The champion's folder, if it holds and belongs to the same base model."""
    folder = Path(champion.adapter_path or "")
    check_adapter(folder)
    base = read_run_card(folder)["base"]
    if (base["model_name"], base["revision"]) != (model.source.model_name, model.source.revision):
        raise ModelUnavailableError(
            f"Champion v{champion.version} belongs to {base['model_name']} at revision "
            f"{base['revision']}, not to {model.source.model_name} at {model.source.revision}.",
            why="On another base model its answers would say nothing about it.",
            next_command="qwen3ft status",
        )
    return folder


def _load(
    config: TrainingConfig, base: str, adapters: Mapping[ModelLabel, Path]
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The 4-bit base with the adapters attached under their labels; the first is active."""
    from peft import PeftModel

    from qwen3ft.model import ModelManager

    model, tokenizer = ModelManager(config).load_model_with_quantization(base)
    (first, folder), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for label, other in others:
        peft_model.load_adapter(str(other), adapter_name=label)
    for label, attached in adapters.items():
        _check_attached(peft_model, label, attached)
    peft_model.set_adapter(first)
    return peft_model.eval(), tokenizer


def _check_attached(model: PeftModel, label: ModelLabel, folder: Path) -> None:
    """Raise unless exactly the tensors of the file were attached; PEFT only warns."""
    from peft import get_peft_model_state_dict

    stored = {tensor.name for tensor in read_header(folder / ADAPTER_FILE)}
    attached = set(get_peft_model_state_dict(model, adapter_name=label))
    if stored != attached:
        different = sorted(stored ^ attached)
        raise SaveError(
            f"The adapter in {folder} does not fit its base model: {len(different)} tensor(s) have "
            f"no counterpart, the first is {different[0]}.",
            why="It was trained on a model of another architecture or with other target modules.",
            next_command="qwen3ft status",
            tensors=different[:20],
        )


def _active(model: PeftModel, label: ModelLabel) -> AbstractContextManager[None]:
    """Within it, `model` is the model that `label` names."""
    if label == "base":
        base: AbstractContextManager[None] = model.disable_adapter()
        return base
    model.set_adapter(label)
    return nullcontext()
