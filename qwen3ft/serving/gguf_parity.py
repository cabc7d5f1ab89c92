"""Ask the GGUF files of an export the held-out rows, through a real llama.cpp server.

A row is asked as a user would: its messages alone, so that the template, its default for thinking
and the decoding are those that the files carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwen3ft.chat.rendering import conversation_of, prompt_ids
from qwen3ft.chat.templates import as_template_reads
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.model.saved_adapter import TEMPLATE_FILE, read_provenance, was_trained_to_think
from qwen3ft.records.requests import ExportRequest
from qwen3ft.serving.gguf_files import BASE_GGUF, LORA_GGUF, gguf_name, write_lora, write_model
from qwen3ft.serving.llama_server import ask_all, open_llama_server

GGUF, LORA = "GGUF", "adapter as GGUF"
"""Forms in a report: the merged model (with its type), and the adapter on the base."""


def write_gguf(request: ExportRequest, scratch: Path) -> None:
    """Write the model and the adapter as GGUF beside the merged model.

    The base model, which the adapter is asked on, becomes `BASE_GGUF` in the folder `scratch`.
    """
    assert request.gguf is not None
    folder = Path(request.merged).parent
    write_model(Path(request.merged), folder / gguf_name(request.gguf), request.gguf)
    write_lora(Path(request.base), Path(request.adapter), folder / LORA_GGUF)
    write_model(Path(request.base), scratch / BASE_GGUF, "bf16")


def has_no_tools(row: dict[str, Any]) -> bool:
    """Return True for a row whose answer llama.cpp's server gives as text, not as calls."""
    return not row.get("tools")


def answers_of_gguf(
    request: ExportRequest, rows: Sequence[dict[str, Any]], scratch: Path
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield each form of `write_gguf` with its answers to the rows, one by one."""
    assert request.gguf is not None
    folder, adapter = Path(request.merged).parent, Path(request.adapter)
    context_tokens, answer_tokens = _limits(request, rows)
    serve = partial(open_llama_server, context_tokens=context_tokens, answer_tokens=answer_tokens)
    asked = [_request(row, was_trained_to_think(read_provenance(adapter))) for row in rows]
    with serve(folder / gguf_name(request.gguf)) as address:
        yield f"{GGUF} {request.gguf}", ask_all(address, asked)
    template = (adapter / TEMPLATE_FILE).read_text(encoding="utf-8")
    lora = folder / LORA_GGUF
    with serve(scratch / BASE_GGUF, lora=lora, chat_template=template) as address:
        # The base's file knows no decoding, so the request does, as SERVING.md's command.
        yield LORA, ask_all(address, [{**one, "temperature": 0} for one in asked])


def _limits(request: ExportRequest, rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the tokens of the longest prompt with its answer, and of the longest answer."""
    tokenizer, config = load_tokenizer(Path(request.adapter)), request.config
    longest = max(len(prompt_ids(tokenizer, row, bool(row.get("reasoning")))) for row in rows)
    answer = config.max_new_tokens
    if any(row.get("reasoning") for row in rows):
        answer += config.max_thinking_tokens
    return longest + answer, answer


def _request(row: dict[str, Any], thinks_by_default: bool) -> dict[str, Any]:
    """Return the request that asks for a row's last answer."""
    messages = conversation_of(row).history.messages
    request: dict[str, Any] = {"messages": [as_template_reads(message) for message in messages]}
    if (thinking := bool(row.get("reasoning"))) != thinks_by_default:
        request["chat_template_kwargs"] = {"enable_thinking": thinking}
    return request
