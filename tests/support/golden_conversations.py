"""Conversations and chat templates that rendering is held against.

The templates of Qwen3 and Qwen3-Instruct-2507 are the published files, which the package trl
carries. That of Qwen3-Thinking-2507 is Qwen3's without the switch for thinking, and with a
generation prompt that opens the think block.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen3ft.embedded import MODEL_DIR

PROMPT_OF_QWEN3 = r"""    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
"""
PROMPT_OF_THINKING = r"""    {{- '<|im_start|>assistant\n<think>\n' }}
"""


def published(name: str) -> str:
    """Read a template that trl ships, without importing trl."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / name).read_text(encoding="utf-8")


QWEN3 = published("qwen3.jinja")
assert QWEN3.count(PROMPT_OF_QWEN3) == 1
TEMPLATES = {
    "qwen3": QWEN3,
    "instruct": published("qwen3_instruct_2507.jinja"),
    "thinking": QWEN3.replace(PROMPT_OF_QWEN3, PROMPT_OF_THINKING),
    "embedded": (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8"),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather in a city, "now" or later. <b>&</b> 天气',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"name": "clock", "parameters": {}}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def assistant(content: str, reasoning: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    return message


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def row(question: str, answer: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    """Return a `QaRow`."""
    place = {"kind": "", "group": "", "role": "train", "file": "f", "line": 1, "offset": -1}
    texts = {"question": question, "answer": answer, "reasoning": reasoning}
    return {**texts, "messages": [], "tools": [], **place, **more}


def chat(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """Return the `QaRow` of a conversation."""
    question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    answer = messages[-1]
    reasoning = answer.get("reasoning", "")
    more = {"messages": list(messages), "tools": list(tools)}
    return row(question, answer["content"], reasoning, **more)


PARIS, OSLO = call("get_weather", city="Paris"), call("get_weather", city="Oslo", days=2)
CODE = "def f(x):\n\treturn {\n\t\t'x': x,\n\t}\n\n\nprint(f(1))"

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": row("1 + 1?", "2"),
    "reasoning": row("1 + 1?", "2", "one and one"),
    "chinese": row("西安是哪个省的?", "西安是陕西省的省会。"),
    "chinese reasoning": row("西安是哪个省的?", "陕西省。", "西安……是陕西的省会。"),
    "english": row("Who wrote 'Emma'?", "Jane Austen did, in 1815."),
    "ends in a full stop": row("Why.", "So.", "Because."),
    "code": row(f"What does this print?\n\n{CODE}", f"```python\n{CODE}\n```", CODE),
    "emoji": row("🙂👩‍👩‍👧‍👦?", "🇨🇳 naïve café", "🤔…"),
    "line breaks inside": row("a\n\n\nb\r\nc", "d\n \n\te", "f\n\ng"),
    "numbers": row("3.14159 * 1,000,000?", "3141590.0", "1e6 · 3.14 = 3.14e6\n0b101"),
    "punctuation at the borders": row("...?!", "})]>", "{([<"),
    "looks like json": row('{"a": [1, 2]}', '{"b": null}', '["\\n"]'),
    "tags of other kinds": row("<b>x</b>", "</tool>", "<thinking>"),
    "think tag in the question": row("What is <think> and </think>?", "A tag."),
    "one letter": row("a", "b", "c"),
    "rare characters": row("龘𠮷\u200d", "\u00ad x", "\u2028y"),
    "long": row("word " * 300 + "end", "no " * 200 + "end", "hm. " * 200 + "end"),
    "system": chat(system("Be brief."), user("Hi"), assistant("Yo")),
    "system and reasoning": chat(system("要简短。"), user("Hi"), assistant("Yo", "A greeting.")),
    "two turns": chat(user("Hi"), assistant("Yo"), user("Bye"), assistant("Ciao")),
    "reasoning in the last turn": chat(
        user("Hi"), assistant("Yo"), user("Bye"), assistant("Ciao", "They leave.")
    ),
    "reasoning in an earlier turn": chat(
        user("Hi"), assistant("Yo", "They come."), user("Bye"), assistant("Ciao")
    ),
    "reasoning everywhere": chat(
        *(system("s"), user("Hi"), assistant("Yo", "They come."), user("And?")),
        *(assistant("Well.", "Hm."), user("Bye"), assistant("Ciao", "They leave.")),
    ),
    "the same text in every turn": chat(user("x"), assistant("x", "x"), user("x"), assistant("x")),
    "tool offered, not called": chat(user("Hi"), assistant("Yo"), tools=(WEATHER,)),
    "system and two tools": chat(
        system("Use tools."), user("Hi"), assistant("Yo", "No need."), tools=(WEATHER, CLOCK)
    ),
    "tool call and result": chat(
        user("Paris?"),
        assistant("", "", PARIS),
        tool("18 °C."),
        assistant("18 degrees."),
        tools=(WEATHER,),
    ),
    "tool call with text": chat(
        user("Paris?"), assistant("I will look.", "", PARIS), tool('{"t": 18}'), assistant("18.")
    ),
    "reasoning around tools": chat(
        user("Paris?"),
        assistant("Let me see.", "I need data.", PARIS),
        tool("18 °C\n"[:-1]),
        assistant("18 degrees.", "Now I know."),
        tools=(WEATHER,),
    ),
    "reasoning before a bare call": chat(
        user("Paris?"), assistant("", "I need data.", PARIS), tool("18"), assistant("18 °C")
    ),
    "two calls, two results": chat(
        user("Paris and Oslo?"),
        assistant("", "Both.", PARIS, OSLO),
        tool("18"),
        tool("5 <|not a marker|>"),
        assistant("18 and 5."),
        tools=(WEATHER,),
    ),
    "two rounds of tools": chat(
        *(system("s."), user("Paris?"), assistant("", "", PARIS), tool("18")),
        *(assistant("Oslo too.", "", OSLO), tool("5"), assistant("18, 5", "Done.")),
    ),
    "tools in an earlier turn": chat(
        *(user("Paris?"), assistant("", "Look.", PARIS), tool("18"), assistant("18.", "So.")),
        *(user("Thanks"), assistant("Welcome.", "Polite.")),
        tools=(WEATHER,),
    ),
    "no arguments": chat(
        user("Time?"), assistant("", "", call("clock")), tool("9"), assistant("9")
    ),
    "nested arguments": chat(
        user("Do it"),
        assistant("", "", call("f", a={"b": [1, 2.5, None, True], "ü": "\n\"'<>&"}, 城="西安")),
        tool("done."),
        assistant("Done."),
    ),
}


def written_by_assistant(family: str, row: dict[str, Any]) -> list[str]:
    """Return what the model must write in each turn, independent of any template."""
    messages = row["messages"] or [
        user(row["question"]),
        assistant(row["answer"], row["reasoning"]),
    ]
    last_question = max(i for i, m in enumerate(messages) if m["role"] == "user")
    written = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = ""
        if family != "instruct" and index > last_question and message.get("reasoning"):
            opening = "" if family == "thinking" else "<think>\n"
            text = f"{opening}{message['reasoning']}\n</think>\n\n"
        calls = [
            f'<tool_call>\n{{"name": "{c["name"]}", "arguments": '
            f"{json.dumps(c['arguments'], ensure_ascii=False)}}}\n</tool_call>"
            for c in message.get("tool_calls", [])
        ]
        said = [message["content"]] if message["content"] else []
        written.append(text + "\n".join([*said, *calls]) + "<|im_end|>")
    return written
