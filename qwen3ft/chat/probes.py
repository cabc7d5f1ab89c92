"""The first try of a tokenizer and its template: every kind of conversation that a run can render.

What a run cannot do without has to work: a question and its answer, with and without reasoning. Of
the rest a template may refuse any, but none may run away.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import encode_texts, generation_prompt, prompt_ids, tokenize_rows
from qwen3ft.chat.templates import RUNS_AWAY
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 4_000
"""Repetitions in a long text; a row of common data has fewer words."""

PROBE_CPU_SECONDS = 6.0
"""CPU time to load a tokenizer and try it; Qwen3's takes 2 s."""

_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'Finds "anything" <here>.',
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
# A regular expression that matches a text in many ways tries them all if what follows does not
# match; libraries skip texts without the characters that it needs, so all follow.
_REPEATED = ("a", " ", "1", "!", "\n", "é", "中", "a ", "aA1 ", "\t\r\n", "<|", "'s")


def probe_tokenizer(folder: Path) -> int:
    """Load the tokenizer in `folder` and try it; return the number of conversations rendered.

    Raises:
        TokenizerError: it cannot be loaded or used, or one of the conversations runs away.
    """
    tokenizer = load_tokenizer(folder)
    encode_texts(tokenizer, [unit * LONG + "!" + string.printable for unit in _REPEATED])
    tokenize_rows(tokenizer, _needed())
    tokenize_rows(tokenizer, _needed(), escape=True)
    rendered = 2 * len(_needed())
    for row in (*_needed(), *_others()):
        rendered += _try(tokenizer, row)
    return rendered


def _try(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> int:
    """Render a conversation whole, and as a prompt with and without thinking."""
    try:
        tokenize_rows(tokenizer, [row])
        for thinking in (True, False):
            prompt_ids(tokenizer, row, thinking)
            generation_prompt(tokenizer, row, thinking)
    except TokenizerError as error:
        if error.facts.get(RUNS_AWAY):
            raise
        return 0  # the rows that need it, if there are any, meet the same error
    return 3


def _needed() -> list[dict[str, Any]]:
    return [
        {"question": "What is it?", "answer": "A probe."},
        {"question": "What is it?", "answer": "A probe.", "reasoning": "It asks."},
    ]


def _others() -> Iterator[dict[str, Any]]:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    thought = {**assistant, "reasoning": "r"}
    system = {"role": "system", "content": "s"}
    call = {"name": "look_up", "arguments": {"name": "x", "n": [1, None, {"deep": True}]}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    result = {"role": "tool", "content": '{"found": 1}'}
    for turns in (
        [user, assistant, user, assistant],
        [user, thought, user, thought],
        [system, user, assistant],
        [system, user, thought, user, assistant],
        [user, calling, result, result, thought],
        [user, assistant] * 40,
        [system, *[user, calling, result, assistant] * 10],
    ):
        yield {"messages": turns}
        yield {"messages": turns, "tools": [_TOOL]}
    yield {"messages": [user, assistant], "tools": [_TOOL] * 20}
    for text in ("a" * LONG, "word " * LONG, "<think>\n" * 50, "{{ 7 * 7 }}{% for %}", "<&>'\"\\"):
        yield {"question": text.strip(), "answer": text.strip(), "reasoning": text.strip()}
