"""vLLM's server: the base model with adapters that are loaded while it runs.

It is a program of its own, `vllm`, of this environment or on PATH. It listens on a Unix socket in a
private folder, since whoever reaches it may load adapters.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from packaging.version import Version

from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError, WorkerCrashedError
from qwen3ft.jobs.guard import guarded
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.machine.installing import extra_command
from qwen3ft.model.saved_adapter import shape_of
from qwen3ft.records.model import ModelShape
from qwen3ft.records.serving import ServeRequest
from qwen3ft.serving.engines.base_weights import write_base_weights
from qwen3ft.serving.engines.events import events, open_engine, post
from qwen3ft.serving.engines.places import ADAPTER_PLACES, cache_bytes, require_cache_room
from qwen3ft.serving.instructions import VLLM_RANKS
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.decoding.writing import AnswerLimits

LEAST_VERSION = "0.32"

MOST_GPU_SHARE = 0.95
VLLM_BYTES = 3 * GIB
"""Memory of vLLM beside weights and cache."""

NUMBER_BYTES = {"cuda": 2, "cpu": 4}
"""Bytes of a number; on a CPU it computes in fp32, as the test does."""

_LOOK_SECONDS = 0.25
_MOST_LOG_BYTES = 300


def find_vllm() -> str | None:
    """Return the path of the program `vllm`: of this environment, or on PATH; None without one."""
    here = str(Path(sys.executable).parent)
    return shutil.which("vllm", path=os.pathsep.join((here, os.environ.get("PATH", ""))))


def version_of(program: str) -> str | None:
    """Return the version of the vLLM that `program` runs; None if it lies beside no packages."""
    environment = Path(program).resolve().parents[1]
    folders = [str(folder) for folder in environment.glob("lib*/python3*/*-packages")]
    found = next(iter(metadata.distributions(name="vllm", path=folders)), None)
    return found.version if found is not None else None


def is_new_enough(version: str | None) -> bool:
    """Return False for a version before `LEAST_VERSION`; one that is not known is tried."""
    return version is None or Version(version) >= Version(LEAST_VERSION)


def require_vllm() -> str:
    """Return the path of the program.

    Raises:
        EnvironmentNotReadyError: it is missing, or too old.
    """
    program = find_vllm()
    if program is None:
        raise EnvironmentNotReadyError(
            "There is no program vllm.",
            why="vLLM is an extra of qwen3ft.",
            next_command=extra_command("vllm"),
        )
    version = version_of(program)
    if not is_new_enough(version):
        raise EnvironmentNotReadyError(
            f"{program} is vLLM {version}; at least {LEAST_VERSION} is needed.",
            why="With that version its API was found to answer as the run's test.",
            next_command=extra_command("vllm"),
        )
    return program


@dataclass(frozen=True)
class VllmMemory:
    """Memory that vLLM may use, and what one answer takes of it, in bytes.

    Attributes:
        budget_bytes: The budget: `max_memory_gb`, or what vLLM can have of a smaller GPU. On a GPU
            it starts only if so much is free.
        fixed_bytes: Weights and program.
        answer_bytes: Cache of one answer of the longest kind.
    """

    budget_bytes: int
    fixed_bytes: int
    answer_bytes: int

    @classmethod
    def of(cls, request: ServeRequest, shape: ModelShape, context_tokens: int) -> VllmMemory:
        """Return the memory for a base model of this shape."""
        budget_bytes = int(request.config.max_memory_gb * GIB)
        if request.device == "cuda":
            budget_bytes = min(budget_bytes, int(MOST_GPU_SHARE * visible_gpus()[0].total_bytes))
        number_bytes = NUMBER_BYTES[request.device]
        return cls(
            budget_bytes,
            number_bytes * shape.total_parameters + VLLM_BYTES,
            cache_bytes(shape, context_tokens, number_bytes),
        )

    @property
    def room_bytes(self) -> int:
        """Memory for the cache."""
        return self.budget_bytes - self.fixed_bytes


class VllmServer:
    """One `vllm serve`, for as long as the session lasts.

    Args:
        request: Memory and device.
        base: Folder of the 4-bit base model.
        rank: Rank of the first adapter.
        ends: End tokens.
        context_tokens: Most tokens of a prompt and its answer.
        scratch: Private folder for its files.
    """

    places = ADAPTER_PLACES

    def __init__(
        self,
        request: ServeRequest,
        base: Path,
        rank: int,
        ends: Sequence[int],
        context_tokens: int,
        scratch: Path,
    ) -> None:
        self._request, self._base, self._ends = request, base, list(ends)
        self._context_tokens, self._scratch = context_tokens, scratch
        self.slots = request.slots
        self.rank = next((limit for limit in VLLM_RANKS if limit >= rank), rank)
        self._process: asyncio.subprocess.Process | None = None
        socket = Path(request.socket).with_name("vllm")  # a short path, in a private folder
        self._client, self._socket, self._log = open_engine(socket), socket, scratch / "vllm.log"

    async def start(self) -> None:
        """Write the base model's weights, start the program, and wait until it is healthy."""
        program, variables = require_vllm(), self._variables()
        await asyncio.to_thread(
            write_base_weights, self._base, self._scratch / "base", self._request.device
        )
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *guarded([program, *self._options()]),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=variables,
                start_new_session=True,  # who kills the worker's group leaves it to the guard
            )
        while not await self._is_healthy():
            if self._process.returncode is not None:
                raise await self.watch()
            await asyncio.sleep(_LOOK_SECONDS)

    async def watch(self) -> FinetuneError:
        """Return why the program ended, once it has."""
        assert self._process is not None
        status = await self._process.wait()
        last = _end_of(self._log)
        return WorkerCrashedError(
            f"vLLM ended with status {status}.",
            why=f"The end of what it said: {last!a}",
            next_command="qwen3ft serve --engine own",
        )

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter under its name."""
        await post(
            self._client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
        )

    async def unload(self, name: str) -> None:
        """Forget an adapter."""
        await post(self._client, "/v1/unload_lora_adapter", {"lora_name": name})

    async def continue_text(
        self, name: str, ids: Sequence[int], limits: AnswerLimits, most_tokens: int
    ) -> AsyncGenerator[list[int]]:
        """Yield new tokens as they are written, the end token included."""
        body = {
            "model": name,
            "prompt": list(ids),
            "max_tokens": most_tokens,
            "temperature": 0.0 if limits.seed is None else limits.temperature,
            "top_p": limits.top_p,
            "seed": limits.seed,
            "stop_token_ids": self._ends,
            "stream": True,
            "return_token_ids": True,
        }
        async with aclosing(events(self._client, "/v1/completions", body)) as received:
            async for event in received:
                for choice in event["choices"]:
                    yield choice["token_ids"] or []

    async def close(self) -> None:
        """End the program."""
        await self._client.aclose()
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()  # for the guard that is the end
        await self._process.wait()

    async def _is_healthy(self) -> bool:
        try:
            return (await self._client.get("/health")).is_success
        except httpx.HTTPError:
            return False

    def _options(self) -> list[str]:
        options = [
            *("serve", str(self._scratch / "base"), "--uds", str(self._socket)),
            *("--served-model-name", "base", "--generation-config", "vllm"),
            # its log lies in the session's folder, for as long as that lasts
            *("--disable-uvicorn-access-log", "--disable-log-stats"),
            *(
                "--enable-lora",
                "--max-lora-rank",
                str(self.rank),
                "--max-loras",
                str(ADAPTER_PLACES),
            ),
            *("--max-num-seqs", str(self.slots), "--max-model-len", str(self._context_tokens)),
        ]
        if self._request.device == "cpu":
            return [*options, "--dtype", "float32"]
        total_bytes = visible_gpus()[0].total_bytes
        share = min(MOST_GPU_SHARE, self._request.config.max_memory_gb * GIB / total_bytes)
        return [*options, "--dtype", "bfloat16", "--gpu-memory-utilization", f"{share:.3f}"]

    def _variables(self) -> dict[str, str]:
        variables = {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_API_KEY": "",  # one for another server would have this one refuse all
        }
        memory = VllmMemory.of(self._request, shape_of(self._base), self._context_tokens)
        room_bytes, answer_bytes = memory.room_bytes, memory.answer_bytes
        if self._request.device == "cuda":
            require_cache_room("vLLM", room_bytes, answer_bytes)
            return variables
        require_cache_room("vLLM", room_bytes, max(GIB, answer_bytes))  # it takes whole GiB
        cache_gb = str(min(room_bytes, self.slots * answer_bytes + GIB) // GIB)
        return {**variables, "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": cache_gb}


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_LOG_BYTES))
        return file.read().decode(errors="replace").strip()
