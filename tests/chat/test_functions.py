"""Function calls and results in tags, as Hermes' data has them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3ft.chat.functions import CALLS_FROM_TAGS, RowNotes, tagged_calls, tagged_results
from qwen3ft.chat.messages import parse_messages

CALL = {"name": "f", "arguments": {"x": 1}}


def tagged(*values: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(value)}\n</tool_call>" for value in values)


@pytest.mark.parametrize(
    ("text", "before", "calls"),
    [
        (tagged(CALL), "", [CALL]),
        (f"Let me look.\n\n{tagged(CALL, CALL)}\n", "Let me look.", [CALL, CALL]),
        (tagged({"arguments": '{"x": 1}', "name": "f"}), "", [CALL]),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        (f"{tagged(CALL)} and more", f"{tagged(CALL)} and more", []),
        ("<tool_call>\n{broken\n</tool_call>", "<tool_call>\n{broken\n</tool_call>", []),
        ("<tool_call> is a tag.", "<tool_call> is a tag.", []),
        ("no tags", "no tags", []),
    ],
)
def test_calls_in_tags_are_calls_and_all_else_is_text(
    text: str, before: str, calls: list[Any]
) -> None:
    notes = RowNotes()
    assert tagged_calls(text, notes) == (before, calls)
    assert notes.changed == ({CALLS_FROM_TAGS} if calls else set())


def test_what_is_not_used_of_a_call_in_tags_is_named() -> None:
    notes = RowNotes()
    tagged_calls(tagged({**CALL, "id": "1"}), notes)
    assert notes.unused == {"answer.id"}


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("<tool_response>\n3\n</tool_response>", ["3"]),
        ("<tool_response>3</tool_response>\n<tool_response>\n4</tool_response>", ["3", "4"]),
        ("<tool_response>3</tool_response> and", ["<tool_response>3</tool_response> and"]),
        ("3", ["3"]),
        ("", [""]),
    ],
)
def test_results_are_not_put_into_tags_twice(text: str, results: list[str]) -> None:
    assert tagged_results(text, RowNotes()) == results


def test_calls_in_tags_stand_where_a_result_may_follow() -> None:
    """Before a question they stay a text: the row would have a call without its result."""
    turns = [("human", "q"), ("gpt", tagged(CALL)), ("tool", "3"), ("gpt", "a")]
    chat = [{"from": role, "value": text} for role, text in turns]
    assert parse_messages(chat, "c", (), RowNotes())[1].get("tool_calls") == [CALL]
    chat[2]["from"] = "human"
    asked_again = parse_messages(chat, "c", (), RowNotes())[1]
    assert (asked_again["content"], asked_again.get("tool_calls")) == (tagged(CALL), None)
