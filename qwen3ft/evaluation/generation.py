"""Answer questions in batches, greedily or by sampling.

Running out of GPU memory halves the batch; in training, where the batch matters, it is a new
attempt. Answers are not bit-identical between batch sizes: padding changes the order of
floating-point sums.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3ft.chat.rendering import Asked, generation_prompt, prompt_ids
from qwen3ft.chat.thinking import THINK_OPEN, is_opened
from qwen3ft.errors import OutOfMemoryError
from qwen3ft.evaluation.answers import Generated
from qwen3ft.logs import get_logger

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qwen3ft.evaluation.thinking_budget import ThinkingBudget

logger = get_logger("generation")

PROGRESS_EVERY_TOKENS = 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnProgress = Callable[[int], None]


def no_progress(_: int) -> None:
    """Ignore the progress."""


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    *,
    batch_size: int,
    max_new_tokens: int,
    thinking: bool | Sequence[bool],
    max_thinking_tokens: int = 0,
    escape: bool = False,
    progress: OnProgress = no_progress,
    sampling_seed: int | None = None,
) -> list[Generated]:
    """Answer each question; results are in the order of `questions`.

    Args:
        model: In eval mode.
        tokenizer: Must have a padding token.
        questions: Texts that a user would type, or rows whose last assistant turn is to be
            written; the chat template is applied here.
        batch_size: Questions at a time; halved whenever memory runs out.
        max_new_tokens: Longest answer, besides thinking that has a budget of its own.
        thinking: True to let the model think first, for all questions or for each.
        max_thinking_tokens: Tokens of thinking after which its end is written for the model; 0 to
            count the thinking as part of the answer.
        escape: Encode control tokens in the texts as plain text, as in training.
        progress: Called with the number of questions done, every few tokens.
        sampling_seed: Sample at temperature 1 without any cut-off; None for greedy decoding. The
            same seed, model, questions and batches give the same answers.

    Raises:
        OutOfMemoryError: not even one question fits.
        TokenizerError: the chat template cannot be used.
    """
    modes = [thinking] * len(questions) if isinstance(thinking, bool) else thinking
    asked = list(zip(questions, modes, strict=True))
    prompts = [generation_prompt(tokenizer, question, mode) for question, mode in asked]
    ids = [prompt_ids(tokenizer, question, mode, escape=escape) for question, mode in asked]
    # Longest first: neighbours need little padding, and memory runs out early or never.
    order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
    results: dict[int, Generated] = {}

    def run(batch: Sequence[int]) -> list[Generated]:
        def beat() -> None:
            progress(len(results))

        settings = greedy_settings(model, tokenizer, max_new_tokens)
        settings.do_sample = sampling_seed is not None
        budget = None
        if max_thinking_tokens and any(modes[index] for index in batch):
            limits = [
                (max_thinking_tokens if modes[index] else 0, is_opened(prompts[index]))
                for index in batch
            ]
            budget = _budget(model, tokenizer, limits, max_new_tokens)
            settings.max_new_tokens = budget.most_tokens
        texts = [ids[index] for index in batch]
        rows = _generate(model, tokenizer, texts, settings, beat, budget)
        cut = budget.cut if budget else [False] * len(batch)
        return [
            read_answer(model, tokenizer, prompts[index], row, thinking_cut=is_cut)
            for index, row, is_cut in zip(batch, rows, cut, strict=True)
        ]

    with _seeded(sampling_seed):
        for batch, answers in in_batches(order, batch_size, run):
            results.update(zip(batch, answers, strict=True))
            progress(len(results))
    return [results[index] for index in range(len(ids))]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch for the body; afterwards its generators are as they were."""
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def in_batches(
    items: Sequence[_Item], batch_size: int, run: Callable[[Sequence[_Item]], _Result]
) -> Iterator[tuple[Sequence[_Item], _Result]]:
    """Yield each batch with `run(batch)`; after running out of memory, batches are half as large.

    Raises:
        OutOfMemoryError: `run` ran out of memory with a single item.
    """
    done = 0
    while done < len(items):
        batch = items[done : done + batch_size]
        outcome = _run_within_memory(run, batch)
        if outcome is not None:
            yield batch, outcome[0]
            done += len(batch)
            continue
        release_memory()
        if len(batch) == 1:
            raise OutOfMemoryError(
                "The inference test ran out of GPU memory with a batch of one.",
                why="The base model, the adapters and one question do not fit together.",
                next_command="nvidia-smi",
                phase="inference",
                domain="gpu",
                batch_size=1,
            )
        batch_size = len(batch) // 2
        logger.warning("out of memory; continuing with batches of %d", batch_size)


def _run_within_memory(
    run: Callable[[Sequence[_Item]], _Result], batch: Sequence[_Item]
) -> tuple[_Result] | None:
    """Return `run(batch)` in a tuple, or None if memory ran out."""
    import torch

    try:
        return (run(batch),)
    except torch.OutOfMemoryError:
        return None  # the caller frees memory: in here the traceback keeps the tensors alive


def release_memory() -> None:
    """Give unreferenced memory back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    beat: Callable[[], None],
    budget: ThinkingBudget | None,
) -> list[list[int]]:
    """Return the tokens after each prompt, up to and including the end token."""
    import torch
    from transformers import StoppingCriteriaList

    width = max(len(prompt) for prompt in prompts)
    inputs = pad_rows(prompts, width, tokenizer.pad_token_id, left=True).to(model.device)
    mask = pad_rows([[1] * len(prompt) for prompt in prompts], width, 0, left=True).to(model.device)
    ends = end_tokens(model, tokenizer)

    def watch(tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        if (tokens.shape[1] - width) % PROGRESS_EVERY_TOKENS == 0:
            beat()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    output = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([watch, *([budget.watch] if budget else [])]),
        logits_processor=[budget.force] if budget else [],
    )
    rows = [_cut_after_end(row, ends) for row in output[:, width:].tolist()]
    return (
        [row[:count] for row, count in zip(rows, budget.written, strict=True)] if budget else rows
    )


def _budget(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    thinking: Sequence[tuple[int, bool]],
    max_new_tokens: int,
) -> ThinkingBudget:
    """Return the budget of a batch: tokens for thinking, and True if the prompt opened it."""
    from qwen3ft.decoding.writing import AnswerLimits, Marks
    from qwen3ft.evaluation.thinking_budget import ThinkingBudget

    limits = [AnswerLimits(max_new_tokens, tokens, opened) for tokens, opened in thinking]
    marks = Marks.of(tokenizer, sorted(end_tokens(model, tokenizer)))
    return ThinkingBudget(limits, marks, model.device)


def greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Return settings for greedy decoding up to an end token."""
    from transformers import GenerationConfig

    # `generate` takes what is left out from the model's own settings; Qwen3's are for sampling.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=sorted(end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the end tokens: the tokenizer's, and those in the model's settings."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else named
    return {*named, tokenizer.eos_token_id}


def _cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def read_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: list[int],
    *,
    thinking_cut: bool,
) -> Generated:
    """Decode the tokens, after the thinking tag if the prompt ended with one."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if is_opened(prompt):
        text = f"{THINK_OPEN}\n{text}"
    stopped = bool(tokens) and tokens[-1] in end_tokens(model, tokenizer)
    return Generated(text, stopped, len(tokens), thinking_cut)


def pad_rows(
    rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False
) -> torch.Tensor:
    """Return the rows as a tensor of shape (rows, width), padded with `value` on one side."""
    import torch

    padding = ([value] * (width - len(row)) for row in rows)
    return torch.tensor(
        [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, padding, strict=True)]
    )
