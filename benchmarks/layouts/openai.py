"""Layouts that OpenAI documents for fine-tuning."""

from __future__ import annotations

import json

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    bad,
    bare,
    compact,
    plain_messages,
    read_flags,
    read_openai_tools,
    wrapped,
    write_flags,
    write_openai_tools,
)
from benchmarks.layouts.layout import Layout, assistant, question_of, refused, tidy, turns
from benchmarks.layouts.talks import JsonDict, Talk, said


def write_legacy(talk: Talk, n: int) -> JsonDict:
    """Write the older function_call and functions."""
    items = []
    for message in talk.messages:
        item: JsonDict = {"role": message["role"], "content": message["content"]}
        if calls := message.get("calls"):
            call = {"name": calls[0]["name"], "arguments": compact(calls[0]["arguments"])}
            item = {**item, "content": message["content"] or None, "function_call": call}
        if message["role"] == "tool":
            item = {"role": "function", "name": "get_weather", "content": message["content"]}
        items.append(item)
    return {"messages": items, "functions": bare(talk)}


def read_legacy(row: JsonDict) -> Talk:
    """OpenAI: one call a message, its arguments as text; results have the role function."""
    messages = []
    for item in row["messages"]:
        calls = []
        if call := item.get("function_call"):
            calls = [{"name": call["name"], "arguments": json.loads(call["arguments"])}]
        role = "tool" if item["role"] == "function" else item["role"]
        messages.append(said(role, tidy(item["content"] or ""), calls=calls))
    return Talk(messages, wrapped(row["functions"]))


def write_parts(talk: Talk, n: int) -> JsonDict:
    """Write content as parts of text, two of them in questions."""
    items = []
    for message in talk.messages:
        text = message["content"]
        half = len(text) // 2 if message["role"] == "user" else len(text)
        parts = [{"type": "text", "text": part} for part in (text[:half], text[half:]) if part]
        items.append({"role": message["role"], "content": parts})
    return {"messages": items}


def read_parts(items: list[JsonDict]) -> list[JsonDict]:
    """OpenAI: texts of the parts follow each other."""
    return [said(x["role"], tidy("".join(part["text"] for part in x["content"]))) for x in items]


def written_in_two(n: int) -> Talk:
    """A question in two parts."""
    talk = t.plain(n)
    talk.messages[0]["content"] += f"\n\n{t.followed(n)}"
    return talk


LAYOUTS = [
    Layout("OpenAI: chat", t.ruled_chat, lambda talk, n: {"messages": plain_messages(talk)},
           lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("OpenAI: weight", t.ruled_flagged,
           lambda talk, n: write_flags(talk, "weight", 1, 0, ("assistant",)),
           lambda row: read_flags(row, "weight")),
    Layout("OpenAI: names of speakers", t.ruled_chat, lambda talk, n: {
        "messages": [{**x, "name": f"speaker_{n}"} for x in plain_messages(talk)],
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("OpenAI: tools", t.called_often, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=True, ids=True),
        "parallel_tool_calls": False,
        "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"])),
    Layout("OpenAI: tools, ends with calls", t.ends_with_calls, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=True, ids=True), "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"])),
    Layout("OpenAI: tools of Responses", t.called_with_text, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=True, ids=True),
        "tools": [{"type": "function", **function} for function in bare(talk)],
    }, lambda row: read_openai_tools(row["messages"], wrapped(
        [{k: v for k, v in tool.items() if k != "type"} for tool in row["tools"]]))),
    Layout("OpenAI: function_call", t.called_with_text, write_legacy, read_legacy),
    Layout("OpenAI: content parts", t.ruled_chat, write_parts,
           lambda row: Talk(read_parts(row["messages"]))),
    Layout("OpenAI: two messages of the user in a row", written_in_two, lambda talk, n: {
        "messages": [{"role": "user", "content": t.asked(n)},
                     {"role": "user", "content": t.followed(n)}, *plain_messages(talk)[1:]],
    }, lambda row: Talk([
        said("user", "\n\n".join(tidy(x["content"]) for x in row["messages"][:-1])),
        assistant(row["messages"][-1]["content"]),
    ])),
    refused("OpenAI: preference", "question_not_text", t.plain, lambda talk, n: {
        "input": {"messages": plain_messages(talk)[:1], "tools": [], "parallel_tool_calls": True},
        "preferred_output": plain_messages(talk)[1:],
        "non_preferred_output": [{"role": "assistant", "content": bad(n)}],
    }),
    refused("OpenAI: refusals", "empty_answer", t.plain, lambda talk, n: {
        "messages": [*plain_messages(talk)[:1],
                     {"role": "assistant", "content": None, "refusal": bad(n)}],
    }),
    refused("OpenAI: images", "has_media", t.plain, lambda talk, n: {
        "messages": [{"role": "user", "content": [
            {"type": "text", "text": question_of(talk)},
            {"type": "image_url", "image_url": {"url": f"https://example.org/{n}.png"}},
        ]}, *plain_messages(talk)[1:]],
    }),
]  # fmt: skip
