"""Layouts of servers' interfaces, and of data sets of function calls."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.layouts import talks as t
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    assistant,
    block,
    filled,
    question_of,
    refused,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said
from benchmarks.layouts.trainers import (
    CHATML,
    bad,
    compact,
    plain_messages,
    read_flags,
    read_function_turns,
    read_openai_tools,
    write_flags,
    write_function_turns,
    write_openai_tools,
)


def bare(talk: Talk) -> list[JsonDict]:
    """Return the functions without OpenAI's wrapper."""
    return [tool["function"] for tool in talk.tools]


def wrapped(functions: list[JsonDict]) -> list[JsonDict]:
    """Return functions with OpenAI's wrapper."""
    return [{"type": "function", "function": function} for function in functions]


# --- OpenAI ---


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
    return [
        said(x["role"], tidy("".join(part["text"] for part in x["content"]))) for x in items
    ]


def written_in_two(n: int) -> Talk:
    """A question in two parts."""
    talk = t.plain(n)
    talk.messages[0]["content"] += f"\n\n{t.followed(n)}"
    return talk


OPENAI = [
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
    refused("OpenAI: preference", "missing_answer", t.plain, lambda talk, n: {
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


# --- Anthropic and others ---


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


OTHER_SERVERS = [
    Layout("Anthropic: messages", t.ruled_chat, lambda talk, n: filled({
        "system": rule_of(talk),
        "messages": [x for x in plain_messages(talk) if x["role"] != "system"],
    }), read_anthropic),
    Layout("Anthropic: system of blocks", t.ruled_chat, lambda talk, n: filled({
        "system": [{"type": "text", "text": rule_of(talk)}] if rule_of(talk) else [],
        "messages": [x for x in plain_messages(talk) if x["role"] != "system"],
    }), read_anthropic),
    Layout("Anthropic: tools", t.called_often, write_anthropic, read_anthropic),
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


# --- data sets of function calls ---


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


FUNCTIONS = [
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

LAYOUTS = [*OPENAI, *OTHER_SERVERS, *FUNCTIONS]
