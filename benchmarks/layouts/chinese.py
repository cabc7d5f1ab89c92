"""Layouts of Chinese data sets, and columns with Chinese names."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    conversations,
    instruction,
    pairs,
    qa,
    read_alpaca,
    two_parts,
    write_alpaca,
)
from benchmarks.layouts.layout import Layout, answer_of, block, question_of, refused
from benchmarks.layouts.talks import Talk, said

LAYOUTS = [
    Layout("Firefly", t.plain, *qa("input", "target", kind=lambda n: "NLI"), ),
    Layout("Firefly: conversation", t.chat, *pairs(
        "conversation", "human", "assistant", conversation_id=lambda n: 50000 + n,
        category=lambda n: "Brainstorming", dataset=lambda n: "moss")),
    Layout("BELLE", instruction, lambda talk, n: {
        k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")
    }, read_alpaca),
    Layout("BELLE: multiturn", lambda n: Talk([
        said("user", f"Human:{t.asked(n)}\nAssistant:{t.answered(n)}\nHuman:why?\nAssistant:"),
        said("assistant", t.answered(n, 1))]), lambda talk, n: {
        "instruction": question_of(talk), "input": "", "output": answer_of(talk),
    }, read_alpaca),
    Layout("BELLE: conversations", t.chat, *conversations(
        roles={"human": "user", "assistant": "assistant"}, id=lambda n: f"b{n}")),
    Layout("COIG: instruction", instruction, lambda talk, n: {
        k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")
    }, read_alpaca),
    Layout("COIG-CQIA", instruction, lambda talk, n: {
        **{k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")},
        "task_type": {"major": ["问答"], "minor": ["常识"]}, "domain": ["通用"],
        "metadata": f"zhihu-{n}", "answer_from": "human", "human_verified": True,
        "copyright": "cc-by-nc",
    }, read_alpaca),
    Layout("COIG-PC", instruction, lambda talk, n: {
        **{k: v for k, v in write_alpaca(talk, n).items() if k not in ("system", "history")},
        "split": "train", "task_type": {"major": ["NLI"], "minor": []}, "domain": ["新闻"],
        "other": None, "task_name_in_eng": f"ocnli_{n}",
    }, read_alpaca),
    Layout("MOSS-002", t.chat, *pairs(
        "conversation", "human", "assistant", conversation_id=lambda n: 60000 + n,
        category=lambda n: "Writing")),
    refused("MOSS-003", "messages_not_a_list", t.plain, lambda talk, n: {
        "conversation_id": 70000 + n, "meta_instruction": "You are MOSS.", "num_turns": 1,
        "chat": {"turn_1": {"Human": f"<|Human|>: {question_of(talk)}<eoh>\n",
                            "MOSS": f"<|MOSS|>: {answer_of(talk)}<eom>\n"}},
    }),
    Layout("CMtMedQA", t.without_rules(two_parts), lambda talk, n: {
        **{k: v for k, v in write_alpaca(talk, n).items() if k != "system"},
        "instruction": t.asked(n), "cate1": "外科", "id": 80000 + n,
    }, read_alpaca),
    Layout("DISC-Law", t.plain, *qa(
        "input", "output", id=lambda n: f"legal_{n}", reference=lambda n: [f"第{n}条"])),
    Layout("Chinese columns", t.ruled_reasoned, *qa(
        "问题", "答案", system="系统", reasoning="思考")),
    Layout("Chinese alpaca", instruction, lambda talk, n: {
        "指令": t.asked(n), "输入": question_of(talk)[len(t.asked(n)) + 1 :],
        "输出": block(talk.messages[-1]),
    }, lambda row: read_alpaca(
        {"instruction": row["指令"], "input": row["输入"], "output": row["输出"]})),
]  # fmt: skip
