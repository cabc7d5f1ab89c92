"""Programs behind a socket: what they send arrives, and one question's trouble is not all's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.chat.rendering import encode_texts
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.decoding.writing import AnswerLimits
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import WorkerCrashedError
from qwen3ft.serving.engines.events import NotTakenError, events, open_engine
from qwen3ft.serving.engines.llama_cpp import LlamaServers, _Loaded

LIMITS = AnswerLimits(answer_tokens=50, thinking_tokens=0, opened=False)


@asynccontextmanager
async def program(
    socket: Path, sent: Sequence[dict[str, Any]], status: str = "200 OK"
) -> AsyncGenerator[None]:
    """Answer each request on `socket` with these events, as vLLM and llama.cpp write them."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
        for event in sent:
            writer.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    async with await asyncio.start_unix_server(answer, socket):
        yield


def test_a_separator_of_lines_within_a_text_does_not_end_an_event(tmp_path: Path) -> None:
    """Programs write such characters into JSON as they are."""
    sent = [{"content": "one\u2028two\u0085three"}, {"content": "\u2029"}]

    async def received() -> list[dict[str, Any]]:
        async with program(tmp_path / "s", sent), open_engine(tmp_path / "s") as client:
            return [event async for event in events(client, "/completion", {})]

    assert asyncio.run(received()) == sent


def test_tokens_that_llama_cpp_holds_back_are_not_lost(tmp_path: Path) -> None:
    """What completes a character comes with one token, and the text of all."""
    tokenizer = load_tokenizer(str(MODEL_DIR))
    [[kite, *rest], [word]] = encode_texts(tokenizer, ["🪁", "and"])
    assert rest, "the character has several tokens"
    count = 1 + len(rest)

    def event(written: int, *tokens: int, **others: Any) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "tokens_predicted": written,
            "content": "",
            "stop": False,
        } | others

    sent = [
        event(1, word, content="and"),
        event(1 + count, rest[-1], content="🪁"),
        event(2 + count, tokenizer.eos_token_id),
        event(2 + count, stop=True, stop_type="eos"),
    ]

    async def written() -> list[int]:
        servers = object.__new__(LlamaServers)
        servers._tokenizer, servers._end = tokenizer, tokenizer.eos_token_id
        async with program(tmp_path / "s", sent), open_engine(tmp_path / "s") as client:
            servers._loaded = {"one": _Loaded(ExitStack(), client, tmp_path)}
            bursts = servers.continue_text("one", [word], LIMITS, 50)
            return [token async for burst in bursts for token in burst]

    end = tokenizer.eos_token_id
    assert asyncio.run(written()) == [word, kite, *rest, end, end]


@pytest.mark.parametrize(
    ("status", "raised"),
    [("400 Bad Request", NotTakenError), ("500 Internal Server Error", WorkerCrashedError)],
)
def test_a_request_that_is_refused_is_no_crash(
    tmp_path: Path, status: str, raised: type[Exception]
) -> None:
    """A program that fails by its own word is one that does not answer."""

    async def ask() -> None:
        sent = [{"error": {"message": "no such token"}}]
        async with program(tmp_path / "s", sent, status), open_engine(tmp_path / "s") as client:
            async for _ in events(client, "/completion", {}):
                pass

    with pytest.raises(raised, match="no such token"):
        asyncio.run(ask())
