"""Commands that the product prints: found in its code, and checked without running them."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import typer

from flows.cli import app
from flows.cli.options import read_overrides
from qwen3ft.config import TrainingConfig, parse_config

ROOT = Path(__file__).parents[2]
PRODUCT = ("qwen3ft", "flows", "tasks", "deployments")

OTHER_PROGRAMS = {
    *("ls", "tail", "head", "df", "cat", "mv", "ps", "fuser", "ulimit", "unset", "export", "cd"),
    *("nvidia-smi", "hf", "make", "python3", "prefect", "libreoffice", "ip"),
}
"""Programs that a printed command may name besides ours; of the system, or of .venv/bin."""

_VERBS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

SAMPLES = {
    "--adapter": "champion",
    "--resume": "a-run",
    "--row": "1",
    "promote": "1",
    "push": "owner/name",
    "data": "check",
    "--gpu": "none",
    "--model": "4b",
    "settings": "lora_r",
    "--quantize": "q8_0",
}
"""Value by the word before a part of a command that is known only at run time."""

OPTIONS = {
    "adapter": "--adapter champion",
    "setting": "--set model_name=embedded",
    **dict.fromkeys(["consent", "_about(facts)", "again"], ""),
}
"""Options that stand for a part of a command, by the expression that makes them."""


@dataclass(frozen=True)
class Site:
    """A place where an error with a next command is made.

    Attributes:
        path: The file, from the root of the project.
        function: The function or method.
        number: Its number among the places in this function, from 1.
        first_line: Where the call begins.
        last_line: Where it ends.
        next_command: What is given as the next command.
    """

    path: str
    function: str
    number: int
    first_line: int
    last_line: int
    next_command: ast.expr

    def __str__(self) -> str:
        return f"{self.path} {self.function} {self.number}"


@cache
def error_sites() -> list[Site]:
    """Every call in the product that is given a `next_command`."""
    found: list[Site] = []
    for path, tree in _trees():
        count = Counter[str]()
        for function, call, command in _calls(tree, ""):
            count[function] += 1
            last = call.end_lineno or call.lineno
            found.append(Site(path, function, count[function], call.lineno, last, command))
    return found


def calls_without_next_command(kinds: set[str]) -> list[str]:
    """Return the places where an error of these classes is made without a next command."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in kinds
        and not ast.unparse(node.func).startswith("torch.")
        and "next_command" not in {keyword.arg for keyword in node.keywords}
    ]


@cache
def written_commands() -> dict[str, str]:
    """Return every command of ours that stands in the code, by place, with samples filled in."""
    found = {}
    for path, tree in _trees():
        joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in joined for part in ast.walk(node) if part is not node}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = "" if id(node) in parts else node.value.replace("{}", "owner/name")
            elif isinstance(node, ast.JoinedStr):
                text = template(node)
            else:
                continue
            if re.match(r"qwen3ft [a-z]+(?: [\w'-]|$)", text) and text.split()[1] in _VERBS:
                found[f"{path}:{node.lineno}"] = text
    return found


def template(node: ast.JoinedStr) -> str:
    """Return an f-string with a plausible text for each part that is known only at run time."""
    text = ""
    for number, part in enumerate(node.values):
        if isinstance(part, ast.Constant):
            text += str(part.value)
            continue
        rest = node.values[number + 1 : number + 2]
        is_name = rest and str(getattr(rest[0], "value", "")).startswith("=")
        if text.endswith("--set "):
            text += "cache_dir" if is_name else "lora_r=8"
        else:
            text += _sample(text, ast.unparse(part.value))
    return text


def words_of(node: ast.expr) -> list[str]:
    """Return the words of a call of `shell_line`, as `template` does; [] of anything else."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "shell_line":
        return []
    words = []
    for given in node.args:
        if isinstance(given, ast.Starred) and not isinstance(given.value, ast.Tuple):
            return []
        for word in given.value.elts if isinstance(given, ast.Starred) else [given]:
            if isinstance(word, ast.JoinedStr):
                words.append(template(word))
            else:
                sample = SAMPLES.get(words[-1], "1") if words else "1"
                words.append(str(word.value) if isinstance(word, ast.Constant) else sample)
    return words


def flaw_of(command: str) -> str:
    """Say why a command would be refused as it stands; '' if it would be accepted."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return str(error)
    if not words:
        return "it is empty"
    program, *arguments = words
    if program != "qwen3ft":
        return "" if program in OTHER_PROGRAMS or shutil.which(program) else "no such program"
    return _flaw_of_arguments(arguments)


def only_looks(command: str) -> bool:
    """Return True for a command of ours that changes nothing and takes no second."""
    words = shlex.split(command)
    verb = " ".join(words[1:3] if words[1:2] == ["data"] else words[1:2])
    if words[0] != "qwen3ft" or "--help" in words:
        return words[0] == "qwen3ft"
    is_instant = bool({"--model", "--gpu"} & set(words))  # of a plan: from the model's shape
    return verb in ("settings", "data check", "data preview") or (verb == "plan" and is_instant)


def run_here(command: str, folder: Path) -> int:
    """Run a command of ours as it is printed, in this process and a folder; return its status.

    Raises:
        FinetuneError: as the command.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        app(args=shlex.split(command)[1:], prog_name="qwen3ft")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        os.chdir(before)
    return 0


def _flaw_of_arguments(arguments: list[str]) -> str:
    command = typer.main.get_command(app)
    name = "qwen3ft"
    while (commands := getattr(command, "commands", None)) is not None:
        name, *arguments = arguments or [""]
        if name not in commands:
            return f"there is no command {name!r}"
        command = commands[name]
    if {"--help", "-h"} & set(arguments):
        return ""
    try:
        context = command.make_context(name, list(arguments))
        settings = context.params.get("settings")
        parse_config({"model_name": "embedded", **read_overrides(settings)})
    except Exception as error:  # noqa: BLE001  whatever it is, the command is refused
        return f"{type(error).__name__}: {getattr(error, 'message', '') or error}"
    return ""


@cache
def _trees() -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")))
        for folder in PRODUCT
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "next_command" in (text := path.read_text(encoding="utf-8")) or "qwen3ft " in text
    ]


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call, ast.expr]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        within = f"{function}.{child.name}".lstrip(".") if named else function
        if isinstance(child, ast.Call):
            for keyword in child.keywords:
                if keyword.arg == "next_command":
                    yield function, child, keyword.value
        yield from _calls(child, within)


def _sample(before: str, expression: str) -> str:
    word = before.split()[-1].lstrip("'\"[") if before.split() else ""
    name, equals, _ = word.partition("=")
    if equals:
        default = TrainingConfig.model_fields[name].default if name in _NAMES else None
        return str(default if isinstance(default, (int, float, str)) else "1")
    if before.endswith(" ") and word in SAMPLES:
        return SAMPLES[word]
    return OPTIONS.get(expression, "1")


_NAMES = set(TrainingConfig.model_fields)
