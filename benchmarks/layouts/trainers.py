"""Layouts that LLaMA-Factory, ms-swift, Axolotl and TRL document."""

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
    history_of,
    pair,
    question_of,
    refused,
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


# --- LLaMA-Factory ---


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
    """LLaMA-Factory: the prompt is `instruction\\ninput`, and answers of the history are learned."""
    parts = [tidy(part) for part in (row["instruction"], row.get("input") or "") if part]
    before = [said("system", tidy(row["system"]))] if row.get("system") else []
    for asked, answered in row.get("history") or []:
        before += [said("user", tidy(asked)), assistant(answered)]
    return Talk([*before, said("user", "\n".join(parts)), assistant(row["output"])])


def instruction(n: int) -> Talk:
    """A question of two parts in odd rows."""
    talk = t.reasoned(n)
    talk.messages[0]["content"] += f"\n{t.followed(n)}" if n % 2 else ""
    return talk


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


LLAMA_FACTORY = [
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


# --- ms-swift ---


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


def read_history(row: JsonDict) -> Talk:
    """Earlier pairs, then query and response."""
    before = [said("system", tidy(row["system"]))] if row.get("system") else []
    for asked, answered in row["history"]:
        before += [said("user", tidy(asked)), assistant(answered)]
    return Talk([*before, *pair(row["query"], row["response"]).messages])


MS_SWIFT = [
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


# --- Axolotl ---


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


AXOLOTL = [
    Layout("Axolotl: alpaca", instruction, lambda talk, n: {
        key: value for key, value in filled(write_alpaca(talk, n)).items() if key != "history"
    }, read_alpaca),
    Layout("Axolotl: chat_template with train", t.ruled_flagged, lambda talk, n: write_flags(
        talk, "train", True, False, ("assistant",)), lambda row: read_flags(row, "train")),
    Layout("Axolotl: chat_template with training", t.ruled_flagged, lambda talk, n: write_flags(
        talk, "training", True, False, ("user", "assistant")),
        lambda row: read_flags(row, "training")),
    refused("Axolotl: chat_template with train_detail", "loss_of_parts", t.plain, lambda talk, n: {
        "messages": [
            {"role": "user", "content": question_of(talk), "train": False},
            {"role": "assistant", "content": answer_of(talk), "train_detail": [
                {"begin_offset": 0, "end_offset": 4, "train": False},
                {"begin_offset": 5, "end_offset": 9, "train": True}]},
        ],
    }),
    Layout("Axolotl: chat_template with tools", t.called_with_text, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=False, ids=False), "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"])),
    Layout("Axolotl: sharegpt with weight", t.flagged, lambda talk, n: {
        "conversations": [
            {"from": x["from"], "value": x["value"],
             "weight": float(x["from"] == "gpt" and m.get("trained", True))}
            for x, m in zip(sharegpt_turns(talk), talk.messages, strict=True)
        ],
    }, lambda row: Talk([
        {**m, **({} if x["from"] != "gpt" or x["weight"] else {"trained": False})}
        for x, m in zip(
            row["conversations"],
            turns(row["conversations"], SHAREGPT, ("from", "value")),
            strict=True,
        )
    ])),
    Layout("Axolotl: preference, chat_template", t.ruled_chat, lambda talk, n: {
        "messages": plain_messages(talk)[:-1],
        "chosen": {"role": "assistant", "content": answer_of(talk)},
        "rejected": {"role": "assistant", "content": bad(n)},
    }, lambda row: Talk(turns([*row["messages"], row["chosen"]], CHATML))),
    Layout("Axolotl: preference, intel", t.ruled, lambda talk, n: {
        "system": rule_of(talk), "question": question_of(talk),
        "chosen": answer_of(talk), "rejected": bad(n),
    }, lambda row: pair(row["question"], row["chosen"], row["system"])),
    Layout("Axolotl: gpteacher", instruction, lambda talk, n: {
        "instruction": t.asked(n), "input": question_of(talk)[len(t.asked(n)) + 1 :],
        "response": block(talk.messages[-1]),
    }, lambda row: read_alpaca({**row, "output": row["response"]})),
    Layout("Axolotl: oasst", t.plain, lambda talk, n: {
        "INSTRUCTION": question_of(talk), "RESPONSE": answer_of(talk),
    }, lambda row: pair(row["INSTRUCTION"], row["RESPONSE"])),
    Layout("Axolotl: load_qa", t.plain, lambda talk, n: {
        "question": question_of(talk), "answer": answer_of(talk),
    }, lambda row: pair(row["question"], row["answer"])),
    Layout("Axolotl: context_qa", lambda n: Talk([
        said("user", f"{t.thought(n)}\n\n{t.asked(n)}"), said("assistant", t.answered(n)),
    ]), lambda talk, n: {
        "article": t.thought(n), "question": t.asked(n), "answer": answer_of(talk),
    }, lambda row: pair(f"{tidy(row['article'])}\n\n{row['question']}", row["answer"])),
    Layout("Axolotl: metharme", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "generation": answer_of(talk),
    }, lambda row: pair(row["prompt"], row["generation"])),
    refused("Axolotl: completion", "missing_question", t.plain,
            lambda talk, n: {"text": f"{question_of(talk)}\n{answer_of(talk)}"}),
    refused("Axolotl: input_output", "missing_question", t.plain, lambda talk, n: {
        "segments": [{"label": False, "text": question_of(talk)},
                     {"label": True, "text": answer_of(talk)}],
    }),
    refused("Axolotl: tokenised", "missing_question", t.plain, lambda talk, n: {
        "input_ids": [271, 299, n], "attention_mask": [1, 1, 1], "labels": [-100, 299, n],
    }),
    refused("Axolotl: camel_ai", "missing_question", t.plain, lambda talk, n: {
        "message_1": question_of(talk), "message_2": answer_of(talk),
    }),
]  # fmt: skip


# --- TRL ---

TRL = [
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

LAYOUTS = [*LLAMA_FACTORY, *MS_SWIFT, *AXOLOTL, *TRL]
