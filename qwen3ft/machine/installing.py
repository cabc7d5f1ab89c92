"""Commands that install what is missing, printed for a person: they work as they stand.

The project is on no package index, so they name what it needs, not the project. Importing this
module needs the standard library alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from qwen3ft.text.commands import shell_line

CHECKOUT = Path(__file__).parents[2]
"""The clone, if this is one; in a wheel a folder of packages."""


def install_command(packages: Sequence[str]) -> str:
    """Return the command that installs requirements into this environment."""
    python = sys.executable
    if importlib.util.find_spec("pip"):
        return shell_line(python, "-m", "pip", "install", *packages)
    # uv makes environments without pip; a clone keeps its own uv beside its .venv
    own = Path(sys.prefix).parent / ".qwen3ft" / "tools" / "bin"
    uv = shutil.which("uv") or shutil.which("uv", path=str(own))
    if uv:
        return shell_line(uv, "pip", "install", "--python", python, *packages)
    with_pip = shell_line(python, "-m", "pip", "install", *packages)
    return f"{shell_line(python, '-m', 'ensurepip')} && {with_pip}"


def extra_command(extra: str) -> str:
    """Return the command that installs an extra of the project, such as 'gguf'."""
    return install_command(_requirements_of(extra) or [f"{CHECKOUT}[{extra}]"])


def _requirements_of(extra: str) -> list[str]:
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires("qwen3ft") or []
    except metadata.PackageNotFoundError:  # a clone that is only on the path
        return []
    found = []
    for requirement in map(Requirement, texts):
        marker, requirement.marker = requirement.marker, None
        is_of_extra = marker is not None and not marker.evaluate({"extra": ""})
        if marker is not None and is_of_extra and marker.evaluate({"extra": extra}):
            found.append(str(requirement))
    return found
