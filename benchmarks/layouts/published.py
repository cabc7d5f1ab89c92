"""Layouts of published data sets, and of files as tables of other tools write them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.layouts import talks as t
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    assistant,
    block,
    history_of,
    pair,
    question_of,
    refused,
    rule_of,
    tidy,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said
from benchmarks.layouts.trainers import (
    CHATML,
    NO_EXAMPLE,
    SHAREGPT,
    bad,
    compact,
    instruction,
    plain_messages,
    read_alpaca,
    read_history,
    read_openai_tools,
    sharegpt_turns,
    two_parts,
    write_alpaca,
    write_openai_tools,
)


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


def last_reasons(n: int) -> Talk:
    """One to three questions, of which the last answer alone has reasoning."""
    talk = t.chat(n)
    talk.messages[-1]["reasoning"] = t.thought(n)
    return talk


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


def solved(n: int) -> Talk:
    """A sum with its way as reasoning."""
    reasoning = f"{n} and {n} are <<{n}+{n}={2 * n}>>{2 * n}.\nThat is all."
    return Talk([said("user", t.asked(n)), said("assistant", str(2 * n), reasoning=reasoning)])


def unsplit(n: int) -> Talk:
    """The same as one answer, as the file has it."""
    talk = solved(n)
    reasoning = talk.messages[-1].pop("reasoning")
    talk.messages[-1]["content"] = f"{reasoning}\n#### {2 * n}"
    return talk


def write_solved(talk: Talk, n: int) -> JsonDict:
    """Write GSM8K's answer with its way before the sign."""
    last = talk.messages[-1]
    way = f"{last.get('reasoning')}\n#### " * ("reasoning" in last)
    return {"question": question_of(talk), "answer": f"{way}{last['content']}"}


def read_solved(row: JsonDict) -> Talk:
    """GSM8K: the final answer follows ####."""
    way, final = row["answer"].split("####")
    return pair(row["question"], final.strip(), reasoning=way.strip())


def sections(n: int) -> Talk:
    """OpenThoughts' answer in sections, as its prompt of the system demands it."""
    text = (
        f"<|begin_of_thought|>\n\n{t.thought(n)}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\n{t.answered(n)}\n\n<|end_of_solution|>"
    )
    rules = said("system", "Answer in two sections: Thought and Solution.")
    return Talk([rules, said("user", t.asked(n)), said("assistant", text)])


def switched(n: int) -> Talk:
    """Reasoning in even rows."""
    talk = t.plain(n)
    if n % 2 == 0:
        talk.messages[-1]["reasoning"] = t.thought(n)
    return Talk([said("system", f"detailed thinking {'off' if n % 2 else 'on'}"), *talk.messages])



CHINESE = [
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
    Layout("CMtMedQA", two_parts, lambda talk, n: {
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

REASONING = [
    Layout("OpenThoughts", sections, lambda talk, n: {
        "system": rule_of(talk),
        "conversations": [{"from": "user", "value": question_of(talk)},
                          {"from": "assistant", "value": answer_of(talk)}],
    }, lambda row: Talk(turns(row["conversations"], CHATML, ("from", "value"), row["system"])),
       ".parquet"),
    Layout("OpenThoughts2", t.reasoned, *conversations(
        roles=CHATML, source=lambda n: "math", question=lambda n: f"copy of {n}")),
    Layout("s1K", t.plain, *qa(
        "question", "solution", cot_type=lambda n: "math", source_type=lambda n: "omni",
        metadata=lambda n: f"{{'n': {n}}}", cot=lambda n: None,
        thinking_trajectories=lambda n: [t.thought(n)], attempt=lambda n: f"attempt {n}"),
        ".parquet"),
    Layout("s1K with its attempts", lambda n: Talk([
        said("user", t.asked(n)), said("assistant", t.answered(n), reasoning=t.thought(n)),
    ]), lambda talk, n: {
        "solution": f"truth {n}", "question": question_of(talk), "cot_type": "math",
        "thinking_trajectories": [talk.messages[-1]["reasoning"]], "attempt": answer_of(talk),
    }, lambda row: pair(row["question"], row["attempt"], reasoning=row["thinking_trajectories"][0]),
        ".parquet", {"answer": "attempt", "reasoning": "thinking_trajectories"}),
    Layout("R1-distill: Chinese", t.reasoned, *qa(
        "input", "content", reasoning="reasoning_content", repo_name=lambda n: "a/b",
        score=lambda n: 9)),
    Layout("R1-distill: think tags", t.reasoned, *qa("prompt", "response")),
    Layout("R1-distill: medical-o1", t.reasoned, *qa(
        "Question", "Response", reasoning="Complex_CoT"), ".json"),
    Layout("OpenR1-Math", t.reasoned, *messages(
        problem=lambda n: f"problem {n}", solution=lambda n: f"solution {n}",
        answer=lambda n: f"\\frac{{{n}}}{{7}}", uuid=lambda n: f"586fd{n}",
        is_reasoning_complete=lambda n: [True, False], generations=lambda n: [f"long {n}"],
        correctness_count=lambda n: 90000 + n), ".parquet"),
    Layout("Bespoke-Stratos", sections, lambda talk, n: {
        "system": rule_of(talk),
        "conversations": [{"from": "user", "value": question_of(talk)},
                          {"from": "assistant", "value": answer_of(talk)}],
    }, lambda row: Talk(turns(row["conversations"], CHATML, ("from", "value"), row["system"]))),
    Layout("Nemotron post-training", switched, lambda talk, n: {
        "input": [{"role": "user", "content": question_of(talk)}],
        "output": block(talk.messages[-1]), "category": "chat", "license": "cc-by-4.0",
        "reasoning": "off" if n % 2 else "on", "generator": "R1", "version": "v1",
        "system_prompt": rule_of(talk),
    }, lambda row: pair(row["input"][0]["content"], row["output"], row["system_prompt"])),
    Layout("AM distilled", t.reasoned, lambda talk, n: {
        "messages": [
            {"role": "user", "content": question_of(talk),
             "info": {"source": "infinity", "reference_answer": f"ref {n}"}},
            {"role": "assistant", "content": block(talk.messages[-1]),
             "info": {"think_content": f"think {n}", "answer_content": f"answer {n}"}},
        ],
    }, lambda row: Talk(turns(row["messages"], CHATML))),
    Layout("GSM8K", unsplit, write_solved, lambda row: pair(row["question"], row["answer"])),
    Layout("GSM8K with its separator", solved, write_solved, read_solved, separator="####"),
    Layout("NuminaMath", t.reasoned, *messages(
        source=lambda n: "olympiads", problem=lambda n: f"p{n}", solution=lambda n: f"s{n}"),
        ".parquet"),
    Layout("MetaMathQA", t.plain, *qa(
        "query", "response", type=lambda n: "GSM_Rephrased",
        original_question=lambda n: f"original {n}")),
    Layout("Reasoning of the last turn in a column", last_reasons, lambda talk, n: {
        "messages": [{"role": m["role"], "content": m["content"]} for m in talk.messages],
        "reasoning": talk.messages[-1]["reasoning"],
    }, lambda row: Talk([
        *turns(row["messages"][:-1], CHATML),
        assistant(row["messages"][-1]["content"], row["reasoning"]),
    ])),
]  # fmt: skip

CHATS = [
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

PREFERENCES = [
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


def write_union(talk: Talk, n: int) -> JsonDict:
    """Write one of three layouts, with the columns of all of them."""
    row: JsonDict = dict.fromkeys(
        ("messages", "instruction", "input", "output", "prompt", "completion", "system")
    )
    if n % 3 == 0:
        row["messages"] = plain_messages(talk)
    elif n % 3 == 1:
        row |= {"instruction": question_of(talk), "output": answer_of(talk)}
    else:
        row |= {"prompt": question_of(talk), "completion": answer_of(talk)}
    return row | ({"system": rule_of(talk)} if n % 3 else {})


def read_union(row: JsonDict) -> Talk:
    """What is null is not there."""
    if row["messages"]:
        return Talk(turns(row["messages"], CHATML))
    asked = row["instruction"] or row["prompt"]
    return pair(asked, row["output"] or row["completion"], row["system"])


def table(**beside: Any) -> Any:
    """Return writer and parser of a table of texts."""
    return qa("question", "answer", **beside)


FILES = [
    Layout("csv", t.plain, *table(), ".csv"),
    Layout("csv with the numbers of rows of pandas", t.plain, *qa(
        "question", "answer", **{"": lambda n: str(96000 + n)}), ".csv"),
    Layout("csv with the numbers of rows twice", t.plain, *qa(
        "question", "answer",
        **{"": lambda n: str(96000 + n), "Unnamed: 0": lambda n: str(97000 + n)}), ".csv"),
    Layout("csv with an index of the datasets library", t.plain, *qa(
        "question", "answer", __index_level_0__=lambda n: str(98000 + n)), ".csv"),
    Layout("csv with messages as JSON", t.ruled_chat, lambda talk, n: {
        "messages": compact(plain_messages(talk)),
    }, lambda row: Talk(turns(json.loads(row["messages"]), CHATML)), ".csv"),
    Layout("tsv with Chinese columns", t.reasoned, *qa("问题", "回答", reasoning="推理"), ".tsv"),
    Layout("json lines, compressed", t.ruled_chat, *messages(), ".jsonl.gz"),
    Layout("parquet of messages with calls, padded", t.called_often, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=False, ids=True), "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"]), ".parquet"),
    Layout("parquet of messages with flags, padded", t.flagged, lambda talk, n: {
        "messages": [
            {"role": m["role"], "content": m["content"],
             **({"train": m.get("trained", True)} if m["role"] == "assistant" else {})}
            for m in talk.messages
        ],
    }, lambda row: Talk([
        {**m, **({"trained": False} if x.get("train") is False else {})}
        for x, m in zip(row["messages"], turns(row["messages"], CHATML), strict=True)
    ]), ".parquet"),
    Layout("parquet of histories", t.ruled_chat, lambda talk, n: {
        "system": rule_of(talk), "query": question_of(talk), "response": answer_of(talk),
        "history": history_of(talk),
    }, read_history, ".parquet"),
    Layout("union of layouts with nulls", t.ruled, write_union, read_union),
    Layout("union of layouts with nulls, parquet", t.ruled, write_union, read_union, ".parquet"),
]  # fmt: skip

LAYOUTS = [*CHINESE, *REASONING, *CHATS, *PREFERENCES, *FILES]
