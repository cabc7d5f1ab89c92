"""llama.cpp's own HTTP server on loopback, in this process, for as long as a `with` block lasts.

It is the server of `xllamacpp`, a library: a crash in it ends the process, so only workers use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SLOTS = 4
"""Answers in progress at once; llama.cpp computes them as one batch."""

ANSWER_SECONDS = 600.0
"""Longest silence of the server; an answer comes in one piece."""


@contextmanager
def open_llama_server(
    model: Path,
    *,
    context_tokens: int,
    answer_tokens: int,
    lora: Path | None = None,
    chat_template: str | None = None,
    slots: int = SLOTS,
    socket: Path | None = None,
) -> Iterator[str]:
    """Serve a GGUF file; yield the address, without a slash at its end.

    Args:
        model: The GGUF file.
        context_tokens: Longest prompt with its answer.
        answer_tokens: Longest answer, thinking included, where a request sets no limit.
        lora: GGUF file of an adapter, put on the model.
        chat_template: Jinja text instead of the template in the file.
        slots: Answers in progress at once.
        socket: Unix socket to listen on, named *.sock; by default a port that the system chooses.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.hostnames = ["127.0.0.1" if socket is None else str(socket)]
    params.port = 0  # the system chooses one
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens
    params.n_predict = answer_tokens
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.warmup = False
    params.cache_ram_mib = 0  # by default it keeps prompts of idle slots, in up to 8 GiB
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    if chat_template is not None:
        params.chat_template = chat_template
    server = xllamacpp.Server(params)
    try:
        yield str(server.listening_address)
    finally:
        del server  # it stops with its last reference


def ask_all(address: str, requests: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Send requests to /v1/chat/completions, several at once; yield the answers in order.

    An answer is the message's content; thinking is in a field of its own, and left out.

    Raises:
        httpx.HTTPError: the server is gone, or refuses a request.
    """
    with (
        httpx.Client(base_url=address, timeout=ANSWER_SECONDS, trust_env=False) as client,
        ThreadPoolExecutor(SLOTS) as pool,
    ):

        def ask(request: dict[str, Any]) -> str:
            answer = client.post("/v1/chat/completions", json=request).raise_for_status().json()
            return str(answer["choices"][0]["message"]["content"] or "").strip()

        yield from pool.map(ask, requests)
