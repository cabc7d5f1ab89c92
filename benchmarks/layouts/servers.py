"""Layouts of other servers' interfaces: Anthropic, Bedrock, Cohere, Gemini."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import bare, conversations, plain_messages, wrapped
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    filled,
    question_of,
    refused,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said


def write_anthropic(talk: Talk, n: int) -> JsonDict:
    """Write parts: text, thinking, tool_use, and results in the user's message."""
    items: list[JsonDict] = []
    for message in talk.messages:
        if message["role"] == "system":
            continue
        if message["role"] == "tool":
            result: JsonDict = {"type": "tool_result", "tool_use_id": f"toolu_{n}"}
            content = message["content"]
            result["content"] = [{"type": "text", "text": content}] if n % 2 else content
            if items[-1]["role"] == "user":
                items[-1]["content"].append(result)
            else:
                items.append({"role": "user", "content": [result]})
            continue
        parts: list[JsonDict] = []
        if message.get("reasoning"):
            signed = {"thinking": message["reasoning"], "signature": f"EqQBCgIYAh{n}"}
            parts.append({"type": "thinking", **signed})
        if message["role"] == "user" and items and items[-1]["role"] == "user":
            parts = items.pop()["content"]
        if message["content"]:
            parts.append({"type": "text", "text": message["content"]})
        parts += [
            {"type": "tool_use", "id": f"toolu_{n}", "name": c["name"], "input": c["arguments"]}
            for c in message.get("calls", ())
        ]
        items.append({"role": message["role"], "content": parts})
    tools = [
        {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
        for f in bare(talk)
    ]
    return filled({"system": rule_of(talk), "messages": items, "tools": tools})


def read_anthropic(row: JsonDict) -> Talk:
    """Anthropic: system beside the messages; results are parts of the user's next message."""
    system = row.get("system") or ""
    if isinstance(system, list):
        system = "".join(part["text"] for part in system)
    messages = [said("system", tidy(system))] if system else []
    for item in row["messages"]:
        content = item["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text, reasoning, calls = "", "", []
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "thinking":
                reasoning += part["thinking"]
            elif part["type"] == "tool_use":
                calls.append({"name": part["name"], "arguments": part["input"]})
            else:
                result = part["content"]
                if isinstance(result, list):
                    result = "".join(inner["text"] for inner in result)
                messages.append(said("tool", tidy(result)))
        if text or reasoning or calls:
            more = {"reasoning": reasoning, "calls": calls} if reasoning or calls else {}
            messages.append(said(item["role"], tidy(text), **more))
    tools = wrapped([
        {"name": x["name"], "description": x["description"], "parameters": x["input_schema"]}
        for x in row.get("tools", ())
    ])  # fmt: skip
    return Talk(messages, tools)


LAYOUTS = [
    Layout("Anthropic: messages", t.ruled_chat, lambda talk, n: filled({
        "system": rule_of(talk),
        "messages": [x for x in plain_messages(talk) if x["role"] != "system"],
    }), read_anthropic),
    Layout("Anthropic: system of blocks", t.ruled_chat, lambda talk, n: filled({
        "system": [{"type": "text", "text": rule_of(talk)}] if rule_of(talk) else [],
        "messages": [x for x in plain_messages(talk) if x["role"] != "system"],
    }), read_anthropic),
    Layout("Anthropic: tools", t.called_often, write_anthropic, read_anthropic),
    Layout("Anthropic: text beside results", t.called_and_asked, write_anthropic, read_anthropic),
    Layout("Anthropic: thinking", t.called_with_thought, write_anthropic, read_anthropic),
    refused("Anthropic: images", "has_media", t.plain, lambda talk, n: {
        "messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "data": f"iVBORw0KGgo{n}"}},
            {"type": "text", "text": question_of(talk)},
        ]}, *plain_messages(talk)[1:]],
    }),
    refused("Anthropic: redacted thinking", "message_not_text", t.plain, lambda talk, n: {
        "messages": [*plain_messages(talk)[:1], {"role": "assistant", "content": [
            {"type": "redacted_thinking", "data": f"EmwKAhgBEgy{n}"},
            {"type": "text", "text": answer_of(talk)},
        ]}],
    }),
    Layout("Bedrock: converse", t.ruled_chat, lambda talk, n: filled({
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": rule_of(talk)}] if rule_of(talk) else [],
        "messages": [{"role": x["role"], "content": [{"text": x["content"]}]}
                     for x in plain_messages(talk) if x["role"] != "system"],
    }), lambda row: Talk([
        *(said("system", tidy(part["text"])) for part in row.get("system", ())),
        *(said(x["role"], tidy(x["content"][0]["text"])) for x in row["messages"]),
    ])),
    Layout("LangChain: human and ai", t.ruled_chat, *conversations(
        roles={"system": "system", "human": "user", "ai": "assistant"})),
    Layout("Cohere: chat", t.ruled_chat, lambda talk, n: {
        "messages": [
            {"role": {"assistant": "Chatbot"}.get(x["role"], x["role"].title()),
             "content": x["content"]}
            for x in plain_messages(talk)
        ],
    }, lambda row: Talk(turns(
        row["messages"], {"System": "system", "User": "user", "Chatbot": "assistant"}))),
    refused("Gemini: contents", "missing_question", t.plain, lambda talk, n: {
        "contents": [{"role": "user", "parts": [{"text": question_of(talk)}]},
                     {"role": "model", "parts": [{"text": answer_of(talk)}]}],
    }),
]  # fmt: skip
