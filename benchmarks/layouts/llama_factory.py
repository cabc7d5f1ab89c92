"""Layouts that LLaMA-Factory documents, and those of its newer interface."""

from __future__ import annotations

import json

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    NO_EXAMPLE,
    SHAREGPT,
    bad,
    compact,
    instruction,
    plain_messages,
    read_alpaca,
    read_function_turns,
    sharegpt_turns,
    two_parts,
    write_alpaca,
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
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said


def write_v1(talk: Talk, n: int) -> JsonDict:
    """Write parts with types and values, a loss weight for each message, tools as text."""
    items = []
    for message in talk.messages:
        parts = []
        if message.get("reasoning"):
            parts.append({"type": "reasoning", "value": message["reasoning"]})
        if message["content"] or "calls" not in message:
            parts.append({"type": "text", "value": message["content"]})
        parts += [{"type": "tool_call", "value": compact(c)} for c in message.get("calls", ())]
        learned = message["role"] == "assistant" and message.get("trained", True)
        items.append(
            {"role": message["role"], "content": parts, "loss_weight": 1.0 if learned else 0.0}
        )
    return {"messages": items, "tools": compact(talk.tools)} if talk.tools else {"messages": items}


def read_v1(row: JsonDict) -> Talk:
    """LLaMA-Factory v1: text, reasoning and tool_call parts."""
    messages = []
    for item in row["messages"]:
        text, reasoning, calls = "", "", []
        for part in item["content"]:
            if part["type"] == "text":
                text += part["value"]
            elif part["type"] == "reasoning":
                reasoning += part["value"]
            else:
                calls.append(json.loads(part["value"]))
        more: JsonDict = {}
        if item["role"] == "assistant":
            more = {"reasoning": reasoning, "calls": calls, "trained": item["loss_weight"] > 0}
        messages.append(said(item["role"], tidy(text), **more))
    return Talk(messages, json.loads(row.get("tools", "[]")))


LAYOUTS = [
    Layout("LLaMA-Factory: alpaca", instruction, lambda talk, n: {
        **{k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")},
    }, read_alpaca, ".json"),
    Layout("LLaMA-Factory: alpaca with system and history", two_parts, write_alpaca, read_alpaca,
           ".json"),
    Layout("LLaMA-Factory: sharegpt", t.ruled_chat, lambda talk, n: {
        "conversations": [x for x in sharegpt_turns(talk) if x["from"] != "system"],
        "system": rule_of(talk),
    }, lambda row: Talk(
        turns(row["conversations"], SHAREGPT, ("from", "value"), row["system"])), ".json"),
    Layout("LLaMA-Factory: sharegpt with system turn", t.ruled_chat, lambda talk, n: {
        "conversations": sharegpt_turns(talk),
    }, lambda row: Talk(turns(row["conversations"], SHAREGPT, ("from", "value"))), ".json"),
    Layout("LLaMA-Factory: sharegpt tools", t.called_often, write_function_turns,
           read_function_turns, ".json"),
    Layout("LLaMA-Factory: openai", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk),
    }, lambda row: Talk(turns(row["messages"], CHATML)), ".json"),
    Layout("LLaMA-Factory: v1 parts", t.ruled_flagged, write_v1, read_v1),
    Layout("LLaMA-Factory: v1 parts, tools", t.called_with_thought, write_v1, read_v1),
    Layout("LLaMA-Factory: v1 preference", t.ruled_chat, lambda talk, n: {
        "chosen_messages": write_v1(talk, n)["messages"],
        "rejected_messages": [
            *write_v1(talk, n)["messages"][:-1],
            {"role": "assistant", "content": [{"type": "text", "value": bad(n)}]},
        ],
    }, lambda row: read_v1({"messages": row["chosen_messages"]})),
    Layout("LLaMA-Factory: preference", instruction, lambda talk, n: {
        "instruction": t.asked(n),
        "input": question_of(talk)[len(t.asked(n)) + 1 :],
        "chosen": block(talk.messages[-1]),
        "rejected": bad(n),
    }, lambda row: read_alpaca({**row, "output": row["chosen"]}), ".json"),
    Layout("LLaMA-Factory: preference, sharegpt", t.chat, lambda talk, n: {
        "conversations": sharegpt_turns(talk)[:-1],
        "chosen": {"from": "gpt", "value": answer_of(talk)},
        "rejected": {"from": "gpt", "value": bad(n)},
    }, lambda row: Talk(
        turns([*row["conversations"], row["chosen"]], SHAREGPT, ("from", "value"))), ".json"),
    Layout("LLaMA-Factory: KTO", instruction, lambda talk, n: {
        "instruction": t.asked(n),
        "input": question_of(talk)[len(t.asked(n)) + 1 :],
        "output": bad(n) if n % 4 == 3 else block(talk.messages[-1]),
        "kto_tag": n % 4 != 3,
    }, lambda row: read_alpaca(row) if row["kto_tag"] else NO_EXAMPLE, ".json"),
    Layout("LLaMA-Factory: KTO, openai", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk), "label": n % 4 != 3,
    }, lambda row: Talk(turns(row["messages"], CHATML)) if row["label"] else NO_EXAMPLE),
    refused("LLaMA-Factory: pre-training", "missing_question", t.plain,
            lambda talk, n: {"text": "\n".join(talk.texts())}),
    refused("LLaMA-Factory: images", "has_media", t.plain, lambda talk, n: {
        "messages": [{"role": "user", "content": f"<image>{question_of(talk)}"},
                     {"role": "assistant", "content": answer_of(talk)}],
        "images": [f"images/{n}.jpg"],
    }),
]  # fmt: skip
