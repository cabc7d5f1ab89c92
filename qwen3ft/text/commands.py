"""Commands that are printed for a person: they work as they stand, in the shell that shows them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_WITH_SETTINGS = re.compile(
    r"qwen3ft (plan|run|train|serve|export|chat|generate|push|data check|data preview)(?= |$)"
)
_WITH_ADAPTER = {"serve", "export", "chat", "generate", "push"}
_COMPLETE = {"--config", "--model", "--resume", "--help"}
"""Options of commands that are about something else, or all that they need."""
_CARRIED = {"--set": "", "-s": "", "--config": "--config", "-c": "--config"}
"""Options that are carried over, with the setting that each stands for, '' if it names one."""
_OF_A_PLAN = {
    **dict.fromkeys(("--model", "-m"), "model_name"),
    **dict.fromkeys(("--budget", "-b"), "max_memory_gb"),
    "--seq": "max_sequence_length",
    "--batch": "batch_size",
    "--gpu": "gpu",
    "--fill": "fill",
}
_FLAGS = {"--key", "--public"}
_OF_SERVE = (
    *("--engine", "--host", "--port", "--key", "--slots", "--queue", "--context-tokens"),
    *("--probe-rows", "--canary", "--canary-hours", "--log-requests"),
)
_OF_THE_SAME = {
    "plan": _OF_A_PLAN,
    "serve": {option: option for option in _OF_SERVE},
    "push": {option: option for option in ("--license", "--public")},
}
"""Options that are carried over to the same command only."""
_OURS = re.compile(r"^(qwen3ft|prefect)(?= |$)")


def runnable(command: str, *, elsewhere: bool = False) -> str:
    """Return `command` with the program as this shell finds it.

    The name alone if that is this installation's program on PATH, else its path: relative where
    the command was typed in a folder above it.

    Args:
        command: A command of this project or of Prefect; others stay as they are.
        elsewhere: It is to run in another folder, to which the printed line changes first.
    """
    found = _OURS.match(command)
    if found is None:
        return command
    name = found[1]
    own = Path(sys.prefix) / "bin" / name
    if not own.exists():
        return command
    on_path = shutil.which(name)
    if on_path is not None and Path(on_path).parent.resolve() == own.parent.resolve():
        return command
    path = str(own) if elsewhere else _from_here(own)
    return f"{shlex.quote(path)}{command[found.end() :]}"


def with_typed(command: str, typed: Sequence[str]) -> str:
    """Return a command with the settings of another one, where it has no others.

    So the next command of an error is about the settings and the adapter of what failed, and of a
    plan, a server or a push about its other options too. One that names another model stays as it
    is: the settings were chosen for the first.

    Args:
        command: The command; one that has no settings stays as it is.
        typed: Words of the other, its name first if it has one, with `--config FILE`,
            `--set NAME=VALUE` and `--adapter WHICH` among them.
    """
    found = _WITH_SETTINGS.match(command)
    try:
        words = shlex.split(command)
    except ValueError:  # a text that was cut
        return command
    if found is None or _COMPLETE & set(words):
        return command
    carried = dict(_CARRIED)
    if found[1] in _WITH_ADAPTER:
        carried["--adapter"] = "--adapter"
    if typed[:1] == [found[1]]:
        carried |= _OF_THE_SAME.get(found[1], {})
    own = {word.partition("=")[0] for option, word in pairwise(words) if option == "--set"}
    own |= {name for option, name in (_OF_A_PLAN | carried).items() if option in words}
    if "model_name" in own and not found[1].startswith("data"):
        return command
    given, more = iter(typed), list[str]()
    for word in given:
        option, equals, value = word.partition("=")
        if word[:2] in carried and len(word) > 2:  # -sseed=3
            option, equals, value = word[:2], "=", word[2:].removeprefix("=")
        if option not in carried:
            continue
        if option in _FLAGS:
            more += [] if option in own else [option]
            continue
        value = value if equals else next(given, "")
        setting = carried[option] or value.partition("=")[0].strip()
        more += [] if setting in own else [option, value]
    return " ".join(filter(None, [command, shlex.join(more)]))


def _from_here(path: Path) -> str:
    # PWD: commands change to the project folder, the shell that shows their output does not
    here = Path(os.environ.get("PWD", "") or Path.cwd())
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def shell_setup() -> str:
    """Return the command after which printed ones work in any shell: folder and environment."""
    activate = Path(sys.prefix) / "bin" / "activate"
    command = shell_line("cd", Path.cwd())
    if sys.prefix == sys.base_prefix or not activate.exists():
        return command
    return f"{command} && {shell_line('.', activate)}"


def shell_line(*words: object) -> str:
    """Return a command whose words stay whole in a shell, such as paths with spaces."""
    return shlex.join(map(str, words))


def existing_path(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    if "\0" in str(path):  # no path at all
        return Path()
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), Path())
