"""Forms that several publishers share, each with its writer and its plain parser."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.layouts import talks as t
from benchmarks.layouts.layout import (
    answer_of,
    assistant,
    block,
    history_of,
    pair,
    question_of,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said

NO_EXAMPLE = "marked_as_no_example"


SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant"}


CHATML = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def compact(value: Any) -> str:
    """Return JSON text as most sets have it."""
    return json.dumps(value, ensure_ascii=False)


def plain_messages(talk: Talk) -> list[JsonDict]:
    """Return role and content alone, reasoning as a think block."""
    return [{"role": m["role"], "content": block(m)} for m in talk.messages]


def sharegpt_turns(talk: Talk) -> list[JsonDict]:
    """Return ShareGPT's turns, reasoning as a think block."""
    names = {role: name for name, role in SHAREGPT.items()}
    return [{"from": names[m["role"]], "value": block(m)} for m in talk.messages]


def bad(n: int) -> str:
    """Return a worse answer."""
    return f"I would rather not say, {n}."


def instruction(n: int) -> Talk:
    """A question of two parts in odd rows."""
    talk = t.reasoned(n)
    talk.messages[0]["content"] += f"\n{t.followed(n)}" if n % 2 else ""
    return talk


def two_parts(n: int) -> Talk:
    """A question of two parts in odd rows, with earlier turns and a prompt of the system."""
    talk = t.ruled_chat(n)
    talk.messages[-2]["content"] = t.asked(n) + (f"\n{t.followed(n)}" if n % 2 else "")
    return talk


def write_alpaca(talk: Talk, n: int) -> JsonDict:
    """Write instruction and input, output, system and history."""
    asked = t.asked(n)
    return {
        "instruction": asked,
        "input": question_of(talk)[len(asked) + 1 :],
        "output": block(talk.messages[-1]) + "\n",
        "system": rule_of(talk),
        "history": history_of(talk),
    }


def read_alpaca(row: JsonDict) -> Talk:
    """LLaMA-Factory: instruction, line break, input; answers of the history are learned."""
    parts = [tidy(part) for part in (row["instruction"], row.get("input") or "") if part]
    before = [said("system", tidy(row["system"]))] if row.get("system") else []
    for asked, answered in row.get("history") or []:
        before += [said("user", tidy(asked)), assistant(answered)]
    return Talk([*before, said("user", "\n".join(parts)), assistant(row["output"])])


def write_function_turns(talk: Talk, n: int) -> JsonDict:
    """Write calls and results as turns of their own, and tools as JSON text without wrapper."""
    items = []
    for message in talk.messages:
        if calls := message.get("calls"):
            value = compact(calls[0] if len(calls) == 1 else calls)
            items.append({"from": "function_call", "value": value})
        elif message["role"] != "system":
            name = {"user": "human", "assistant": "gpt", "tool": "observation"}[message["role"]]
            items.append({"from": name, "value": message["content"]})
    tools = compact([tool["function"] for tool in talk.tools])
    return {"conversations": items, "system": rule_of(talk), "tools": tools}


def read_function_turns(row: JsonDict) -> Talk:
    """LLaMA-Factory: human, function_call, observation, gpt; tools are a text."""
    messages = [said("system", tidy(row["system"]))] if row.get("system") else []
    for item in row["conversations"]:
        role = {"human": "user", "gpt": "assistant", "observation": "tool"}.get(item["from"])
        if role is None:
            calls = json.loads(item["value"])
            calls = calls if isinstance(calls, list) else [calls]
            messages.append(said("assistant", "", calls=calls))
        else:
            messages.append(said(role, tidy(item["value"])))
    tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
    return Talk(messages, tools)


def read_history(row: JsonDict) -> Talk:
    """Earlier pairs, then query and response."""
    before = [said("system", tidy(row["system"]))] if row.get("system") else []
    for asked, answered in row["history"]:
        before += [said("user", tidy(asked)), assistant(answered)]
    return Talk([*before, *pair(row["query"], row["response"]).messages])


def write_flags(talk: Talk, flag: str, on: Any, off: Any, roles: tuple[str, ...]) -> JsonDict:
    """Write messages with a flag on those of `roles`."""
    items = []
    for message in talk.messages:
        learned = message["role"] == "assistant" and message.get("trained", True)
        mark = {flag: on if learned else off} if message["role"] in roles else {}
        items.append({"role": message["role"], "content": message["content"], **mark})
    return {"messages": items}


def read_flags(row: JsonDict, flag: str) -> Talk:
    """Answers carry loss unless their flag says no."""
    messages = turns(row["messages"], CHATML)
    for message, item in zip(messages, row["messages"], strict=True):
        if item["role"] == "assistant" and item.get(flag) is not None and not item[flag]:
            message["trained"] = False
    return Talk(messages)


def write_openai_tools(talk: Talk, *, as_text: bool, ids: bool) -> list[JsonDict]:
    """Write calls as OpenAI does, arguments as text or as an object."""
    items = []
    for message in talk.messages:
        item: JsonDict = {"role": message["role"], "content": message["content"]}
        if message.get("reasoning"):
            item["reasoning_content"] = message["reasoning"]
        if calls := message.get("calls"):
            item["content"] = message["content"] or None
            item["tool_calls"] = [
                {
                    **({"id": f"call_{place}"} if ids else {}),
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": compact(call["arguments"]) if as_text else call["arguments"],
                    },
                }
                for place, call in enumerate(calls)
            ]
        if ids and message["role"] == "tool":
            item["tool_call_id"] = f"call_{sum(x['role'] == 'tool' for x in items)}"
        items.append(item)
    return items


def read_openai_tools(items: list[JsonDict], tools: list[JsonDict]) -> Talk:
    """OpenAI: arguments are a text or an object, content may be null beside calls."""
    messages = []
    for item in items:
        calls = []
        for call in item.get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments) if arguments else {}
            calls.append({"name": call["function"]["name"], "arguments": arguments})
        reasoning = item.get("reasoning_content") or item.get("thinking") or ""
        role = "system" if item["role"] == "developer" else item["role"]
        content = tidy(item["content"] or "")
        messages.append(said(role, content, reasoning=reasoning, calls=calls))
    return Talk(messages, tools)


def qa(question: str, answer: str, *, system: str = "", reasoning: str = "", **beside: Any) -> Any:
    """Return writer and parser of a row with one column for each text."""

    def write(talk: Talk, n: int) -> JsonDict:
        row: JsonDict = {key: value(n) for key, value in beside.items()}
        row[question] = question_of(talk)
        row[answer] = answer_of(talk) if reasoning else block(talk.messages[-1])
        if system:
            row[system] = rule_of(talk)
        if reasoning:
            row[reasoning] = talk.messages[-1].get("reasoning", "")
        return row

    def read(row: JsonDict) -> Talk:
        more = {"reasoning": row[reasoning]} if reasoning else {}
        return pair(row[question], row[answer], row[system] if system else "", **more)

    return write, read


def conversations(column: str = "conversations", roles: JsonDict = SHAREGPT, **beside: Any) -> Any:
    """Return writer and parser of turns with from and value."""
    names = {role: name for name, role in roles.items()}

    def write(talk: Talk, n: int) -> JsonDict:
        items = [{"from": names[m["role"]], "value": block(m)} for m in talk.messages]
        return {column: items, **{key: value(n) for key, value in beside.items()}}

    return write, lambda row: Talk(turns(row[column], roles, ("from", "value")))


def messages(**beside: Any) -> Any:
    """Return writer and parser of messages with role and content."""
    return (
        lambda talk, n: {
            **{key: value(n) for key, value in beside.items()},
            "messages": plain_messages(talk),
        },
        lambda row: Talk(turns(row["messages"], CHATML)),
    )


def pairs(column: str, asked: str, answered: str, **beside: Any) -> Any:
    """Return writer and parser of pairs of question and answer."""

    def write(talk: Talk, n: int) -> JsonDict:
        said_so_far = [*history_of(talk), [question_of(talk), answer_of(talk)]]
        items = [{asked: q, answered: a} for q, a in said_so_far]
        return {column: items, **{key: value(n) for key, value in beside.items()}}

    return write, lambda row: Talk(
        [m for item in row[column] for m in pair(item[asked], item[answered]).messages]
    )


def bare(talk: Talk) -> list[JsonDict]:
    """Return the functions without OpenAI's wrapper."""
    return [tool["function"] for tool in talk.tools]


def wrapped(functions: list[JsonDict]) -> list[JsonDict]:
    """Return functions with OpenAI's wrapper."""
    return [{"type": "function", "function": function} for function in functions]
