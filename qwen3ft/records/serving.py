"""Messages between the server and the worker that answers for it, one JSON object a line.

The server sends what is in `ToWorker`, the worker what is in `ToServer`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record
from qwen3ft.records.training import Failure

MOST_LINE_BYTES = 2**24
"""Longest message."""

EngineName = Literal["own", "vllm", "llama.cpp"]
"""Programs that write answers: the product's own decoder, vLLM's server, llama.cpp's server."""


class ServeRequest(Record):
    """Load an adapter's 4-bit base and answer questions; the result is a `ServeEnded`."""

    engine: EngineName
    config: TrainingConfig
    adapter: str = Field(description="Folder of an adapter; others must fit its base and rank.")
    device: Literal["cuda", "cpu"]
    socket: str = Field(description="Unix socket that the server listens on.")
    slots: int = Field(ge=1, description="Most answers written at a time.")
    context_tokens: int | None = Field(None, ge=16)
    """Most tokens of a prompt and its answer; None to choose by model and run."""


class ServeEnded(Record):
    """Result of a worker that the server has ended."""

    answered: int


class Prompting(Record):
    """Settings of a run that decide how its adapter is asked if a request says nothing else."""

    thinking: bool = Field(description="True to let the model think first.")
    answer_tokens: int = Field(ge=1, description="Most tokens of an answer, thinking left out.")
    thinking_tokens: int = Field(ge=0, description="0 to count thinking as part of the answer.")
    escape: bool = Field(description="Encode control tokens in texts as plain text.")


class Load(Record):
    """Load an adapter under a name that no loaded one has; answered by `AdapterLoaded`."""

    kind: Literal["load"] = "load"
    name: str
    folder: str
    prompting: Prompting


class Unload(Record):
    """Forget an adapter that answers nothing any more."""

    kind: Literal["unload"] = "unload"
    name: str


class Ask(Record):
    """Ask an adapter; answered by `Piece`s and an `Ended`, or by `Refused`."""

    kind: Literal["ask"] = "ask"
    id: int
    name: str = Field(description="Name of the adapter.")
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = Field(None, description="Text to continue in place of messages.")
    thinking: bool | None = Field(None, description="None for the adapter's own way.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens, thinking included.")
    temperature: float = Field(0.0, ge=0, description="0 for greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    stop: tuple[str, ...] = Field((), description="Texts at which the answer ends.")
    ahead: bool = Field(False, description="Answer it before the questions that wait.")


class Cancel(Record):
    """Write no more of an answer."""

    kind: Literal["cancel"] = "cancel"
    id: int


class Close(Record):
    """End the worker."""

    kind: Literal["close"] = "close"


class Ready(Record):
    """The base model is loaded."""

    kind: Literal["ready"] = "ready"
    slots: int
    context_tokens: int
    places: int = Field(description="Most adapters loaded at a time.")


class AdapterLoaded(Record):
    """An adapter is loaded, or `failure` says why not."""

    kind: Literal["loaded"] = "loaded"
    name: str
    failure: Failure | None = None


class Piece(Record):
    """Text of an answer as it is written."""

    kind: Literal["piece"] = "piece"
    id: int
    part: Literal["thinking", "answer"]
    text: str


class Ended(Record):
    """End of an answer."""

    kind: Literal["ended"] = "ended"
    id: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Refused(Record):
    """A question that cannot be answered."""

    kind: Literal["refused"] = "refused"
    id: int
    code: Literal["context_length_exceeded", "invalid_prompt", "refused_by_engine"]
    message: str


ToWorker = Annotated[Load | Unload | Ask | Cancel | Close, Field(discriminator="kind")]
ToServer = Annotated[Ready | AdapterLoaded | Piece | Ended | Refused, Field(discriminator="kind")]

to_worker: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)
to_server: TypeAdapter[ToServer] = TypeAdapter(ToServer)
