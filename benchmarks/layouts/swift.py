"""Layouts that ms-swift documents."""

from __future__ import annotations

import json

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    NO_EXAMPLE,
    bad,
    compact,
    plain_messages,
    read_alpaca,
    read_flags,
    read_history,
    two_parts,
    write_alpaca,
    write_flags,
)
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    filled,
    history_of,
    pair,
    question_of,
    refused,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said


def write_swift_tools(talk: Talk, n: int) -> JsonDict:
    """Write roles tool_call and tool_response, one message for each call."""
    items = []
    for message in talk.messages:
        if message["content"] or "calls" not in message:
            role = "tool_response" if message["role"] == "tool" else message["role"]
            items.append({"role": role, "content": message["content"]})
        items += [{"role": "tool_call", "content": compact(c)} for c in message.get("calls", ())]
    return {"tools": compact(talk.tools), "messages": items}


def read_swift_tools(row: JsonDict) -> Talk:
    """ms-swift: neighbouring calls are made at once, with the text before them."""
    messages: list[JsonDict] = []
    for item in row["messages"]:
        if item["role"] == "tool_call":
            if messages[-1]["role"] != "assistant":
                messages.append(said("assistant", ""))
            messages[-1].setdefault("calls", []).append(json.loads(item["content"]))
        else:
            role = "tool" if item["role"] == "tool_response" else item["role"]
            messages.append(said(role, tidy(item["content"])))
    return Talk(messages, json.loads(row["tools"]))


LAYOUTS = [
    Layout("ms-swift: messages", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk),
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("ms-swift: messages with loss", t.ruled_flagged, lambda talk, n: write_flags(
        talk, "loss", True, False, ("assistant",)), lambda row: read_flags(row, "loss")),
    Layout("ms-swift: query and response", t.ruled_chat, lambda talk, n: {
        "system": rule_of(talk), "query": question_of(talk), "response": answer_of(talk),
        "history": history_of(talk),
    }, read_history),
    Layout("ms-swift: conversation", t.ruled_chat, lambda talk, n: {
        "system": rule_of(talk),
        "conversation": [
            {"human": q, "assistant": a}
            for q, a in [*history_of(talk), [question_of(talk), answer_of(talk)]]
        ],
    }, lambda row: Talk([
        *([said("system", tidy(row["system"]))] if row["system"] else []),
        *(m for x in row["conversation"] for m in pair(x["human"], x["assistant"]).messages),
    ])),
    Layout("ms-swift: alpaca", two_parts, lambda talk, n: filled(write_alpaca(talk, n)),
           read_alpaca),
    Layout("ms-swift: tools", t.called_with_text, write_swift_tools, read_swift_tools),
    Layout("ms-swift: several tools at once", t.called_often, write_swift_tools, read_swift_tools),
    Layout("ms-swift: DPO", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk), "rejected_response": bad(n),
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("ms-swift: DPO with messages", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk),
        "rejected_messages": [*plain_messages(talk)[:-1], {"role": "assistant", "content": bad(n)}],
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("ms-swift: KTO", t.ruled_chat, lambda talk, n: {
        "messages": [*plain_messages(talk)[:-1],
                     {"role": "assistant", "content": bad(n) if n % 3 else answer_of(talk)}],
        "label": n % 3 == 0,
    }, lambda row: Talk(turns(row["messages"], CHATML)) if row["label"] else NO_EXAMPLE),
    refused("ms-swift: GRPO prompts", "ends_without_answer", t.chat, lambda talk, n: {
        "messages": plain_messages(talk)[:-1], "solution": f"#### {n}",
    }),
    refused("ms-swift: classification", "ends_without_answer", t.plain, lambda talk, n: {
        "messages": plain_messages(talk)[:1], "label": n % 2,
    }),
    refused("ms-swift: pre-training", "bad_turn_order", t.plain, lambda talk, n: {
        "messages": plain_messages(talk)[1:],
    }),
    refused("ms-swift: grounding", "has_media", t.plain, lambda talk, n: {
        "messages": plain_messages(talk), "images": ["a.jpg"],
        "objects": {"ref": ["a dog"], "bbox": [[331.5, 761.4, 853.5, n]]},
    }),
]  # fmt: skip
