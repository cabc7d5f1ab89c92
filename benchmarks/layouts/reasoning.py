"""Layouts of data sets with reasoning."""

from __future__ import annotations

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import CHATML, conversations, messages, qa
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    assistant,
    block,
    pair,
    question_of,
    rule_of,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk, said


def last_reasons(n: int) -> Talk:
    """One to three questions, of which the last answer alone has reasoning."""
    talk = t.chat(n)
    talk.messages[-1]["reasoning"] = t.thought(n)
    return talk


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


LAYOUTS = [
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
