"""Detection of a row's columns by common names, English and Chinese, or by the config's.

A column that the config names is never replaced by a guess, and a guess between two columns whose
names differ in case alone is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from qwen3ft.chat.messages import MEDIA_KEYS
from qwen3ft.config import ColumnNames
from qwen3ft.records.data import RejectedRowError

PARTS: dict[str, tuple[str, ...]] = {
    "messages": (
        *("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
        *("对话", "会话", "消息", "chosen_messages"),
    ),
    "question": (
        *("question", "instruction", "prompt", "query", "problem", "user", "human", "input"),
        *("问题", "提问", "题目", "指令", "输入", "用户", "问"),
    ),
    "answer": (
        *("answer", "answers", "output", "completion", "response", "solution", "reply", "target"),
        *(
            "assistant",
            "chosen",
            "generation",
            "content",
            "答案",
            "回答",
            "回复",
            "输出",
            "解答",
            "助手",
            "答",
        ),
    ),
    "reasoning": (
        *("reasoning", "reasoning_content", "thinking", "thought", "cot", "chain_of_thought"),
        *("complex_cot", "rationale", "思考", "推理", "思维链", "推理过程"),
    ),
    "context": ("context", "passage", "document", "article", "上下文", "背景", "材料", "原文"),
    "system": ("system", "system_prompt", "系统", "系统提示"),
    "history": ("history", "历史"),
    "tools": ("tools", "functions", "工具"),
    "kind": ("kind",),
    "group": ("group", "group_id", "source_id", "paraphrase_of", "分组"),
    "split": ("split",),
    "label": ("label", "kto_tag"),
}
"""Names of each part, the more specific ones first."""

# Alpaca has a second question column.
_SECOND_QUESTION = {"instruction": "input", "指令": "输入"}


class Columns(NamedTuple):
    """Column of each part, None where there is none; `layout` is the usual name of the whole."""

    layout: str
    messages: str | None = None
    question: str | None = None
    addition: str | None = None
    """Appended to the question."""
    answer: str | None = None
    reasoning: str | None = None
    context: str | None = None
    """Put before the question."""
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    kind: str | None = None
    group: str | None = None
    split: str | None = None
    label: str | None = None
    """False where the answer is a bad one."""
    media: tuple[str, ...] = ()
    """Columns of images and the like."""
    unused: tuple[str, ...] = ()
    """Columns that are no part of a row."""

    def parts(self) -> dict[str, str]:
        """Return the columns that are there by part."""
        # Not asdict, which copies all values: every bad row asks for this.
        named = {name: getattr(self, name) for name in _PART_NAMES}
        return {part: name for part, name in named.items() if name is not None}


_PART_NAMES = tuple(name for name in Columns._fields if name not in ("layout", "media", "unused"))


def find_columns(names: tuple[str, ...], wanted: ColumnNames) -> Columns:
    """Match column names, ignoring case and outer spaces, with the parts of a row.

    Args:
        names: Columns of the row or file.
        wanted: Columns set by the config; an empty string disables a part.

    Raises:
        RejectedRowError: the names of two columns differ in case or outer spaces alone.
    """
    known = {_folded(name): name for name in names}
    found: dict[str, str | None] = {}
    for part, usual in PARTS.items():
        asked = getattr(wanted, part)
        if asked is None:
            found[part] = next((known[name] for name in usual if name in known), None)
        else:
            found[part] = asked if asked in names else None
    if wanted.messages is None and (wanted.question is not None or wanted.answer is not None):
        found["messages"] = None  # the config names other columns
    question = found["question"]
    addition = None
    if wanted.question is None and question is not None:
        second = _SECOND_QUESTION.get(_folded(question))
        addition = known.get(second) if second else None
    times = Counter(_folded(name) for name in names)
    for part, name in found.items():
        if name is not None and times[_folded(name)] > 1 and getattr(wanted, part) is None:
            raise RejectedRowError("two_columns_of_one_name")
    taken = {*found.values(), addition}
    media = tuple(name for name in names if _folded(name) in MEDIA_KEYS)
    unused = tuple(name for name in names if name not in taken and name not in media)
    layout = _layout(found, addition)
    return Columns(layout=layout, addition=addition, media=media, unused=unused, **found)


def may_be_used(names: tuple[str, ...], wanted: ColumnNames) -> list[str]:
    """Return the columns that some row may use: which, depends on those that are empty in it."""
    usual = {name for part in PARTS.values() for name in part}
    usual |= {*_SECOND_QUESTION.values(), *MEDIA_KEYS}
    asked = set(wanted.model_dump().values())
    return [name for name in names if name in asked or _folded(name) in usual]


def is_chosen(column: str | None) -> bool:
    """Return True for the column of the better answer in preference data."""
    return column is not None and _folded(column) == "chosen"


def _folded(name: str) -> str:
    return name.strip().lower()


def _layout(found: dict[str, str | None], addition: str | None) -> str:
    lowered = {part: (name or "").strip().lower() for part, name in found.items()}
    if found["messages"]:
        return "sharegpt" if lowered["messages"].startswith("conversation") else "messages"
    if addition is not None or (lowered["question"], lowered["answer"]) == (
        "instruction",
        "output",
    ):
        return "alpaca"
    if (lowered["question"], lowered["answer"]) == ("prompt", "completion"):
        return "prompt/completion"
    if found["context"] and lowered["answer"] == "answers":
        return "squad"
    return "question/answer"
