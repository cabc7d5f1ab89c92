"""Tokens and loss mask of a conversation by transformers alone: nothing of the product.

The text is the template's own. Loss falls on what the assistant writes: what follows the prompt
that the template makes of the messages before, up to and including the end token. A think block
without a thought is given, not written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

from benchmarks.layouts.talks import JsonDict, Talk

_HEADER, _END, _EMPTY = "<|im_start|>assistant\n", "<|im_end|>", "<think>\n\n</think>\n\n"
_TURN = re.compile(re.escape(_HEADER) + "(.*?" + re.escape(_END) + ")", re.DOTALL)

Tokens = list[tuple[int, bool]]
"""Ids of a row, each with whether it carries loss."""


def reference_tokens(tokenizer: Any, talk: Talk) -> Tokens:
    """Return the ids of the whole conversation without the line break behind it.

    Raises:
        ValueError: the template does not begin a turn as its own prompt does.
    """
    messages = [_as_the_template_reads(message) for message in talk.messages]
    tools = talk.tools or None
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False).rstrip("\n")
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = list(_TURN.finditer(text))
    if len(turns) != len(places):
        raise ValueError(f"{len(places)} answers are rendered as {len(turns)} turns")
    borders: list[int] = []
    for place, turn in zip(places, turns, strict=True):
        message = talk.messages[place]
        prompt: str = tokenizer.apply_chat_template(
            messages[:place],
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=bool(message.get("reasoning")),
        )
        opening = prompt[prompt.rindex(_HEADER) + len(_HEADER) :]
        written = turn[1]
        given = next((text for text in (_EMPTY, opening) if written.startswith(text)), "")
        if message.get("trained", True):
            borders += [turn.start(1) + len(given), turn.end(1)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        (token, bisect_right(borders, start) % 2 == 1)
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _as_the_template_reads(message: JsonDict) -> JsonDict:
    if message["role"] != "assistant":
        return {"role": message["role"], "content": message["content"]}
    read = {
        "role": "assistant",
        "content": message["content"],
        "reasoning_content": message.get("reasoning", ""),
    }
    if calls := message.get("calls"):
        read["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return read
