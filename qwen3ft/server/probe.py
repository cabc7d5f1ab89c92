"""Proof that a version answers over HTTP as it did in its run's test.

The run kept its answers to held-out rows. They are asked again, many at once, as a client would
ask; too many other answers, and the version is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qwen3ft.chat.rendering import conversation_of
from qwen3ft.chat.templates import template_may_think
from qwen3ft.chat.thinking import split_thinking
from qwen3ft.config import TrainingConfig, checked_name
from qwen3ft.errors import DataLoadingError, ServedOtherwiseError
from qwen3ft.evaluation.answers import choose_questions
from qwen3ft.evaluation.exam import to_question
from qwen3ft.evaluation.inference import read_questions
from qwen3ft.files import read_json_lines
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.records.evaluation import SideBySide
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.serving import EngineName

LEAST_SAME_SHARE = 0.98
"""Least share of answers that are the same. Sums in another order turn a near tie now and then."""

MOST_DIFFERING_SHOWN = 5
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class KeptAnswer:
    """A held-out question and the answer in the test of the run."""

    messages: list[dict[str, Any]]
    thinking: bool
    answer: str


def read_kept_answers(config: TrainingConfig, run_id: str, limit: int) -> list[KeptAnswer]:
    """Return at most `limit` answers that the run's candidate gave, spread over the test.

    Rows with tools are left out, since the server offers none.

    Raises:
        DataLoadingError: the run's questions or answers are not on this machine.
    """
    run = RunDir(Path(config.runs_dir) / checked_name(run_id, "run", "qwen3ft history"))
    job = run.job("inference")
    try:
        request = read_record(job.request, InferenceRequest)
        rows = read_questions(Path(request.questions_path), request.config.inference_rows)
        given = [
            SideBySide.model_validate(line) for line in read_json_lines(Path(request.answers_path))
        ]
        # A test that stopped early asked as many as there are answers.
        asked = choose_questions([to_question(row) for row in rows], len(given))
        rows = [rows[index] for index in asked]
    except (FileNotFoundError, DataLoadingError):
        rows, given = [], []
    if not rows or len(rows) != len(given):
        raise DataLoadingError(
            f"Run {run_id} has no kept answers of its test on this machine.",
            why=f"{job.path} or its questions were removed, or the run was made elsewhere; so "
            "nothing shows whether its adapter is served as it was tested.",
            next_command="qwen3ft serve --probe-rows 0",
        )
    pairs = [pair for pair in zip(rows, given, strict=True) if not _has_tools(pair[0])]
    may_think = template_may_think(request.model.chat_template_sha256)
    kept = min(limit, len(pairs))
    chosen = [pairs[index * len(pairs) // kept] for index in range(kept)]
    return [
        KeptAnswer(
            messages=[_as_sent(message) for message in conversation_of(row).history.messages],
            thinking=bool(row.get("reasoning")) and may_think,
            answer=split_thinking(answers.candidate)[1],
        )
        for row, answers in chosen
    ]


async def prove(
    client: httpx.AsyncClient,
    name: str,
    kept: Sequence[KeptAnswer],
    default_thinking: bool,
    engine: EngineName,
    at_once: int,
) -> float:
    """Ask the server for all kept answers; return the share that is the same.

    Args:
        client: Client of this very server, with the right to ask versions on trial.
        name: Name of the version.
        kept: Questions and answers.
        default_thinking: The version thinks if a request says nothing about it.
        engine: The program that writes its answers.
        at_once: Most questions that are asked at a time.

    Raises:
        ServedOtherwiseError: too many answers differ, or a request failed.
    """
    places = asyncio.Semaphore(at_once)

    async def ask(one: KeptAnswer) -> str:
        body: dict[str, Any] = {"model": name, "messages": one.messages}
        if one.thinking != default_thinking:
            body["chat_template_kwargs"] = {"enable_thinking": one.thinking}
        try:
            async with places:
                response = await client.post(
                    "/v1/chat/completions", json=body, timeout=_ANSWER_SECONDS
                )
        except httpx.HTTPError as error:
            return f"({type(error).__name__})"
        if response.status_code != 200:
            return f"(status {response.status_code}: {response.text[:200]})"
        return str(response.json()["choices"][0]["message"]["content"])

    answers = await asyncio.gather(*map(ask, kept))
    other = [
        {"question": str(one.messages[-1]["content"]), "tested": one.answer, "served": answer}
        for one, answer in zip(kept, answers, strict=True)
        if one.answer != answer
    ]
    same = 1 - len(other) / max(1, len(kept))
    if kept and same < LEAST_SAME_SHARE:
        shown = "; ".join(
            f"{one['question'][-80:]!r}: {one['served'][:80]!r} instead of {one['tested'][:80]!r}"
            for one in other[:MOST_DIFFERING_SHOWN]
        )
        what = (
            f"{name} answers {len(other)} of {len(kept)} held-out questions otherwise than in its "
            f"test (limit {1 - LEAST_SAME_SHARE:.0%}): {shown}."
        )
        if engine != "own":
            raise ServedOtherwiseError(
                what,
                why=f"{engine} rounds sums otherwise than the test did, and near ties turn.",
                next_command="qwen3ft serve --engine own",
                version=name,
                differing=other,
            )
        raise ServedOtherwiseError(
            what,
            why="The engine, the chat template or the decoding is not that of the test.",
            next_command="qwen3ft history",
            version=name,
            differing=other,
        )
    return same


def _has_tools(row: dict[str, Any]) -> bool:
    messages = row.get("messages") or ()
    return bool(row.get("tools")) or any(message["role"] == "tool" for message in messages)


def _as_sent(message: Any) -> dict[str, Any]:
    sent = {"role": message["role"], "content": message["content"]}
    if message.get("reasoning"):
        sent["reasoning_content"] = message["reasoning"]
    return sent
