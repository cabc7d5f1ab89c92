"""Extent of an engine: its context, and which adapters it takes together."""

from __future__ import annotations

from qwen3ft.errors import EnvironmentNotReadyError, NoPlaceError
from qwen3ft.model.saved_adapter import OpenedAdapter, find_base
from qwen3ft.records.model import ModelShape
from qwen3ft.records.serving import Prompting, ServeRequest
from qwen3ft.units import size_text

ADAPTER_PLACES = 4
"""Adapters loaded at a time: one in use, one on trial, and two whose last answers are written."""

MOST_PROMPT_TOKENS = 8192
"""Longest prompt, unless the model takes less or the context is set."""


def choose_context(request: ServeRequest, prompting: Prompting, shape: ModelShape) -> int:
    """Return the most tokens of a prompt and its answer."""
    longest = prompting.answer_tokens + prompting.thinking_tokens
    return min(
        request.context_tokens or longest + MOST_PROMPT_TOKENS, shape.max_position_embeddings
    )


def require_place(opened: OpenedAdapter, base: str, rank: int, *, loaded: int, places: int) -> None:
    """Let an adapter join those that are loaded.

    Args:
        opened: The adapter.
        base: Folder of the engine's base model.
        rank: Largest rank that it has room for.
        loaded: Adapters that are loaded.
        places: Most adapters loaded at a time.

    Raises:
        NoPlaceError: it does not go with them.
    """
    problem = ""
    if find_base(opened) != base:
        problem = "it stands on another base model"
    elif opened.spec.r > rank:
        problem = f"its rank is {opened.spec.r}, and there is room for {rank}"
    elif loaded >= places:
        problem = f"{places} adapters still answer"
    if problem:
        raise NoPlaceError(
            f"The adapter in {opened.folder} is not loaded beside the others: {problem}.",
            why="Adapters that answer together share one base model and one reserved size.",
            next_command="qwen3ft serve",
        )


def cache_bytes(shape: ModelShape, tokens: int, number_bytes: int) -> int:
    """Return the bytes of the keys and values of so many tokens."""
    return 2 * shape.num_hidden_layers * shape.key_features * number_bytes * tokens


def require_cache_room(program: str, room_bytes: int, answer_bytes: int) -> None:
    """Let another program answer only if one answer of the longest kind fits.

    Raises:
        EnvironmentNotReadyError: it does not.
    """
    if room_bytes < answer_bytes:
        raise EnvironmentNotReadyError(
            f"{program} does not fit the budget: one answer needs {size_text(answer_bytes)}, and "
            f"max_memory_gb leaves {size_text(max(0, room_bytes))} beside the model.",
            why="It holds the base model in 16 bits or more, the product's own decoder in 4.",
            next_command="qwen3ft serve --engine own",
        )
