"""Batched greedy answers of a model. The loss of given answers is in `answer_loss`.

Guarantees: results come in the order of the questions, and no answer is longer than asked. Running
out of GPU memory halves the batch, because here its size does not change what is asked for
(training never does this: there it is a new attempt).
Does not cover bit-equality between batch sizes: padding changes the order of floating-point sums.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3ft.chat.rendering import (
    Asked,
    generation_prompt,
    prompt_ids,
)
from qwen3ft.chat.thinking import THINK_OPEN
from qwen3ft.errors import OutOfMemoryError
from qwen3ft.evaluation.answers import Generated
from qwen3ft.logs import get_logger

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = get_logger("generation")

PROGRESS_EVERY_TOKENS = 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnProgress = Callable[[int], None]


def no_progress(_: int) -> None:
    """For callers that do not watch."""


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    *,
    batch_size: int,
    max_new_tokens: int,
    thinking: bool | Sequence[bool],
    escape: bool = False,
    progress: OnProgress = no_progress,
    sampling_seed: int | None = None,
) -> list[Generated]:
    """Answer each question greedily, or by sampling; results are in the order of `questions`.

    Args:
        model: In eval mode.
        tokenizer: With a padding token.
        questions: What a user would type, or rows, of which the last turn of the assistant is to
            be written; the chat template is applied here.
        batch_size: Questions at a time; halved whenever memory runs out.
        max_new_tokens: Longest answer, thinking included.
        thinking: Whether the model is asked to think first: of all questions, or of each.
        escape: Read control tokens in the texts as plain text, as `chat.tokenize_rows` does.
        progress: Told the number of questions done, every few tokens.
        sampling_seed: Draw each token by its probability (temperature 1, nothing cut off); the
            same seed, model, questions and batches give the same answers. Greedy if None.

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
        rows = _generate(model, tokenizer, [ids[index] for index in batch], settings, beat)
        return [
            _read(model, tokenizer, prompts[i], row) for i, row in zip(batch, rows, strict=True)
        ]

    with _seeded(sampling_seed):
        for batch, answers in in_batches(order, batch_size, run):
            results.update(zip(batch, answers, strict=True))
            progress(len(results))
    return [results[index] for index in range(len(ids))]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Within it, torch draws from `seed`; afterwards it goes on as if nothing had been drawn."""
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
    """Each batch with `run(batch)`, in order; a batch that runs out of memory is halved for good.

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
        _release_memory()
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
        logger.warning("out of memory; going on with batches of %d", batch_size)


def _run_within_memory(
    run: Callable[[Sequence[_Item]], _Result], batch: Sequence[_Item]
) -> tuple[_Result] | None:
    """`run(batch)` in a tuple, or None when memory ran out.

    Nothing is freed inside the except block: until it is left, the traceback keeps the tensors of
    the failed call alive.
    """
    import torch

    try:
        return (run(batch),)
    except torch.OutOfMemoryError:
        return None


def _release_memory() -> None:
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
) -> list[list[int]]:
    """The tokens after each prompt, up to and including the end token; padding removed."""
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
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    return [_cut_after_end(row, ends) for row in output[:, width:].tolist()]


def greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """The likeliest token every time, up to an end token.

    Each value is set because `generate` takes those left out from the model's own settings, which
    for Qwen3 are those of sampling.
    """
    from transformers import GenerationConfig

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
    """Every token that ends an answer: the tokenizer's, and those the model's settings name."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else named
    return {*named, tokenizer.eos_token_id}


def _cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: list[int]
) -> Generated:
    """The tokens as text, with the thinking tag that the prompt may have opened in front."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if prompt.rstrip().endswith(THINK_OPEN):
        text = f"{THINK_OPEN}\n{text}"
    stopped = bool(tokens) and tokens[-1] in end_tokens(model, tokenizer)
    return Generated(text=text, stopped=stopped, tokens=len(tokens))


def pad_rows(
    rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False
) -> torch.Tensor:
    """Rows as one tensor of the shape (rows, width), filled up with `value` on one side."""
    import torch

    padding = ([value] * (width - len(row)) for row in rows)
    return torch.tensor(
        [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, padding, strict=True)]
    )
