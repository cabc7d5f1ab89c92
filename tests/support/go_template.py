"""The part of Go's text/template that our Ollama templates use, for machines without Go.

Text and trimming, variables, fields, `if`/`else if`/`else`, `range` with index and element, and the
functions eq, gt, and, or, not. Anything else is an error. `test_instructions.py` compares it with
Go itself where that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|-?\d+|\(|\)|\$?[\w.$]+|:=|=|,)')

Scope = dict[str, Any]
Node = Callable[[Scope, Any], str]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, second: first == second,
    "gt": lambda first, second: first > second,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}


def render(template: str, data: dict[str, Any]) -> str:
    """Return what Go's engine writes for `template`, given `data`."""
    tokens = list(_tokens(template))
    nodes, end = _parse(tokens, 0)
    assert end == len(tokens), "an 'end' too many"
    return _run(nodes, {"$": data}, data)


def _tokens(template: str) -> Iterator[tuple[str, str]]:
    """Yield ('text', ...) and ('action', ...), with white space trimmed where '-' says so."""
    place, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        yield "text", text.rstrip(" \t\r\n") if match[1] else text
        yield "action", match[2]
        place, trim = match.end(), match[3] is not None
    rest = template[place:]
    yield "text", rest.lstrip(" \t\r\n") if trim else rest


def _parse(tokens: list[tuple[str, str]], at: int) -> tuple[list[Node], int]:
    """Return the nodes up to the caller's `end` or `else`, and its index."""
    nodes: list[Node] = []
    while at < len(tokens):
        kind, content = tokens[at]
        if kind == "text":
            nodes.append(lambda scope, dot, text=content: text)  # type: ignore[misc]
        elif content == "end" or content.startswith("else"):
            return nodes, at
        elif content.startswith("if "):
            node, at = _parse_if(tokens, at, content.removeprefix("if "))
            nodes.append(node)
        elif content.startswith("range "):
            node, at = _parse_range(tokens, at, content.removeprefix("range "))
            nodes.append(node)
        else:
            nodes.append(_simple(content))
        at += 1
    return nodes, at


def _parse_if(tokens: list[tuple[str, str]], at: int, condition: str) -> tuple[Node, int]:
    test = _expression(condition)
    then, at = _parse(tokens, at + 1)
    otherwise: list[Node] = []
    content = tokens[at][1]
    if content.startswith("else if "):
        node, at = _parse_if(tokens, at, content.removeprefix("else if "))
        otherwise = [node]
    elif content == "else":
        otherwise, at = _parse(tokens, at + 1)
    return lambda scope, dot: _run(then if test(scope, dot) else otherwise, scope, dot), at


def _parse_range(tokens: list[tuple[str, str]], at: int, clause: str) -> tuple[Node, int]:
    names, _, source = clause.partition(":=")
    index_name, element_name = (name.strip() for name in names.split(","))
    value = _expression(source)
    body, at = _parse(tokens, at + 1)

    def node(scope: Scope, dot: Any) -> str:
        parts = []
        for index, element in enumerate(value(scope, dot) or ()):
            scope[index_name], scope[element_name] = index, element
            parts.append(_run(body, scope, element))
        return "".join(parts)

    return node, at


def _run(nodes: list[Node], scope: Scope, dot: Any) -> str:
    return "".join(node(scope, dot) for node in nodes)


def _simple(content: str) -> Node:
    assigned = re.fullmatch(r"(\$\w+)\s*:?=\s*(.*)", content)
    value = _expression(assigned[2] if assigned else content)

    def assign(scope: Scope, dot: Any) -> str:
        assert assigned is not None
        scope[assigned[1]] = value(scope, dot)
        return ""

    return assign if assigned else lambda scope, dot: str(value(scope, dot))


def _expression(text: str) -> Callable[[Scope, Any], Any]:
    words = _WORD.findall(text)
    assert "".join(words) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text), text
    value, end = _call(words, 0)
    assert end == len(words), text
    return value


def _call(words: list[str], at: int) -> tuple[Callable[[Scope, Any], Any], int]:
    """Parse a value, or a function with its arguments, up to a closing bracket or the end."""
    if words[at] not in FUNCTIONS:
        return _operand(words, at)
    function, arguments = FUNCTIONS[words[at]], []
    at += 1
    while at < len(words) and words[at] != ")":
        argument, at = _operand(words, at)
        arguments.append(argument)
    return lambda scope, dot: function(*(value(scope, dot) for value in arguments)), at


def _operand(words: list[str], at: int) -> tuple[Callable[[Scope, Any], Any], int]:
    word = words[at]
    if word == "(":
        value, at = _call(words, at + 1)
        assert words[at] == ")"
        return value, at + 1
    if word.startswith('"'):
        return lambda scope, dot: word[1:-1], at + 1
    if re.fullmatch(r"-?\d+", word):
        return lambda scope, dot: int(word), at + 1
    name, _, field = word.partition(".")
    if name.startswith("$"):
        return lambda scope, dot: scope[name][field] if field else scope[name], at + 1
    assert word.startswith("."), f"{word!r} is not of the subset"
    return lambda scope, dot: dot[field], at + 1
