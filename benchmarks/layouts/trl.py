"""Layouts that TRL documents."""

from __future__ import annotations

import json

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    NO_EXAMPLE,
    bad,
    compact,
    plain_messages,
    read_openai_tools,
    write_openai_tools,
)
from benchmarks.layouts.layout import Layout, answer_of, pair, question_of, refused, turns
from benchmarks.layouts.talks import Talk

LAYOUTS = [
    Layout("TRL: prompt and completion", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "completion": answer_of(talk),
    }, lambda row: pair(row["prompt"], row["completion"])),
    Layout("TRL: prompt and completion, conversational", t.ruled_chat, lambda talk, n: {
        "prompt": plain_messages(talk)[:-1], "completion": plain_messages(talk)[-1:],
    }, lambda row: Talk(turns([*row["prompt"], *row["completion"]], CHATML))),
    Layout("TRL: messages", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk),
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("TRL: messages with tools", t.called_often, lambda talk, n: {
        "messages": [
            {**x, **({"name": "get_weather"} if x["role"] == "tool" else {})}
            for x in write_openai_tools(talk, as_text=False, ids=False)
        ],
        "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"])),
    Layout("TRL: messages with tools as texts", t.called_often, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=False, ids=False),
        "tools": [compact(tool) for tool in talk.tools],
    }, lambda row: read_openai_tools(row["messages"], [json.loads(x) for x in row["tools"]]),
       ".parquet"),
    Layout("TRL: prompt and completion with tools", t.called_with_thought, lambda talk, n: {
        "prompt": write_openai_tools(talk, as_text=False, ids=False)[:-3],
        "completion": write_openai_tools(talk, as_text=False, ids=False)[-3:],
        "tools": talk.tools,
    }, lambda row: read_openai_tools([*row["prompt"], *row["completion"]], row["tools"])),
    Layout("TRL: messages with thinking", t.ruled_reasoned, lambda talk, n: {
        "messages": [
            {"role": "developer" if m["role"] == "system" else m["role"], "content": m["content"],
             **({"thinking": m["reasoning"]} if "reasoning" in m else {})}
            for m in talk.messages
        ],
        "chat_template_kwargs": {"reasoning_effort": "low"},
    }, lambda row: read_openai_tools(row["messages"], [])),
    Layout("TRL: preference", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "chosen": answer_of(talk), "rejected": bad(n),
    }, lambda row: pair(row["prompt"], row["chosen"])),
    Layout("TRL: preference, conversational", t.ruled_chat, lambda talk, n: {
        "prompt": plain_messages(talk)[:-1],
        "chosen": plain_messages(talk)[-1:],
        "rejected": [{"role": "assistant", "content": bad(n)}],
    }, lambda row: Talk(turns([*row["prompt"], *row["chosen"]], CHATML))),
    Layout("TRL: preference without prompt, conversational", t.ruled_chat, lambda talk, n: {
        "chosen": plain_messages(talk),
        "rejected": [*plain_messages(talk)[:-1], {"role": "assistant", "content": bad(n)}],
    }, lambda row: Talk(turns(row["chosen"], CHATML))),
    Layout("TRL: unpaired preference", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "completion": bad(n) if n % 2 else answer_of(talk),
        "label": n % 2 == 0,
    }, lambda row: pair(row["prompt"], row["completion"]) if row["label"] else NO_EXAMPLE),
    Layout("TRL: unpaired preference, conversational", t.ruled_chat, lambda talk, n: {
        "prompt": plain_messages(talk)[:-1], "completion": plain_messages(talk)[-1:],
        "label": n % 2 == 0,
    }, lambda row: Talk(turns([*row["prompt"], *row["completion"]], CHATML))
       if row["label"] else NO_EXAMPLE),
    refused("TRL: preference without prompt", "missing_question", t.plain, lambda talk, n: {
        "chosen": "\n".join(talk.texts()), "rejected": f"{question_of(talk)}\n{bad(n)}",
    }),
    refused("TRL: prompts alone", "missing_answer", t.plain, lambda talk, n: {
        "prompt": plain_messages(talk)[:1],
    }),
    refused("TRL: stepwise supervision", "missing_answer", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "completions": [answer_of(talk), bad(n)],
        "labels": [True, False],
    }),
]  # fmt: skip
