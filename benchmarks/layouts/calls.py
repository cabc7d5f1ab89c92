"""Layouts of published data sets of function calls."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    bare,
    compact,
    plain_messages,
    read_function_turns,
    wrapped,
    write_function_turns,
)
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    block,
    question_of,
    refused,
    rule_of,
    tidy,
)
from benchmarks.layouts.talks import JsonDict, Talk, said


def write_hermes(talk: Talk, n: int) -> JsonDict:
    """Write calls and results as text in tags, under a prompt that has the tools as well."""
    items = [{"from": "system", "value": rule_of(talk) or "You are a function calling AI."}]
    for message in talk.messages:
        value = message["content"]
        if message["role"] == "assistant":
            calls = [f"<tool_call>\n{compact(c)}\n</tool_call>" for c in message.get("calls", ())]
            value = "\n".join([*([value] if value else []), *calls])
        elif message["role"] == "tool":
            value = f"<tool_response>\n{value}\n</tool_response>"
        if message["role"] != "system":
            name = {"user": "human", "assistant": "gpt", "tool": "tool"}[message["role"]]
            items.append({"from": name, "value": value})
    return {
        "id": f"7cf5{n}", "conversations": items, "tools": compact(talk.tools),
        "category": "Information Extraction", "task": f"Weather {n}",
    }  # fmt: skip


def read_hermes(row: JsonDict) -> Talk:
    """Hermes: a call is JSON in tool_call tags, a result is in tool_response tags."""
    messages = []
    for item in row["conversations"]:
        value = item["value"]
        if item["from"] == "tool":
            inner = value.removeprefix("<tool_response>").removesuffix("</tool_response>")
            messages.append(said("tool", tidy(inner)))
        elif item["from"] == "gpt":
            text, *rest = value.split("<tool_call>")
            calls = [json.loads(part.replace("</tool_call>", "")) for part in rest]
            messages.append(said("assistant", tidy(text), calls=calls))
        else:
            role = {"system": "system", "human": "user"}[item["from"]]
            messages.append(said(role, tidy(value)))
    return Talk(messages, json.loads(row["tools"]))


def hermes(n: int) -> Talk:
    """A talk with a prompt of the system in every row."""
    talk = t.called_with_text(n)
    rest = [message for message in talk.messages if message["role"] != "system"]
    rules = t.rule(n) if n % 3 else "You are a function calling AI."
    return Talk([said("system", rules), *rest], talk.tools)


def read_xlam(row: JsonDict) -> Talk:
    """xLAM: the answers are the calls; tools and answers are texts of JSON."""
    answers, tools = (
        json.loads(row[key]) if isinstance(row[key], str) else row[key]
        for key in ("answers", "tools")
    )
    messages = [said("user", tidy(row["query"])), said("assistant", "", calls=answers)]
    return Talk(messages, wrapped(tools))


def write_xlam(talk: Talk, n: int, dump: Any = compact) -> JsonDict:
    """Write query, answers and tools."""
    return {
        "id": 41000 + n,
        "query": question_of(talk),
        "answers": dump(talk.messages[-1]["calls"]),
        "tools": dump(bare(talk)),
    }


LAYOUTS = [
    Layout("xLAM", t.ends_with_calls, write_xlam, read_xlam, ".json"),
    Layout("xLAM as values", t.ends_with_calls,
           lambda talk, n: write_xlam(talk, n, lambda value: value), read_xlam),
    Layout("xLAM as messages", t.ends_with_calls, lambda talk, n: {
        "messages": [*plain_messages(talk)[:1],
                     {"role": "assistant", "content": compact(talk.messages[-1]["calls"])}],
        "tools": bare(talk),
    }, lambda row: Talk([
        said("user", tidy(row["messages"][0]["content"])),
        said("assistant", "", calls=json.loads(row["messages"][1]["content"])),
    ], wrapped(row["tools"]))),
    Layout("Glaive, as LLaMA-Factory publishes it", t.without_rules(t.called_often),
           write_function_turns, read_function_turns, ".json"),
    refused("Glaive: transcripts", "messages_not_a_list", t.called, lambda talk, n: {
        "system": f"SYSTEM: You are a helpful assistant.\n{compact(bare(talk))}",
        "chat": f"USER: {question_of(talk)}\n\n\nASSISTANT: {answer_of(talk)} <|endoftext|>",
    }),
    Layout("Hermes: function calling", hermes, write_hermes, read_hermes, ".json"),
    Layout("APIGen-MT", t.called_often, write_function_turns, read_function_turns, ".json"),
    refused("ToolACE: calls as Python", "bad_turn_order", t.called, lambda talk, n: {
        "system": rule_of(talk),
        "conversations": [
            {"from": "user", "value": question_of(talk)},
            {"from": "assistant", "value": f"[get_weather(city='Rome', days={n})]"},
            {"from": "tool", "value": compact({"t": n})},
            {"from": "assistant", "value": block(talk.messages[-1])},
        ],
    }),
]  # fmt: skip
