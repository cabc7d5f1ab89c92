"""The exams of all models at once, on `qwen3ft.decoding`.

Answers written before memory ran out are kept by the smaller decoder that follows. Of several ranks
each writes a share, with the sizes that one would have for all: so every answer is that of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import ChatRow, generation_prompt, prompt_ids, tokenize_rows
from qwen3ft.chat.thinking import is_opened
from qwen3ft.evaluation.answer_loss import RowLoss
from qwen3ft.evaluation.answers import Generated
from qwen3ft.evaluation.exam import SAMPLING_SEED, Beat, Evaluation
from qwen3ft.evaluation.generation import end_tokens, read_answer
from qwen3ft.faults import reach
from qwen3ft.planning.answers import expected_tokens, sizes_text
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes
from qwen3ft.planning.gpu_specs import find_gpu_spec
from qwen3ft.records.evaluation import ModelLabel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3ft.decoding.decoder import Decoder
    from qwen3ft.decoding.losses import LossQuery
    from qwen3ft.decoding.slots import Query
    from qwen3ft.records.requests import InferenceRequest
    from qwen3ft.training.ranks import Ranks

PILOT_ANSWERS = 64
"""Answers that are written first where nobody knows how long they get: they plan the rest. So many
known ones do it as well."""

SURE_WITHIN = 8.0
"""Most tokens of an answer as a multiple of the expected ones up to which a pilot costs too much:
it takes until its last answer has ended, and a decoder made anew."""


@dataclass(frozen=True)
class Answered:
    """Account of answering all exams.

    Attributes:
        by: Decoder or transformers, with its sizes or the reason.
        seconds: Time of the answers and losses.
        predicted_seconds: The same as predicted; None where there is no estimate.
        predicted_bytes: Predicted peak of the process, or None.
    """

    by: str
    seconds: float = 0.0
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None

    def __add__(self, other: Answered) -> Answered:
        """Return both together: the later engine, the sum of times, the higher peak."""
        predicted = [one.predicted_seconds for one in (self, other)]
        known = [seconds for seconds in predicted if seconds is not None]
        return Answered(
            other.by,
            self.seconds + other.seconds,
            sum(known) if other.predicted_seconds is not None else None,
            max(self.predicted_bytes or 0, other.predicted_bytes or 0) or None,
        )


@dataclass
class _Work:
    """Everything that is missing of all exams, and what was found so far."""

    answers: list[Query]
    prompts: list[str]
    losses: list[LossQuery]
    mine: list[int]
    """Numbers of the answers that this rank writes."""
    my_losses: list[int]
    written: dict[int, Generated]
    nats: dict[int, float]

    def share(self, ranks: Ranks) -> None:
        """Add what the other ranks have written."""
        written = [[index, vars(self.written[index])] for index in self.mine]
        for answers, nats in ranks.share([written, list(self.nats.items())]):
            self.written |= {index: Generated(**given) for index, given in answers}
            self.nats |= dict(nats)


def compute_decoded(
    request: InferenceRequest,
    loaded: tuple[Any, PreTrainedTokenizerBase],
    evaluations: Mapping[ModelLabel, Evaluation],
    adapters: Sequence[ModelLabel],
    beat: Beat,
    ranks: Ranks | None = None,
) -> Answered:
    """Compute and cache what is missing of all exams; return what answered.

    Args:
        request: Budget and settings.
        loaded: PEFT model and tokenizer.
        evaluations: Exams by the model's label.
        adapters: Names of the loaded adapters.
        beat: Called with the phase and the number of rows done.
        ranks: The processes that share the answers; None if this one is alone.

    Raises:
        CannotDecodeError: transformers has to answer.
    """
    import torch

    from qwen3ft.decoding.fitting import CannotDecodeError, find_obstacle, run_within, used_bytes

    model, tokenizer = loaded
    config, snapshot = request.config, request.model
    obstacle = request.without_decoder or find_obstacle(
        model, request.device, snapshot.compute_dtype, config.kernels
    )
    if obstacle:
        raise CannotDecodeError(obstacle)
    exams = [(label, exam) for label, exam in evaluations.items() if not exam.is_complete]
    work = _collect(tokenizer, exams, adapters)
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    load, beside_bytes = _load_of(request, model, adapters, work), used_bytes(request.device)
    gpu = find_gpu_spec(torch.cuda.get_device_name()) if request.device == "cuda" else None
    typical = _known_length(evaluations)
    started = time.monotonic()
    seconds, most_bytes = 0.0, 0

    def write(asked: Sequence[int], load: AnswerLoad) -> DecoderSizes:
        nonlocal seconds, most_bytes
        lengths = [work.answers[index].expected_length for index in asked]
        work.mine = [asked[place] for place in _share_of(lengths, rank, size)]
        sizes, _ = run_within(
            load,
            request.budget_gb or config.max_memory_gb,
            request.device,
            lambda sizes: _answer(model, tokenizer, adapters, sizes, work, beat),
            highest=ranks.highest if ranks else int,
        )
        if ranks is not None:
            work.share(ranks)
        seconds += load.seconds(sizes, gpu, size) if gpu else 0.0
        most_bytes = max(most_bytes, load.bytes_of(sizes))
        return sizes

    if typical is None and _is_unsure(load):
        asked = range(0, len(work.answers), len(work.answers) // PILOT_ANSWERS)
        pilot = replace(load, questions=len(asked), typical_answer_tokens=load.answer_tokens / 2)
        write(asked, pilot)
        typical = sum(work.written[index].tokens for index in asked) / len(asked)
    if typical is not None:
        load = replace(load, typical_answer_tokens=typical)
    work.my_losses = _share_of([len(query.ids) for query in work.losses], rank, size)
    missing = [index for index in range(len(work.answers)) if index not in work.written]
    sizes = write(missing, replace(load, questions=max(1, len(missing))))
    _keep(exams, work)
    return Answered(
        sizes_text(sizes, size),
        time.monotonic() - started,
        seconds if gpu else None,
        beside_bytes + most_bytes,
    )


def _known_length(evaluations: Mapping[ModelLabel, Evaluation]) -> float | None:
    """Return the mean length to expect of what is missing, by answers that are known.

    A model is as long as its own known answers, a candidate at first as those of the champion.
    None if a model that has to answer has too few to go by.
    """
    total, count = 0.0, 0
    for label, evaluation in evaluations.items():
        missing = len(evaluation.missing) + len(evaluation.missing_sampled)
        known = evaluation.known_tokens()
        if len(known) < PILOT_ANSWERS and label == "candidate" and "champion" in evaluations:
            known = evaluations["champion"].known_tokens()
        if missing and len(known) < PILOT_ANSWERS:
            return None
        if missing:
            total, count = total + missing * sum(known) / len(known), count + missing
    return total / count if count else None


def _is_unsure(load: AnswerLoad) -> bool:
    """Return True if answers may be so much longer than references that a pilot pays.

    A decoder for short answers has many slots and few pages: of long ones most then wait in host
    memory (4B, 13 GB, answers of 1,080 tokens taken for 170: 3,150 tokens/s instead of 5,200).
    """
    longer = load.answer_tokens / load.typical_answer_tokens
    return longer > SURE_WITHIN and load.questions >= 4 * PILOT_ANSWERS


def _collect(
    tokenizer: PreTrainedTokenizerBase,
    exams: Sequence[tuple[ModelLabel, Evaluation]],
    adapters: Sequence[ModelLabel],
) -> _Work:
    """Return all questions: per exam greedy ones, drawn ones, then losses in the same order."""
    from qwen3ft.decoding.losses import LossQuery
    from qwen3ft.decoding.projections import BASE
    from qwen3ft.decoding.slots import Query
    from qwen3ft.decoding.writing import AnswerLimits

    work = _Work([], [], [], [], [], {}, {})
    for label, evaluation in exams:
        exam = evaluation.exam
        number = adapters.index(label) if label in adapters else BASE
        asked = [(key, row, False) for key, row in evaluation.missing.items()]
        asked += [(key, row, True) for key, row in evaluation.missing_sampled.items()]
        for key, row, drawn in asked:
            thinking = exam.asks_to_think(row)
            prompt = generation_prompt(tokenizer, row, thinking)
            limits = AnswerLimits(
                answer_tokens=exam.max_new_tokens,
                thinking_tokens=exam.max_thinking_tokens if thinking else 0,
                opened=is_opened(prompt),
                seed=_seed_of(key) if drawn else None,
            )
            ids = prompt_ids(tokenizer, row, thinking, escape=exam.escape)
            expected = len(str(row.get("reasoning") or "")) + len(str(row.get("answer") or ""))
            work.prompts.append(prompt)
            work.answers.append(Query(ids, limits, number, expected_length=expected))
        rows = [*evaluation.missing.values(), *evaluation.missing_ability.values()]
        encoded = tokenize_rows(tokenizer, rows, train_turns="last", escape=exam.escape)
        work.losses += [LossQuery(row.input_ids, row.trained, number) for row in encoded]
    return work


def _share_of(lengths: Sequence[int], rank: int, size: int) -> list[int]:
    """Return the numbers of a rank's share, the longest first, so that all ranks are as long."""
    longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    # Each round begins one rank later. All models have the same questions, so that otherwise one
    # rank had every answer of the base, and another every one of the candidate.
    return [each for place, each in enumerate(longest) if (place + place // size) % size == rank]


def _seed_of(key: str) -> int:
    """Return the seed of a question's draws: the same for every model."""
    return int.from_bytes(sha256(f"{SAMPLING_SEED} {key}".encode()).digest()[:4], "big")


def _load_of(
    request: InferenceRequest, model: Any, adapters: Sequence[ModelLabel], work: _Work
) -> AnswerLoad:
    """Return what the sizes of a decoder depend on."""
    prompts = [len(query.ids) for query in work.answers] or [1]
    limits = [query.limits for query in work.answers]
    most = max((one.answer_tokens + one.thinking_tokens for one in limits), default=1) + 8
    references = [sum(end - start for start, end in query.targets) for query in work.losses]
    mean = sum(references) / max(1, len(references))
    thinking = sum(one.thinking_tokens for one in limits) / max(1, len(limits))
    return AnswerLoad(
        shape=request.model.shape,
        ranks=tuple(model.peft_config[name].r for name in adapters),
        questions=max(1, len(work.answers)),
        prompt_tokens=max(prompts),
        typical_prompt_tokens=sum(prompts) / len(prompts),
        answer_tokens=most,
        typical_answer_tokens=expected_tokens(mean, most, thinking),
        read_tokens=max((len(query.ids) for query in work.losses), default=0),
        drawn=any(one.seed is not None for one in limits),
        compute_bytes=model.get_base_model().dtype.itemsize,
    )


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[ModelLabel],
    sizes: DecoderSizes,
    work: _Work,
    beat: Beat,
) -> None:
    """Write all answers and losses of this rank that `work` lacks."""
    from qwen3ft.decoding.decoder import Decoder
    from qwen3ft.decoding.losses import summed_losses
    from qwen3ft.decoding.writer import AnswerWriter
    from qwen3ft.decoding.writing import Marks

    marks = Marks.of(tokenizer, sorted(end_tokens(model, tokenizer)))
    drawn = [query.limits for query in work.answers if query.limits.seed is not None]
    draws = max((limits.most_tokens(marks) for limits in drawn), default=0)
    decoder: Decoder = Decoder(model, adapters, sizes, marks, draws)
    decoder.capture(draw=draws > 0)
    reach("answers.begun")
    missing = [index for index in work.mine if index not in work.written]
    writer = AnswerWriter(decoder, [work.answers[index] for index in missing])
    for _, ended in writer.bursts():
        for place, written in ended:
            index = missing[place]
            work.written[index] = read_answer(
                model,
                tokenizer,
                work.prompts[index],
                written.tokens,
                thinking_cut=written.thinking_cut,
            )
        beat("answers", len(work.written))
    if not work.nats:
        asked = [work.losses[index] for index in work.my_losses]
        # Counted on from the answers: of several ranks the one with the lowest count is behind.
        done_before = len(work.written)
        found = summed_losses(decoder, asked, lambda done: beat("losses", done_before + done))
        work.nats = dict(zip(work.my_losses, found, strict=True))


def _keep(exams: Sequence[tuple[ModelLabel, Evaluation]], work: _Work) -> None:
    """Put the results into each exam's cache."""
    answers = iter([work.written[index] for index in range(len(work.answers))])
    counts = [sum(end - start for start, end in query.targets) for query in work.losses]
    losses = iter([RowLoss(work.nats[index], count) for index, count in enumerate(counts)])

    def take(source: Any, rows: Mapping[str, ChatRow]) -> list[Any]:
        return [next(source) for _ in rows]

    for _, exam in exams:
        greedy, drawn = take(answers, exam.missing), take(answers, exam.missing_sampled)
        known, ability = take(losses, exam.missing), take(losses, exam.missing_ability)
        exam.keep(greedy, known, drawn, ability)
