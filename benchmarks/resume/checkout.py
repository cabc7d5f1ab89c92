"""What makes an unpacked checkout count as installed: its metadata, which pip would write."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from benchmarks.machine import ROOT


def register_checkout(folder: Path) -> list[str]:
    """Return the folders to put on PYTHONPATH so that commands find the project's metadata.

    None if it is installed; else `folder`, which gets its requirements and entry points, as
    pyproject.toml names them.
    """
    try:
        metadata.version("qwen3ft")
    except metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    else:
        return []
    info = folder / f"qwen3ft-{project['version']}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {each}" for each in project["dependencies"]]
    heads = ["Metadata-Version: 2.4", "Name: qwen3ft", f"Version: {project['version']}"]
    (info / "METADATA").write_text("\n".join([*heads, *lines, ""]), encoding="utf-8")
    text = "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text(text, encoding="utf-8")
    return [str(folder)]
