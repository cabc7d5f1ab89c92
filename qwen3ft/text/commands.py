"""Commands that are printed for a person: they work as they stand, in the shell that shows them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

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
