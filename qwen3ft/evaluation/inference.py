"""The inference test: base, candidate and champion answer the same held-out questions.

The 4-bit base is loaded once, and all three are asked alike on it. Only adapters with an intact
manifest are loaded, and every tensor of theirs must be attached. A model whose answers are all
cached is not asked again. `qwen3ft.evaluation.gate` decides what follows from the scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3ft.chat.templates import template_may_think
from qwen3ft.disk.files import read_json_lines, sha256_file
from qwen3ft.errors import (
    DataLoadingError,
    ModelNotFoundError,
    ModelUnavailableError,
    SaveError,
)
from qwen3ft.evaluation.ability import read_ability_rows
from qwen3ft.evaluation.answer_cache import AnswerCache, CachedAnswer
from qwen3ft.evaluation.answers import answers_are_sound, choose_questions
from qwen3ft.evaluation.comparison import write_inference_report
from qwen3ft.evaluation.decoded import Answered, compute_decoded
from qwen3ft.evaluation.exam import Evaluation, Exam, to_question
from qwen3ft.evaluation.gate import gate_policy
from qwen3ft.evaluation.generation import answer_questions, release_memory
from qwen3ft.evaluation.scoring import choose_main_metric
from qwen3ft.evaluation.sequential import plan_looks, settled
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qwen3ft.model.hub import same_base
from qwen3ft.model.saved_adapter import find_base, open_adapter, require_fit
from qwen3ft.model.tensor_files import read_header
from qwen3ft.records.evaluation import Champion, InferenceReport, ModelLabel
from qwen3ft.records.model import ModelSnapshot

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwen3ft.config import TrainingConfig
    from qwen3ft.records.requests import InferenceRequest
    from qwen3ft.training.ranks import Ranks

logger = get_logger("inference")

LabelT = TypeVar("LabelT", bound=str)


class InferenceTester:
    """Access to a saved adapter: load it on its 4-bit base, ask it, check its answers."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def load_finetuned_model(
        self, model_path: str, *, base: str | None = None
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """Load the adapter in the folder `model_path` on the 4-bit base that it was trained on.

        Args:
            model_path: A saved adapter.
            base: Folder of the same base on another machine; by default where it was trained.

        Raises:
            ModelNotFoundError: there is no adapter at `model_path`.
            SaveError: the folder is damaged.
            ModelUnavailableError: the 4-bit base is gone, or not the one trained on.
        """
        folder = Path(model_path)
        base = base or find_base(open_adapter(folder))
        return load_with_adapters(self.config, base, {"candidate": folder})

    def test_inference(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
    ) -> str:
        """Return the greedy answer to `prompt`, without special tokens and reasoning.

        It is '' if the model ended within its reasoning.
        """
        [generated] = answer_questions(
            model,
            tokenizer,
            [prompt],
            batch_size=1,
            max_new_tokens=self.config.max_new_tokens,
            max_thinking_tokens=self.config.max_thinking_tokens,
            thinking=self.config.reasoning_separator is not None,
        )
        return generated.answer

    def validate_model_quality(self, responses: list[str]) -> bool:
        """Return True if 95 % of the responses are not empty and 95 % do not loop."""
        return answers_are_sound(responses)


class LeftToRank0Error(Exception):
    """Transformers answers, whose answers depend on who is asked beside whom: on one rank."""


def run_inference(
    request: InferenceRequest, beat: Callable[[str, int], None], ranks: Ranks | None = None
) -> InferenceReport:
    """Answer held-out questions with base, candidate and champion, and compare them.

    Writes every answer to `request.answers_path` and every score beside it (JSON lines). A champion
    that is damaged or belongs to another base model is left out; the gate then defers its decision.

    Args:
        request: Models to load and questions to ask.
        beat: Called with the phase and the number of questions done.
        ranks: The processes that share the answers, all of which return the same; None if this
            one is alone. If the decoder cannot run, rank 0 goes on alone with transformers.

    Raises:
        DataLoadingError: there are no questions.
        ModelNotFoundError, SaveError: the candidate is missing or damaged.
        OutOfMemoryError: not even one question fits.
        LeftToRank0Error: this rank has nothing to do, as transformers answers.
    """
    from qwen3ft.decoding.fitting import CannotDecodeError

    started = time.monotonic()
    config = request.config
    exam = Exam(
        rows=read_questions(Path(request.questions_path), config.inference_rows),
        ability=read_ability_rows(config),
        batch_size=request.batch_size,
        max_new_tokens=config.max_new_tokens,
        max_thinking_tokens=config.max_thinking_tokens,
        escape=config.special_tokens_in_text == "escape",
        may_think=template_may_think(request.model.chat_template_sha256),
    )
    beat("load", 0)
    adapters = _choose_adapters(request)
    labels: list[ModelLabel] = ["base", *adapters]

    # opened once: what could not be written to the disk is known at the next look all the same
    caches = {label: _open_cache(request, adapters.get(label), ranks) for label in labels}
    metric = choose_main_metric(config.gate_metric, exam.questions)
    looks = plan_looks(config, exam.questions, metric)
    parts = [exam.part(look.rows) for look in looks]
    if ranks is not None:
        _share_known(ranks, caches, [exam, *parts])

    def open_exam(part: Exam) -> dict[ModelLabel, Evaluation]:
        return {label: Evaluation(part, cache) for label, cache in caches.items()}

    # The candidate is always loaded: without an adapter there is no PEFT model to switch.
    to_load: dict[ModelLabel, Path] = {
        label: adapters[label]
        for label, evaluation in open_exam(exam).items()
        if label == "candidate" or (label != "base" and not evaluation.is_complete)
    }
    loaded: tuple[PeftModel, PreTrainedTokenizerBase] | None = None
    answered = Answered("nobody: every answer was known")
    generated = dict.fromkeys(labels, 0)
    for look, part in zip(looks, parts, strict=True):
        evaluations = open_exam(part)
        if not all(evaluation.is_complete for evaluation in evaluations.values()):
            loaded = loaded or load_with_adapters(config, request.model.path, to_load)
            names = list(to_load)
            try:
                new = compute_decoded(request, loaded, evaluations, names, beat, ranks)
            except CannotDecodeError as error:  # on all ranks alike
                if ranks is not None and ranks.rank > 0:
                    raise LeftToRank0Error from error
                ranks = None
                new = _compute_plainly(loaded, evaluations, beat, str(error))
            answered = answered + new
        evaluated = {label: evaluation.results() for label, evaluation in evaluations.items()}
        for label, given in evaluated.items():
            generated[label] += given.generated
        seconds = time.monotonic() - started
        report = write_inference_report(
            request,
            part,
            evaluated,
            seconds,
            answered,
            main_metric=metric,
            confidence=look.confidence,
        )
        why = look is not looks[-1] and settled(
            look, report, request.adapter, request.champion, gate_policy(config)
        )
        if why:
            break
    logger.info("answered by %s%s", answered.by, f"; stopped early: {why}" if why else "")
    return report.model_copy(
        update={
            "generated": generated,
            "questions_planned": len(exam.rows),
            "stopped_early": why or "",
        }
    )


def _compute_plainly(
    loaded: tuple[PeftModel, PreTrainedTokenizerBase],
    evaluations: Mapping[ModelLabel, Evaluation],
    beat: Callable[[str, int], None],
    obstacle: str,
) -> Answered:
    """Compute what is missing of all exams with transformers; return that, and why."""
    release_memory()  # of a decoder that failed
    started = time.monotonic()
    model, tokenizer = loaded
    for label, evaluation in evaluations.items():
        if not evaluation.is_complete:
            with _active(model, label):
                evaluation.compute(model, tokenizer, label, beat)
    return Answered(f"transformers ({obstacle})", time.monotonic() - started)


def _open_cache(
    request: InferenceRequest, adapter: Path | None, ranks: Ranks | None
) -> AnswerCache:
    """Return the known answers of the base, or of an adapter on it; rank 0 alone has files."""
    model = request.model
    files = [adapter / name for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)] if adapter else []
    base = (request.device, model.compute_dtype, model.manifest_sha256, model.chat_template_sha256)
    key = [*base, *(sha256_file(file) for file in files)]
    folder = Path(request.config.cache_dir) / "answers"
    return AnswerCache(folder if ranks is None or ranks.rank == 0 else None, key)


def _share_known(
    ranks: Ranks, caches: Mapping[ModelLabel, AnswerCache], exams: Sequence[Exam]
) -> None:
    """Give all ranks what rank 0 knows: another run may write the files meanwhile."""
    keys = {key: None for exam in exams for keys in exam.keys() for key in keys}  # noqa: SIM118
    known = {
        label: [entry.model_dump() for key in keys if (entry := cache.get(key)) is not None]
        for label, cache in caches.items()
        if ranks.rank == 0
    }
    for label, entries in ranks.share(known)[0].items():
        caches[label].add(CachedAnswer.model_validate(entry) for entry in entries)


def read_questions(path: Path, limit: int) -> list[dict[str, Any]]:
    """Read at most `limit` held-out rows of the file, spread over its splits.

    Raises:
        DataLoadingError: the file has no rows.
    """
    rows = read_json_lines(path)
    if not rows:
        raise DataLoadingError(
            f"There are no held-out questions in {path}.",
            why="Without them nothing shows whether the new adapter is better.",
            next_command="qwen3ft plan --set held_out_fraction=0.1",
            path=str(path),
        )
    questions = [to_question(row) for row in rows]
    return [rows[index] for index in choose_questions(questions, limit)]


def _choose_adapters(request: InferenceRequest) -> dict[ModelLabel, Path]:
    """Return the verified adapters to compare, the candidate first."""
    candidate = Path(request.adapter.path)
    require_fit(open_adapter(candidate), request.model.shape)
    adapters: dict[ModelLabel, Path] = {"candidate": candidate}
    if request.champion is not None:
        try:
            adapters["champion"] = _check_champion(request.champion, request.model)
        except (ModelNotFoundError, SaveError, ModelUnavailableError) as error:
            logger.warning("the champion is left out of the comparison: %s", error)
    return adapters


def _check_champion(champion: Champion, model: ModelSnapshot) -> Path:
    """Return the champion's folder, verified to be intact and on the same base model."""
    folder = Path(champion.adapter_path or "")
    opened = open_adapter(folder)
    base = opened.provenance["base"]
    if not same_base(base, model.source):
        raise ModelUnavailableError(
            f"Champion v{champion.version} belongs to {base['model_name']} at revision "
            f"{base['revision']}, not to {model.source.model_name} at {model.source.revision}.",
            why="Its answers on another base model would say nothing about it.",
            next_command="qwen3ft status",
        )
    require_fit(opened, model.shape)
    return folder


def load_with_adapters(
    config: TrainingConfig, base: str, adapters: Mapping[LabelT, Path]
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the 4-bit base with verified adapters under their labels; the first is active.

    Raises:
        SaveError: an adapter does not fit the base.
    """
    from peft import PeftModel

    from qwen3ft.model.manager import ModelManager

    model, tokenizer = ModelManager(config).load_model_with_quantization(base)
    (first, folder), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    _check_attached(peft_model, first, folder)
    for label, other in others:
        attach_adapter(peft_model, label, other)
    peft_model.set_adapter(first)
    return peft_model.eval(), tokenizer


def attach_adapter(model: PeftModel, label: str, folder: Path) -> None:
    """Attach another verified adapter under `label`.

    Raises:
        SaveError: it does not fit the base.
    """
    model.load_adapter(str(folder), adapter_name=label)
    _check_attached(model, label, folder)


def _check_attached(model: PeftModel, label: str, folder: Path) -> None:
    """Raise SaveError unless exactly the tensors of the file were attached."""
    from peft import get_peft_model_state_dict

    # PEFT only warns about tensors that it could not place.
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
    """Make `model` the one that `label` names, within the body."""
    if label == "base":
        base: AbstractContextManager[None] = model.disable_adapter()
        return base
    model.set_adapter(label)
    return nullcontext()
