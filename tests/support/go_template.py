"""Go's text/template as far as our Ollama templates use it, for machines without Go.

Templates are translated to Jinja: text and trimming, variables, fields, `if`, `else`, `range` with
index and element, and a few functions. Anything else is an error. `test_instructions.py` compares
the result with Go itself where that is installed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from jinja2.utils import Namespace

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "not": operator.not_,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}


def render(template: str, data: dict[str, Any]) -> str:
    """Return what Go's engine writes for `template`, given `data`."""
    return _compiled(template).render(root=data, dot=data, scope=Namespace())


@cache
def _compiled(template: str) -> Template:
    blocks: list[str] = []
    translated = _ACTION.sub(lambda match: _tag(match, blocks), template)
    assert not blocks, "an 'end' is missing"
    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    jinja.globals |= {f"go_{name}": function for name, function in FUNCTIONS.items()}
    return jinja.from_string(translated)


def _tag(match: re.Match[str], blocks: list[str]) -> str:
    """Return the tag of Jinja for one action; `blocks` holds the kinds of those still open."""
    left, content, right = match.groups()
    word, _, rest = content.partition(" ")
    assigned = re.fullmatch(r"\$(\w+)\s*:?=\s*(.*)", content)
    if word in ("if", "range"):
        blocks.append("if" if word == "if" else "for")
    if word == "range":
        names, _, source = rest.partition(":=")
        index, element = (name.strip().removeprefix("$") for name in names.split(","))
        tag = f"for dot in {_expression(source)} %}}{{% set scope.{index} = loop.index0 %}}"
        tag += f"{{% set scope.{element} = dot"
    elif word == "end":
        tag = f"end{blocks.pop()}"
    elif content == "else":
        tag = "else"
    elif word in ("if", "else"):
        tag = f"{'if' if word == 'if' else 'elif'} {_expression(rest.removeprefix('if '))}"
    elif assigned:
        tag = f"set scope.{assigned[1]} = {_expression(assigned[2])}"
    else:
        return f"{{{{{left} {_expression(content)} {right}}}}}"
    return f"{{%{left} {tag} {right}%}}"


def _expression(text: str) -> str:
    return _call(iter(_WORD.findall(text)))


def _call(words: Iterator[str]) -> str:
    """Translate a value, or a function with its arguments, up to a closing bracket or the end."""
    parts = []
    for word in words:
        if word == ")":
            break
        parts.append(_call(words) if word == "(" else _operand(word))
    function, *arguments = parts
    return f"{function}({', '.join(arguments)})" if arguments else function


def _operand(word: str) -> str:
    if word in FUNCTIONS:
        return f"go_{word}"
    if word.startswith("$"):
        return "root" + word[1:] if word[1:2] in ("", ".") else f"scope.{word[1:]}"
    assert re.match(r'"|-?\d+$|\.\w', word), f"{word!r} is not of the subset"
    return f"dot{word}" if word.startswith(".") else word
