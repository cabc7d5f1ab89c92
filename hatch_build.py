"""Build hook of the wheel: everything in it lies under the one name `qwen3ft`.

In the repository `flows`, `tasks` and `deployments` are packages of their own. Installed like that,
they would take the names of folders that many users of Prefect have. So the wheel has them as
`qwen3ft.flows`, `qwen3ft.tasks` and `qwen3ft.deployments`: [tool.hatch.build] in pyproject.toml
maps the folders, and this hook changes the imports accordingly. It changes nothing else, so that
every line keeps its number. An editable installation uses the repository as it is.
"""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MOVED = ("flows", "tasks", "deployments")
"""Packages of the repository that the wheel has below `qwen3ft`."""

_KEYWORD = re.compile(rb"(from|import)\s+")
_NAMED = re.compile(rf"({'|'.join(MOVED)})(\.[a-z_0-9]+)+")
"""A text that would be the name of a module, such as of one to execute."""


class MovedImports(BuildHookInterface[Any]):
    """Puts files with changed imports in the place of those that they are made from."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the changed files of a standard wheel to those that are included by force."""
        if version != "standard":
            return
        self._folder = tempfile.TemporaryDirectory(prefix="qwen3ft-wheel-")
        for number, found in enumerate(self.build_config.builder.recurse_selected_project_files()):
            path = Path(found.path)
            if path.suffix != ".py":
                continue
            source = path.read_bytes()
            moved = move_imports(source, found.relative_path)
            if moved != source:
                changed = Path(self._folder.name) / f"{number}.py"
                changed.write_bytes(moved)
                build_data["force_include"][str(changed)] = found.distribution_path

    def finalize(
        self,
        version: str,
        build_data: dict[str, Any],
        artifact_path: str,
    ) -> None:
        """Remove the changed files, which the wheel has by now."""
        if version == "standard":
            self._folder.cleanup()


def move_imports(source: bytes, name: str) -> bytes:
    """Return a module's source with imports of moved packages from below `qwen3ft`.

    Args:
        source: Python, in UTF-8.
        name: The module's file, for messages.

    Raises:
        ValueError: an import or a text names a moved package in a way that cannot be changed.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_moved(node.module or ""):
            _qualify(lines, node)
        elif isinstance(node, ast.Import):
            moved = [alias for alias in node.names if _is_moved(alias.name)]
            if moved and (len(node.names) > 1 or moved[0].asname is None):
                # it binds the first part of the name, which would become `qwen3ft`
                raise ValueError(f"{name}:{node.lineno}: write `from PACKAGE import MODULE`")
            if moved:
                _qualify(lines, node)
        elif isinstance(node, ast.Constant) and _NAMED.fullmatch(str(node.value)):
            raise ValueError(f"{name}:{node.lineno}: {node.value!r} is another name in a wheel")
    return b"".join(lines)


def _is_moved(module: str) -> bool:
    return module.partition(".")[0] in MOVED


def _qualify(lines: list[bytes], node: ast.stmt) -> None:
    """Put `qwen3ft.` after the first keyword of an import."""
    line, start = lines[node.lineno - 1], node.col_offset  # an offset in bytes
    keyword = _KEYWORD.match(line, start)
    assert keyword is not None  # an import begins with it
    lines[node.lineno - 1] = line[: keyword.end()] + b"qwen3ft." + line[keyword.end() :]
