"""Tokenizers and chat templates that run away, cannot be read, or look for other things."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.golden_conversations import TEMPLATES

Harm = Callable[[Path], object]

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_TIMES = "{% for i in range(60) %}"
_SQUARES = f"{{% set s = namespace(n=9) %}}{_TIMES}{{% set s.n = s.n * s.n %}}{{% endfor %}}"
_DOUBLED = f"{{% set s = namespace(t='aa') %}}{_TIMES}{{% set s.t = s.t + s.t %}}{{% endfor %}}"
_BODY = "{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}"
_HUGE = "{% set n = 10 ** 10 %}"

RUNAWAY_TEMPLATES = {
    "nested loops": LOOP,
    "a constant of 10**10": "{{ 'a' * 10 ** 10 }}",
    "a text of 10**10": _HUGE + "{{ 'a' * n }}",
    "a list of 10**10": _HUGE + "{{ ['a'] * n }}",
    "center, a method": _HUGE + "{{ 'a'.center(n) }}",
    "ljust": _HUGE + "{{ 'a'.ljust(n) }}",
    "zfill": _HUGE + "{{ 'a'.zfill(n) }}",
    "center, a filter": _HUGE + "{{ 'a' | center(n) }}",
    "indent": _HUGE + "{{ 'a' | indent(n) }}",
    "tojson": "{{ messages | tojson(indent=10 ** 9) }}",
    "tojson in a map": "{{ messages | map('tojson', indent=10 ** 9) | list }}",
    "a width by percent": "{{ '%01000000000d' % 1 }}",
    "a width by format": "{{ '{:1000000000}'.format(1) }}",
    "powers": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "squares": _SQUARES + "{{ s.n }}",
    "doubled texts": _DOUBLED + "{{ s.t }}",
    "a range of 10**9": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "recursion twice": f"{{% macro twice(n) %}}{_BODY}{{% endmacro %}}{{{{ twice(60) }}}}",
    "endless output": f"{{% for i in range(90000) %}}{'a' * 36}{{% endfor %}}",
    "a list of characters": "{{ ('a' * 30 * 10 ** 6) | list | length }}",
    "lipsum": "{{ lipsum(n=10 ** 8) }}",
}

BROKEN_TEMPLATES = {
    "division by zero": "{{ 1 / 0 }}",
    "an index beyond": "{{ messages[10 ** 30] }}{{ messages[5].x.y }}",
    "an attribute of nothing": "{{ none.x.y }}",
    "a way out of the sandbox": (
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('true') }}"
    ),
    "a loop over a number": "{% for x in 5 %}{% endfor %}",
    "a sum of text and number": "{{ 'a' + 1 }}",
    "a filter that is not there": "{{ messages | no_such_filter }}",
    "syntax": "{% if %}",
    "braces": "{{ " * 1000,
    "5,000 parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "another file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "an escape sequence": "{{ raise_exception('\x1b[2J') }}",
}

TRIGGERS = ("tools", "messages | length > 20", "messages | selectattr('tool_calls') | list")
"""Conversations on which a template may run away that renders all others."""

UNREADABLE_TOKENIZERS = {
    "empty": "",
    "cut off": "{",
    "a list": "[]",
    "null": "null",
    "a version alone": '{"version": "1.0"}',
    "nested": "[" * 100_000,
    "a text without end": '"' + "x" * 100_000,
}


def with_template(folder: Path, text: str) -> Path:
    """Give the model in `folder` another chat template."""
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder


def runs_away_on(trigger: str) -> str:
    """Return Qwen3's template with a loop for some conversations."""
    return "{% if " + trigger + " %}" + LOOP + "{% endif %}" + TEMPLATES["qwen3"]


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def split_by(pattern: str) -> Callable[[dict[str, Any]], None]:
    """Split texts by a regular expression before anything else."""

    def change(content: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    return change


def _replaced_by(pattern: str, text: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}

    return change


def _many_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [["a", "b"]] * 10**7


def _many_tokens(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {f"t{n}": 2000 + n for n in range(4 * 10**6)}


def _no_markers(content: dict[str, Any]) -> None:
    content["added_tokens"] = []


def _other_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [["no", "such"]]


CHANGED_TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "alternatives without end": split_by(r"^(a|a|b?)*$"),
    "nested repeats": split_by(r"(a+)+$"),
    "nested spaces": split_by(r"(\s+)+x"),
    "a normaliser's repeats": _replaced_by(r"(.+)+x", "y"),
    "a normaliser that inflates": _replaced_by(r".", "x" * 10**6),
    "10**7 merges": _many_merges,
    "4 * 10**6 tokens": _many_tokens,
    "no turn markers": _no_markers,
    "merges of no tokens": _other_merges,
    "a model of another type": lambda content: content["model"].update(type="Evil"),
    "a regular expression that is none": split_by(r"(?<n"),
    "a decoder of another type": lambda content: content.update(decoder={"type": "Evil"}),
}
