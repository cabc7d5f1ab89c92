"""Hostile settings, in files and in `--set`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.hostile.case import Case, canary_of


def read_config(inside: Path) -> str:
    """Read `config.yaml` as a run's settings, by both ways in; what is read was accepted."""
    from flows.cli.options import read_overrides
    from qwen3ft.config import load_config
    from qwen3ft.errors import ConfigError

    path = inside / "config.yaml"
    if path.is_file():
        with suppress(ConfigError):  # the file says why
            read_overrides([f"seed={path.read_text(encoding='utf-8', errors='replace')}"])
    load_config(path)
    return ""


def _alias_bomb() -> str:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(["a0: &a0 [1, 2, 3]", *lines, "model_name: *a9"])


def _run(command: str) -> Callable[[Path], str]:
    """Return a config that would write the canary if its tags were followed."""
    return lambda inside: command.format(canary_of(inside))


TEXTS: dict[str, Callable[[Path], str | bytes]] = {
    "alias-bomb": lambda _: _alias_bomb(),
    "alias-of-itself": lambda _: "columns: &a {answer: *a}",
    "merge-bomb": lambda _: "a: &a {seed: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}",
    "lists-20000": lambda _: f"lora_r: {'[' * 20_000}{']' * 20_000}",
    "lists-never-closed": lambda _: f"lora_r: {'[' * 200_000}",
    "mappings-20000": lambda _: "{a: " * 20_000,
    "items-20000": lambda _: "- " * 20_000,
    "names-20000": lambda _: "? " * 20_000,
    "deeper-each-line": lambda _: "\n".join(" " * n + "a:" for n in range(700)),
    "many-digits": lambda _: f"seed: {'9' * 200_000}",
    "many-hexadecimal-digits": lambda _: f"seed: 0x{'f' * 200_000}",
    "many-sexagesimal-digits": lambda _: f"seed: 1{':59' * 80_000}",
    "name-twice": lambda _: "seed: 1\nseed: 2",
    "too-long": lambda _: "a: 1\n" * 10_000_000,
    "many-names": lambda _: "\n".join(f"k{n}: 1" for n in range(25_000)),
    "many-pairs": lambda _: f"seed: [{'a: b, ' * 40_000}]",
    "long-value": lambda _: f"seed: {'x' * 200_000}",
    "many-documents": lambda _: "---\n" * 50_000,
    "python-object": _run("seed: !!python/object/apply:os.system ['touch {}']"),
    "python-name": _run("seed: !!python/object/new:subprocess.Popen [['touch', '{}']]"),
    "python-module": lambda _: "seed: !!python/module:antigravity",
    "template": _run("model_name: '{{{{ cycler.__init__.__globals__.os.popen(\"touch {}\") }}}}'"),
    "binary": lambda _: b"\x80\x81\x82\xff",
    "nul": lambda _: 'runs_dir: "a\\0b"',
    "steering": lambda _: 'output_dir: "\\e[2J\\e]0;owned\\a"',
    "surrogate": lambda _: 'output_dir: "\\ud800"',
    "empty": lambda _: "",
    "not-finite": lambda _: "learning_rate: .nan\nmax_memory_gb: .inf",
    "no-date": lambda _: "seed: 2024-99-99",
    "memory-of-a-star": lambda _: "max_memory_gb: 1.0e+300",
    "password-in-url": lambda _: "judge_url: https://me:secret@judge.example/v1\njudge_model: x",
    "url-of-metadata": lambda _: "judge_url: http://169.254.169.254/v1\njudge_model: x",
    "path-of-a-model": lambda _: "name: ../../x",
    "path-of-a-revision": lambda _: "model_revision: ../../x",
}


def _text_case(name: str, make: Callable[[Path], str | bytes]) -> Case:
    def build(inside: Path) -> None:
        text = make(inside)
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (inside / "config.yaml").write_bytes(data)

    return Case(f"config-{name}", "config", build, read_config, imports=("qwen3ft.config",))


def _path_case(name: str, make: Callable[[Path], None]) -> Case:
    def build(inside: Path) -> None:
        make(inside / "config.yaml")

    return Case(f"config-{name}", "config", build, read_config, imports=("qwen3ft.config",))


CASES = (
    *(_text_case(name, make) for name, make in TEXTS.items()),
    _path_case("folder", Path.mkdir),
    _path_case("pipe", os.mkfifo),
    _path_case("device", lambda path: path.symlink_to("/dev/zero")),
    _path_case("link-to-itself", lambda path: path.symlink_to(path)),
)
