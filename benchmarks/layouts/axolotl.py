"""Layouts that Axolotl documents."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    SHAREGPT,
    bad,
    instruction,
    plain_messages,
    read_alpaca,
    read_flags,
    read_openai_tools,
    sharegpt_turns,
    write_alpaca,
    write_flags,
    write_openai_tools,
)
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    block,
    filled,
    pair,
    question_of,
    refused,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import Talk, said

LAYOUTS = [
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
