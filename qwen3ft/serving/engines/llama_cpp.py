"""llama.cpp's server: one for each adapter, all on one GGUF file of the base model.

A server takes adapters only when it starts; so each adapter has a server of its own, in this
process, and no prompt that one has read serves another. The weights are mapped from the file: the
system holds them once for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from qwen3ft.chat.rendering import encode_texts
from qwen3ft.disk.files import require_disk
from qwen3ft.errors import FinetuneError
from qwen3ft.model.saved_adapter import shape_of
from qwen3ft.records.serving import ServeRequest
from qwen3ft.serving.engines.base_weights import write_base_weights
from qwen3ft.serving.engines.events import events, open_engine
from qwen3ft.serving.engines.places import cache_bytes, require_cache_room
from qwen3ft.serving.gguf_files import require_gguf_packages, write_lora, write_model
from qwen3ft.serving.llama_server import open_llama_server
from qwen3ft.serving.merge import BYTES_PER_WEIGHT
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3ft.decoding.writing import AnswerLimits

MOST_SERVERS = 2
"""Adapters loaded at a time, each with memory of its own for all slots."""

PROGRAM_BYTES = 2 * GIB
"""Memory of the process beside weights and caches."""

CACHE_NUMBER_BYTES = 2

ANY_RANK = 2**16


@dataclass
class _Loaded:
    """The server of one adapter, and the file that it reads the adapter from."""

    stack: ExitStack
    client: httpx.AsyncClient
    lora: Path


class LlamaServers:
    """All servers of the session.

    Args:
        request: Memory and extent.
        base: Folder of the 4-bit base model.
        tokenizer: Its tokenizer.
        ends: End tokens.
        context_tokens: Most tokens of a prompt and its answer.
        scratch: Private folder for the GGUF files.
    """

    places, rank = MOST_SERVERS, ANY_RANK

    def __init__(
        self,
        request: ServeRequest,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        context_tokens: int,
        scratch: Path,
    ) -> None:
        self._snapshot, self._tokenizer, self._end = base, tokenizer, ends[0]
        self._context_tokens, self._scratch = context_tokens, scratch
        self._base, self._gguf = scratch / "base", scratch / "base.gguf"
        self._sockets = Path(request.socket).parent  # a short path, in a private folder
        self._numbers = count()
        shape = shape_of(base)
        self._weights_bytes = weights_bytes = BYTES_PER_WEIGHT * shape.total_parameters
        room_bytes = int(request.config.max_memory_gb * GIB) - weights_bytes - PROGRAM_BYTES
        slot_bytes = MOST_SERVERS * cache_bytes(shape, context_tokens, CACHE_NUMBER_BYTES)
        require_cache_room("llama.cpp", room_bytes, slot_bytes)
        self.slots = min(request.slots, room_bytes // slot_bytes)
        self._loaded: dict[str, _Loaded] = {}

    async def start(self) -> None:
        """Write the base model as GGUF."""
        require_gguf_packages()
        # safetensors and GGUF lie together until the latter is whole
        require_disk(
            self._gguf, 2 * self._weights_bytes, "The base model twice", "The disk is full."
        )
        await asyncio.to_thread(write_base_weights, self._snapshot, self._base, "cpu")
        await asyncio.to_thread(write_model, self._base, self._gguf, "f16")
        for path in self._base.glob("*.safetensors"):
            path.unlink()  # they are in the GGUF file

    async def watch(self) -> FinetuneError:
        """Wait for ever: a crash of a server is one of this process."""
        never: asyncio.Future[FinetuneError] = asyncio.get_running_loop().create_future()
        return await never

    async def load(self, name: str, folder: Path) -> None:
        """Start a server with the adapter."""
        number = next(self._numbers)
        lora, socket = self._scratch / f"{number}.gguf", self._sockets / f"{number}.sock"
        await asyncio.to_thread(write_lora, self._base, folder, lora)
        stack = ExitStack()
        opening = open_llama_server(
            self._gguf,
            context_tokens=self._context_tokens,
            answer_tokens=self._context_tokens,
            lora=lora,
            slots=self.slots,
            socket=socket,
        )
        await asyncio.to_thread(stack.enter_context, opening)
        self._loaded[name] = _Loaded(stack, open_engine(socket), lora)

    async def unload(self, name: str) -> None:
        """End the adapter's server."""
        loaded = self._loaded.pop(name)
        await loaded.client.aclose()
        await asyncio.to_thread(loaded.stack.close)
        # In fp32: a server that follows for months would fill the disk.
        loaded.lora.unlink(missing_ok=True)

    async def continue_text(
        self, name: str, ids: Sequence[int], limits: AnswerLimits, most_tokens: int
    ) -> AsyncGenerator[list[int]]:
        """Yield new tokens as they are written, the end token included."""
        body = {
            "prompt": list(ids),
            "n_predict": most_tokens,
            "samplers": ["temperature", "top_p"],  # its default has others, and another order
            "temperature": 0.0 if limits.seed is None else limits.temperature,
            "top_p": limits.top_p,
            "seed": (limits.seed or 0) % (2**32 - 1),  # the last number stands for a random one
            "stream": True,
            "return_tokens": True,
        }
        async with aclosing(events(self._loaded[name].client, "/completion", body)) as received:
            written = 0
            async for event in received:
                # While a character is incomplete nothing is sent. What completes it has the text of
                # all tokens since, and the last of them as a token.
                new = event["tokens_predicted"] - written
                written += new
                is_whole = len(event["tokens"]) == new or not event["content"]
                yield event["tokens"] if is_whole else self._encode(event["content"])
                if event["stop"] and event["stop_type"] == "eos":
                    yield [self._end]  # sent before, unless it came within a character

    def _encode(self, text: str) -> list[int]:
        [ids] = encode_texts(self._tokenizer, [text])
        return ids

    async def close(self) -> None:
        """End all servers."""
        for name in tuple(self._loaded):
            await self.unload(name)
