"""Layouts of preference data: pairs of a better and a worse answer, and marked answers."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    NO_EXAMPLE,
    bad,
    plain_messages,
)
from benchmarks.layouts.layout import Layout, answer_of, pair, question_of, refused, rule_of, turns
from benchmarks.layouts.talks import Talk

LAYOUTS = [
    refused("UltraFeedback", "missing_answer", t.plain, lambda talk, n: {
        "source": "evol", "instruction": question_of(talk), "models": ["a", "b"],
        "completions": [{"response": answer_of(talk), "model": "a", "overall_score": 8}],
        "correct_answers": ["None"], "incorrect_answers": ["None"],
    }),
    Layout("UltraFeedback: binarized", t.ruled_chat, lambda talk, n: {
        "prompt": f"prompt {n}", "prompt_id": f"id{n}", "messages": plain_messages(talk),
        "chosen": plain_messages(talk),
        "rejected": [*plain_messages(talk)[:-1], {"role": "assistant", "content": bad(n)}],
        "score_chosen": 8.5, "score_rejected": 4.25,
    }, lambda row: Talk(turns(row["messages"], CHATML)), ".parquet"),
    Layout("UltraFeedback: cleaned", t.plain, lambda talk, n: {
        "source": "evol", "prompt": question_of(talk), "chosen": plain_messages(talk),
        "chosen-rating": 95000 + n, "chosen-model": f"model {n}",
        "rejected": [*plain_messages(talk)[:-1], {"role": "assistant", "content": bad(n)}],
    }, lambda row: Talk(turns(row["chosen"], CHATML)), ".parquet"),
    Layout("KTO mix", t.ruled_chat, lambda talk, n: {
        "prompt": plain_messages(talk)[:-1], "completion": plain_messages(talk)[-1:],
        "label": n % 2 == 0, "dataset": "capybara", "rating": 5.5,
    }, lambda row: Talk(turns([*row["prompt"], *row["completion"]], CHATML))
       if row["label"] else NO_EXAMPLE, ".parquet"),
    Layout("KTO as a table", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "completion": bad(n) if n % 2 else answer_of(talk),
        "label": n % 2 == 0,
    }, lambda row: pair(row["prompt"], row["completion"]) if row["label"] else NO_EXAMPLE, ".csv"),
    Layout("Orca DPO pairs", t.ruled, lambda talk, n: {
        "system": rule_of(talk), "question": question_of(talk), "chosen": answer_of(talk),
        "rejected": bad(n),
    }, lambda row: pair(row["question"], row["chosen"], row["system"])),
    refused("HH-RLHF: transcripts", "missing_question", t.plain, lambda talk, n: {
        "chosen": f"\n\nHuman: {question_of(talk)}\n\nAssistant: {answer_of(talk)}",
        "rejected": f"\n\nHuman: {question_of(talk)}\n\nAssistant: {bad(n)}",
    }),
    refused("PKU-SafeRLHF", "missing_answer", t.plain, lambda talk, n: {
        "prompt": question_of(talk), "response_0": answer_of(talk), "response_1": bad(n),
        "is_response_0_safe": True, "better_response_id": 0,
    }),
]  # fmt: skip
