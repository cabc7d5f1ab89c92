"""Compare the forms of a fine-tuned model on the same held-out rows.

The gate tested the adapter on 4-bit weights. The merged model has the exact base weights instead,
rounded to bfloat16; in 4 bits, its adapter is quantised too. GGUF files, if any, are asked through
a llama.cpp server. One form is in memory at a time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.disk.files import read_json_lines
from qwen3ft.errors import DataLoadingError, InsufficientMemoryError
from qwen3ft.evaluation.answer_loss import answer_losses, mean_loss
from qwen3ft.evaluation.answers import exact_match
from qwen3ft.evaluation.generation import answer_questions
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.logs import get_logger
from qwen3ft.model.manager import ModelManager
from qwen3ft.records.requests import (
    ADAPTER,
    MERGED,
    REQUANTISED,
    ExportRequest,
    FormScore,
    ParityReport,
)
from qwen3ft.serving.gguf_parity import answers_of_gguf, has_no_tools
from qwen3ft.text.commands import shell_line
from qwen3ft.units import GIB, gb

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwen3ft.machine.memory import MemoryOptimizer

logger = get_logger("parity")

LOADED_SHARE = 0.7
"""Share of the budget for the merged model's weights; the rest is for asking it."""

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True)
class _Asked:
    """Answers of one form to the rows."""

    answers: list[str]
    right: list[bool]
    answer_loss: float | None
    seconds: float

    def only(self, places: Sequence[int]) -> _Asked:
        """Return the same for some of the rows."""
        answers = [self.answers[place] for place in places]
        return _Asked(answers, [self.right[place] for place in places], None, self.seconds)


def measure_parity(
    request: ExportRequest,
    memory: MemoryOptimizer,
    beat: Callable[[str, int], None],
    scratch: Path | None = None,
) -> ParityReport:
    """Ask the adapter, the merged model, the merged model in 4 bits, and GGUF the same rows.

    Args:
        request: Names the models and the rows.
        memory: Budget.
        beat: Called with the form and the number of answers so far.
        scratch: Folder given to `write_gguf`; needed if GGUF is asked for.

    Raises:
        DataLoadingError: there are no rows.
        InsufficientMemoryError: the merged model does not fit the budget on a CPU.
        OutOfMemoryError: not even one row fits.
    """
    config = request.config
    rows = _read_rows(Path(request.rows_path), request.limits.max_rows)
    in_4_bits = ModelManager(config.model_copy(update={"quantization": (request.quantization,)}))
    loaders: dict[str, Callable[[], Loaded]] = {
        ADAPTER: partial(InferenceTester(config).load_finetuned_model, request.adapter),
        MERGED: partial(_load_merged, request, memory),
        REQUANTISED: partial(in_4_bits.load_model_with_quantization, request.merged),
    }
    asked = {}
    for form, load in loaders.items():
        beat(f"{form} load", 0)
        asked[form] = _ask(load(), request, rows, partial(beat, form))
        gc.collect()  # the model is in reference cycles; the next form needs its memory
        memory.cleanup_gpu_memory()
        memory.enforce_budget()
        logger.info("%s: answer loss %.4f", form, asked[form].answer_loss)
    scores = [_score(form, asked[form], asked[ADAPTER]) for form in loaders]
    if request.gguf is not None:
        assert scratch is not None
        scores += _gguf_scores(request, rows, asked[ADAPTER], scratch, beat)
    return ParityReport(
        rows=len(rows),
        thinking=any(row.get("reasoning") for row in rows),
        max_loss_drift=request.limits.max_loss_drift,
        max_lost_answers=request.limits.max_lost_answers,
        scores=tuple(scores),
    )


def _gguf_scores(
    request: ExportRequest,
    rows: Sequence[Any],
    adapter: _Asked,
    scratch: Path,
    beat: Callable[[str, int], None],
) -> Iterator[FormScore]:
    """Yield the scores of the GGUF files on the rows without tools."""
    places = [place for place, row in enumerate(rows) if has_no_tools(row)]
    if len(places) < len(rows):
        logger.info(
            "GGUF is compared on %d of %d rows: a llama.cpp server does not answer rows with tools "
            "as text",
            *(len(places), len(rows)),
        )
    kept = [rows[place] for place in places]
    for form, given in answers_of_gguf(request, kept, scratch) if kept else ():
        started = time.monotonic()
        answers = []
        for answer in given:
            answers.append(answer)
            beat(form, len(answers))
        right = [exact_match(text, row["answer"]) for text, row in zip(answers, kept, strict=True)]
        asked = _Asked(answers, right, None, time.monotonic() - started)
        yield _score(form, asked, adapter.only(places))


def _read_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    """Read at most `limit` rows, spread over the file."""
    rows = read_json_lines(path)
    if not rows:
        raise DataLoadingError(
            f"There are no held-out rows in {path}.",
            why="Without them, nothing shows whether the merged model is still the same.",
            next_command=shell_line("ls", "-l", path),
            path=str(path),
        )
    kept = min(limit, len(rows))
    return [rows[index * len(rows) // kept] for index in range(kept)]


def _ask(
    loaded: Loaded, request: ExportRequest, rows: Sequence[Any], progress: Callable[[int], None]
) -> _Asked:
    model, tokenizer = loaded
    config, started = request.config, time.monotonic()
    escape = config.special_tokens_in_text == "escape"
    given = answer_questions(
        model,
        tokenizer,
        rows,
        batch_size=request.batch_size,
        max_new_tokens=config.max_new_tokens,
        max_thinking_tokens=config.max_thinking_tokens,
        thinking=[bool(row.get("reasoning")) for row in rows],
        progress=progress,
        escape=escape,
    )
    losses = answer_losses(model, tokenizer, rows, request.batch_size, progress, escape=escape)
    answers = [answer.answer for answer in given]
    right = [exact_match(text, row["answer"]) for text, row in zip(answers, rows, strict=True)]
    return _Asked(answers, right, mean_loss(losses), time.monotonic() - started)


def _load_merged(request: ExportRequest, memory: MemoryOptimizer) -> Loaded:
    """Load the merged model; weights beyond the budget of a GPU stay in host memory.

    Raises:
        InsufficientMemoryError: it does not fit the budget of a CPU.
    """
    needed_gb = gb(2 * request.shape.total_parameters)
    status = memory.status()
    manager = ModelManager(request.config)
    if needed_gb <= LOADED_SHARE * status.available_gb:
        return manager.load_merged(Path(request.merged))
    if request.device == "cuda":
        budget_bytes = int(LOADED_SHARE * status.available_gb * GIB)
        return manager.load_merged(Path(request.merged), budget_bytes)
    raise InsufficientMemoryError(
        f"The merged model takes {needed_gb:.1f} GB; of the budget of {status.total_gb:.1f} GB, "
        f"{LOADED_SHARE * status.available_gb:.1f} GB are left for it.",
        why="Without a GPU, all of it must be in memory to be compared with the adapter.",
        next_command=shell_line(
            *("qwen3ft", "export", "exported", "--adapter", request.adapter),
            *("--set", f"max_memory_gb={2 * needed_gb + 1:.0f}"),
        ),
        needed_gb=needed_gb,
        budget_gb=status.total_gb,
    )


def _score(form: str, asked: _Asked, adapter: _Asked) -> FormScore:
    rows = len(asked.answers)
    same = sum(ours == theirs for ours, theirs in zip(asked.answers, adapter.answers, strict=True))
    lost = sum(was and not now for was, now in zip(adapter.right, asked.right, strict=True))
    drift = None
    if asked.answer_loss is not None and adapter.answer_loss is not None:
        drift = asked.answer_loss - adapter.answer_loss
    return FormScore(
        form=form,
        exact_match=sum(asked.right) / rows,
        answer_loss=asked.answer_loss,
        same_answers=same / rows,
        lost_answers=lost / rows,
        loss_drift=drift,
        seconds=asked.seconds,
    )
