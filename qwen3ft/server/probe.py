"""Proof that a version answers over HTTP as it did in its run's test.

The run kept its answers to held-out rows. They are asked again, many at once, as a client would
ask; too many other answers, and the version is not served.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import httpx

from qwen3ft.chat.rendering import conversation_of
from qwen3ft.chat.templates import template_may_think
from qwen3ft.chat.thinking import split_thinking
from qwen3ft.config import TrainingConfig, checked_name
from qwen3ft.disk.files import read_json_lines
from qwen3ft.errors import DataLoadingError, ServedOtherwiseError
from qwen3ft.evaluation.answers import choose_questions, exact_match
from qwen3ft.evaluation.exam import to_question
from qwen3ft.evaluation.inference import read_questions
from qwen3ft.evaluation.scoring import choose_main_metric, weighted_gain
from qwen3ft.evaluation.text_metrics import chrf, token_f1
from qwen3ft.evaluation.wording import METRIC_NAMES
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.records.evaluation import MetricName, SideBySide
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.serving import EngineName

LEAST_SAME_SHARE = 0.98
"""Least share of answers that are the same. Sums in another order turn a near tie now and then."""

MOST_TURNED_SHARE = 0.01
"""Share of tokens that 16 bits may turn: other kernels, other near ties. In one GPU test of short
answers it is at most half of that; one token that turns is another answer from there on."""

MOST_SCORE_LOSS = 0.1
"""Largest loss in the test's metric where 16 bits turn tokens, however few rows are asked."""

CONFIDENCE = 0.99
"""Confidence of the interval of that loss."""

MOST_DIFFERING_SHOWN = 5
_ANSWER_SECONDS = 600.0

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class KeptAnswer:
    """A held-out question, its reference, and the answer in the test of the run."""

    messages: list[dict[str, Any]]
    thinking: bool
    answer: str
    reference: str


@dataclass(frozen=True)
class KeptTest:
    """Rows of a run's test: its answers, the metric that decided, the device that wrote them."""

    answers: list[KeptAnswer]
    metric: MetricName
    device: Device


@dataclass(frozen=True)
class ServedAnswer:
    """An answer over HTTP; its tokens count the thinking too, 0 if the request failed."""

    text: str
    tokens: int


def read_kept_test(config: TrainingConfig, run_id: str, limit: int) -> KeptTest:
    """Return at most `limit` answers that the run's candidate gave, spread over the test.

    Rows with tools are left out, since the server offers none.

    Raises:
        DataLoadingError: the run's questions or answers are not on this machine, or unreadable.
    """
    run = RunDir(Path(config.runs_dir) / checked_name(run_id, "run", "qwen3ft history"))
    job = run.job("inference")
    try:
        request = read_record(job.request, InferenceRequest)
        rows = read_questions(Path(request.questions_path), request.config.inference_rows)
        given = [
            SideBySide.model_validate(line) for line in read_json_lines(Path(request.answers_path))
        ]
        questions = [to_question(row) for row in rows]
        # A test that stopped early asked as many as there are answers.
        asked = choose_questions(questions, len(given))
        rows = [rows[index] for index in asked]
        texts = [questions[index].text for index in asked]
        if not rows or texts != [answers.question for answers in given]:
            raise ValueError("the answers are not those to the questions")
    except (OSError, ValueError, DataLoadingError) as error:
        raise DataLoadingError(
            f"Run {run_id} has no kept answers of its test on this machine.",
            why=f"{job.path} or its questions were removed, changed or written by another version, "
            "or the run was made elsewhere; so nothing shows whether its adapter is served as it "
            f"was tested ({str(error)[:200]}).",
            next_command="qwen3ft serve --probe-rows 0",
        ) from error
    pairs = [pair for pair in zip(rows, given, strict=True) if not _has_tools(pair[0])]
    may_think = template_may_think(request.model.chat_template_sha256)
    kept = min(limit, len(pairs))
    chosen = [pairs[index * len(pairs) // kept] for index in range(kept)]
    kept_answers = [
        KeptAnswer(
            messages=[_as_sent(message) for message in conversation_of(row).history.messages],
            thinking=bool(row.get("reasoning")) and may_think,
            answer=split_thinking(answers.candidate)[1],
            reference=answers.reference,
        )
        for row, answers in chosen
    ]
    metric = choose_main_metric(request.config.gate_metric, questions)
    return KeptTest(kept_answers, metric, request.device)


async def prove(
    client: httpx.AsyncClient,
    name: str,
    test: KeptTest,
    default_thinking: bool,
    engine: EngineName,
    device: Device,
    at_once: int,
) -> str:
    """Ask the server for all kept answers; return how like the test it answers, in words.

    Args:
        client: Client of this very server, with the right to ask versions on trial.
        name: Name of the version.
        test: Questions and answers.
        default_thinking: The version thinks if a request says nothing about it.
        engine: The program that writes its answers.
        device: Its device.
        at_once: Most questions that are asked at a time.

    Raises:
        ServedOtherwiseError: the answers are not those of the test.
    """
    places = asyncio.Semaphore(at_once)

    async def ask(one: KeptAnswer) -> ServedAnswer:
        body: dict[str, Any] = {"model": name, "messages": one.messages}
        if one.thinking != default_thinking:
            body["chat_template_kwargs"] = {"enable_thinking": one.thinking}
        try:
            async with places:
                response = await client.post(
                    "/v1/chat/completions", json=body, timeout=_ANSWER_SECONDS
                )
        except httpx.HTTPError as error:
            return ServedAnswer(f"({type(error).__name__})", 0)
        if response.status_code != 200:
            return ServedAnswer(f"(status {response.status_code}: {response.text[:200]})", 0)
        answer = response.json()
        text = str(answer["choices"][0]["message"]["content"])
        return ServedAnswer(text, answer["usage"]["completion_tokens"])

    answers = await asyncio.gather(*map(ask, test.answers))
    # llama.cpp computes in 16 bits everywhere; nothing else does without a GPU
    in_16_bits = "cuda" in (test.device, device) or engine == "llama.cpp"
    objection, likeness = judge(test, answers, in_16_bits=in_16_bits)
    if not objection:
        return likeness
    other = [
        {"question": str(one.messages[-1]["content"]), "tested": one.answer, "served": answer.text}
        for one, answer in zip(test.answers, answers, strict=True)
        if one.answer != answer.text
    ]
    shown = "; ".join(
        f"{one['question'][-80:]!r}: {one['served'][:80]!r} instead of {one['tested'][:80]!r}"
        for one in other[:MOST_DIFFERING_SHOWN]
    )
    what = f"{name} does not answer as in its test ({likeness}): {objection}. {shown}."
    if engine != "own":
        raise ServedOtherwiseError(
            what,
            why=f"{engine} rounds sums otherwise than the test did, or asks or answers otherwise.",
            next_command="qwen3ft serve --engine own",
            version=name,
            differing=other,
        )
    raise ServedOtherwiseError(
        what,
        why="The engine, the chat template or the decoding is not that of the test. To serve it "
        "all the same, ask no held-out rows.",
        next_command="qwen3ft serve --probe-rows 0",
        version=name,
        differing=other,
    )


def judge(test: KeptTest, served: Sequence[ServedAnswer], *, in_16_bits: bool) -> tuple[str, str]:
    """Return why the answers are not those of the test ('' if they are), and how like they are.

    Where nothing computed in 16 bits they are the same, but for a rare near tie. Else each token
    may turn, and an answer of hundreds seldom stays the same; then its score has to.
    """
    count = len(served)
    same = sum(one.answer == answer.text for one, answer in zip(test.answers, served, strict=True))
    likeness = f"{same} of {count} answers are the same"
    if same >= LEAST_SAME_SHARE * count:
        return "", likeness
    if not in_16_bits:
        return f"at least {LEAST_SAME_SHARE:.0%} have to be", likeness
    expected = fmean((1 - MOST_TURNED_SHARE) ** answer.tokens for answer in served)
    least = expected - 3 * math.sqrt(expected * (1 - expected) / count)
    if same < least * count:
        return f"of answers of this length at least {least:.0%} have to be", likeness
    metric = "token_f1" if test.metric == "answer_loss" else test.metric
    score: Callable[[str, str], float] = _SCORES[metric]
    before = [float(score(one.answer, one.reference)) for one in test.answers]
    after = [
        float(score(answer.text, one.reference))
        for one, answer in zip(test.answers, served, strict=True)
    ]
    gains = [new - old for new, old in zip(after, before, strict=True)]
    gain = weighted_gain(gains, [1.0] * count, confidence=CONFIDENCE)
    likeness = f"{likeness}; {METRIC_NAMES[metric]} {fmean(after):.1%}, there {fmean(before):.1%}"
    if gain.high < 0 or gain.estimate < -MOST_SCORE_LOSS:
        return f"the score is lower by more than chance or {MOST_SCORE_LOSS:g} explains", likeness
    return "", likeness


_SCORES = {"exact_match": exact_match, "token_f1": token_f1, "chrf": chrf}


def _has_tools(row: dict[str, Any]) -> bool:
    messages = row.get("messages") or ()
    return bool(row.get("tools")) or any(message["role"] == "tool" for message in messages)


def _as_sent(message: Any) -> dict[str, Any]:
    sent = {"role": message["role"], "content": message["content"]}
    if message.get("reasoning"):
        sent["reasoning_content"] = message["reasoning"]
    return sent
