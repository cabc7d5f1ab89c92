"""Hostile ids and names, where they enter: a run's, a model's, a version's, a data set's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.hostile.case import Case

NAMES = {
    "parents": "../../x/y",
    "one-parent": "..",
    "absolute": "/tmp/qwen3ft-hostile-x",
    "inside-out": "x/../../../y",
    "hidden": ".nights",
    "nul": "x\0y",
    "line": "x\ny",
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "direction": "\u202eretsam",
    "long": "x" * 5_000,
    "empty": "",
    "query": "x' OR name != 'y",
    "surrogate": "x\udcff",
}


def _config(inside: Path, **settings: str) -> object:
    from qwen3ft.config import parse_config

    return parse_config(
        {
            "model_name": "embedded",
            "runs_dir": str(inside / "a" / "runs"),
            "cache_dir": str(inside / "a" / "cache"),
            "output_dir": str(inside / "a" / "out"),
            **settings,
        }
    )


def _resume(inside: Path, name: str) -> str:
    from flows.finetune import qwen3_finetune

    qwen3_finetune.fn(_config(inside), name)
    return ""


def _open_run(inside: Path, name: str) -> str:
    from flows.run_context import open_run

    with open_run(_config(inside), name, None):
        return ""


def _adapter(inside: Path, name: str) -> str:
    from qwen3ft.registry.lookup import find_adapter
    from qwen3ft.registry.registry import Registry

    find_adapter(_config(inside), Registry(f"sqlite:///{inside}/mlflow.db"), name)
    return ""


def _version(inside: Path, name: str) -> str:
    from qwen3ft.records.evaluation import Champion
    from qwen3ft.registry.lookup import fetch_version
    from qwen3ft.registry.registry import Registry

    version = Champion(
        registered_model="m", version=name, source_uri="runs:/a/b", adapter_path=None
    )
    fetch_version(_config(inside), Registry(f"sqlite:///{inside}/mlflow.db"), version)
    return ""


def _model(inside: Path, name: str) -> str:
    _config(inside, name=name or "/")
    return ""


def _revision(_: Path, name: str) -> str:
    from urllib.parse import quote

    from qwen3ft.data.hub import parse_hub_name

    encoded = quote(name.encode("utf-8", "surrogateescape"), safe="")
    parse_hub_name(f"hf://datasets/owner/name@{encoded}")
    return ""


WAYS: dict[str, tuple[Callable[[Path, str], str], Iterable[str], tuple[str, ...]]] = {
    "resume": (_resume, NAMES, ("flows.finetune",)),
    "run": (_open_run, NAMES, ("flows.run_context",)),
    "adapter": (_adapter, ("one-parent", "long", "query", "escape"), ("mlflow",)),
    "version": (_version, ("parents", "absolute", "one-parent", "long"), ("mlflow",)),
    "model": (_model, ("parents", "absolute", "nul", "escape", "long", "query"), ()),
    "revision": (_revision, ("parents", "absolute", "nul", "escape", "long"), ()),
}


def _nothing(inside: Path) -> None:
    (inside / "a" / "runs").mkdir(parents=True)


def _case(way: str, name: str) -> Case:
    open_it, _, imports = WAYS[way]
    return Case(
        f"{way}-{name}",
        "id",
        _nothing,
        lambda inside: open_it(inside, NAMES[name]),
        imports=imports,
    )


CASES = tuple(_case(way, name) for way, (_, names, _) in WAYS.items() for name in names)
