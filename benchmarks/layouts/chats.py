"""Layouts of published conversations and instructions."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    SHAREGPT,
    conversations,
    instruction,
    messages,
    pairs,
    plain_messages,
    qa,
    read_alpaca,
    sharegpt_turns,
    write_alpaca,
)
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    pair,
    question_of,
    refused,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk


def contextual(n: int) -> Talk:
    """A question behind a text that it is about, in three rows of four."""
    talk = t.plain(n)
    if n % 4:
        talk.messages[0]["content"] = f"{t.thought(n)}\n\n{t.asked(n)}"
    return talk


def write_context(talk: Talk, n: int) -> JsonDict:
    """Write Dolly's columns."""
    return {
        "instruction": t.asked(n), "context": t.thought(n) if n % 4 else "",
        "response": answer_of(talk), "category": "closed_qa",
    }  # fmt: skip


def read_context(row: JsonDict, question: str, answer: str) -> Talk:
    """The context goes before the question, after a blank line."""
    context = f"{tidy(row['context'])}\n\n" if row["context"] else ""
    return pair(f"{context}{tidy(row[question])}", answer)


LAYOUTS = [
    Layout("ShareGPT", t.chat, *conversations(id=lambda n: f"QWJhYvA_{n}"), ".json"),
    Layout("ShareGPT: roles of other scrapes", t.chat, *conversations(
        roles={"user": "user", "chatgpt": "assistant"})),
    refused("ShareGPT: begins with the assistant", "bad_turn_order", t.chat, lambda talk, n: {
        "id": f"x{n}", "conversations": sharegpt_turns(talk)[1:],
    }),
    Layout("OpenHermes", t.ruled_chat, lambda talk, n: {
        "conversations": [{**x, "weight": None} for x in sharegpt_turns(talk)],
        "source": "airoboros", "category": "orca", "system_prompt": None, "idx": 90000 + n,
        "title": f"title {n}",
    }, lambda row: Talk(turns(row["conversations"], SHAREGPT, ("from", "value"))), ".json"),
    Layout("SlimOrca", t.ruled, lambda talk, n: {
        "conversations": [
            {**x, "weight": {"human": 0.0, "gpt": 1.0}.get(x["from"])}
            for x in sharegpt_turns(talk)
        ],
    }, lambda row: Talk(turns(row["conversations"], SHAREGPT, ("from", "value")))),
    Layout("OpenOrca", t.ruled, *qa(
        "question", "response", system="system_prompt", id=lambda n: f"flan.{n}"), ".parquet"),
    Layout("WizardLM", t.plain, *qa("instruction", "output"), ".json"),
    Layout("WizardLM: V2", t.chat, *conversations(idx=lambda n: f"oOAQ{n}"), ".json"),
    Layout("Dolly", contextual, write_context,
           lambda row: read_context(row, "instruction", row["response"])),
    Layout("SQuAD", contextual, lambda talk, n: {
        "id": f"5733{n}", "title": f"Title {n}", "context": t.thought(n) if n % 4 else "",
        "question": t.asked(n),
        "answers": {"text": [answer_of(talk), f"other {n}"], "answer_start": [91000 + n, 92000]},
    }, lambda row: read_context(row, "question", row["answers"]["text"][0]), ".parquet"),
    Layout("Alpaca with its prompt", instruction, lambda talk, n: {
        **{k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")},
        "text": f"Below is an instruction that describes a task, no. {n}.",
    }, read_alpaca, ".parquet"),
    Layout("Magpie", t.ruled_chat, lambda talk, n: {
        "uuid": f"a7{n}", "instruction": f"copy {n}", "response": f"copied {n}",
        "conversations": sharegpt_turns(talk), "model": "m", "gen_input_configs": {"top_p": 1.0},
    }, lambda row: Talk(turns(row["conversations"], SHAREGPT, ("from", "value")))),
    Layout("LMSYS-Chat", t.chat, lambda talk, n: {
        "conversation_id": f"c{n}", "model": "vicuna-13b", "conversation": plain_messages(talk),
        "turn": 93000 + n, "language": "English", "redacted": False,
        "openai_moderation": [{"flagged": False}],
    }, lambda row: Talk(turns(row["conversation"], CHATML)), ".parquet"),
    Layout("WildChat", t.chat, lambda talk, n: {
        "conversation_hash": f"h{n}", "model": "gpt",
        "conversation": [
            {**x, "country": "Peru", "hashed_ip": f"ip{n}", "language": "English",
             "toxic": False, "turn_identifier": 94000 + n}
            for x in plain_messages(talk)
        ],
    }, lambda row: Talk(turns(row["conversation"], CHATML)), ".parquet"),
    Layout("Capybara", t.chat, *pairs(
        "conversation", "input", "output", source=lambda n: "TaskSource")),
    Layout("No Robots", t.ruled_chat, *messages(
        prompt=lambda n: f"prompt {n}", prompt_id=lambda n: f"id{n}",
        category=lambda n: "Coding")),
    Layout("Tulu", t.ruled_chat, *messages(id=lambda n: f"tulu{n}", source=lambda n: "flan")),
    Layout("AgentInstruct", t.flagged, lambda talk, n: {
        "id": f"os_{n}",
        "conversations": [
            {**x, "loss": None if x["from"] == "human" else m.get("trained", True)}
            for x, m in zip(sharegpt_turns(talk), talk.messages, strict=True)
        ],
    }, lambda row: Talk([
        {**m, **({"trained": False} if x["loss"] is False else {})}
        for x, m in zip(
            row["conversations"],
            turns(row["conversations"], SHAREGPT, ("from", "value")),
            strict=True,
        )
    ])),
    refused("UltraChat", "missing_question", t.chat, lambda talk, n: {
        "id": str(n), "data": talk.texts(),
    }),
    refused("Open Assistant: messages of a tree", "missing_question", t.plain, lambda talk, n: {
        "message_id": f"m{n}", "parent_id": f"m{n - 1}", "text": question_of(talk),
        "role": "prompter", "lang": "en",
    }),
]  # fmt: skip
