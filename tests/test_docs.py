"""The documents name only links, commands, settings, targets and files that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import qwen3ft
from flows.cli import app
from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.settings import CHANGEABLE_SETTINGS
from qwen3ft.tracking.run_metrics import METRICS, TAGS

ROOT = Path(__file__).parent.parent
GUIDES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "qwen3ft" / "embedded" / "README.md",
    ROOT / "deployments" / "configs" / "gsm8k" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
"""Pages about the code as it is; the other pages also mention how it was."""

PAGES = [
    *GUIDES,
    ROOT / "CHANGELOG.md",
    ROOT / "DECISIONS.md",
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
MOST_PICTURE_BYTES = 200_000
MOST_README_LINES = 120

SETTINGS = TrainingConfig.model_fields.keys() | ColumnNames.model_fields.keys()
NO_SETTINGS = {
    *("max_tokens", "max_completion_tokens", "top_p", "reasoning_content"),  # of a request
    *qwen3ft.__all__,
    *METRICS,
    *TAGS,
    "install_dependencies",
    "setup_uv_environment",
    "continue_run",
    *("finished_job_ttl", "service_account_name"),  # of a work pool
    "max_tokens",
    "enable_thinking",
    "chat_template_kwargs",
    "llama_cpp",
    "read_raw",
    "run_worker",
}
"""Code spans of the guides that look like settings but are not."""

_TO_END = re.DOTALL | re.MULTILINE
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", _TO_END)
_SPAN = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^|[\s(]|bin/)qwen3ft ([a-z][^)\n]*)")
_FILE = re.compile(r"(?:\.ci|benchmarks|deployments|docs|flows|qwen3ft|tasks|tests)/[\w./-]*\w")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, without comments, and code spans."""
    text = read(page)
    for _, block in _BLOCK.findall(text):
        yield from (line.partition("  #")[0].rstrip() for line in block.splitlines())
    yield from _SPAN.findall(_BLOCK.sub("", text))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_that_may_change_on_resume_are_listed() -> None:
    """Each with what a new value changes."""
    text = read(ROOT / "docs" / "operating.md").partition("## Resume a run")[2]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text.partition("\n## ")[0], re.MULTILINE))
    assert listed == CHANGEABLE_SETTINGS


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """Links lead to pages, headings, pictures and folders; web addresses are not requested."""
    text = _SPAN.sub("", _BLOCK.sub("", read(page)))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (*links, *re.findall(r'\bsrc(?:set)?="([^"]+)"', text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_commands_and_their_options_exist(page: Path) -> None:
    """Every `qwen3ft` command with its options, and every make target."""
    root = typer.main.get_command(app)
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    for line in code(page):
        if make := re.match(r"make ([a-z-]+)$", line):
            assert make[1] in targets, line
        for written in _COMMAND.findall(line):
            command, words = root, shlex.split(written)
            while getattr(command, "commands", None):
                assert words, line
                assert words[0] in command.commands, line
                command = command.commands[words.pop(0)]
            options = {name for option in command.params for name in option.opts}
            options |= {name for option in command.params for name in option.secondary_opts}
            wrong = {word for word in words if word.startswith("-")} - options - {"--help"}
            assert not wrong, line


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_settings_exist(page: Path) -> None:
    """Settings in YAML, after --set, and in code spans are those of `TrainingConfig`."""
    text = read(page)
    blocks = [block for language, block in _BLOCK.findall(text) if language == "yaml"]
    named = {key for block in blocks for key in re.findall(r"^(\w+):", block, re.MULTILINE)}
    for line in code(page):
        named |= set(re.findall(r"--set '?([a-z_]+)=", line))
        named |= set(re.findall(r"^([a-z]+(?:_[a-z0-9]+)+)(?:: .*)?$", line))
    assert named - SETTINGS - NO_SETTINGS == set()


@pytest.mark.parametrize("page", GUIDES, ids=page_name)
def test_files_exist(page: Path) -> None:
    """Code spans name files and folders of the repository that are there."""
    spans = _SPAN.findall(_BLOCK.sub("", read(page)))
    paths = [path for span in spans if _FILE.fullmatch(path := span.partition("::")[0].strip("/"))]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_is_short() -> None:
    """The README can be read in one go."""
    assert len(read(ROOT / "README.md").splitlines()) <= MOST_README_LINES


def test_every_picture_is_shown_and_small() -> None:
    """Every picture is used, and small, because a repository keeps it for ever."""
    shown = "".join(read(page) for page in PAGES)
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.name in shown
        assert picture.stat().st_size <= MOST_PICTURE_BYTES


@pytest.mark.slow  # makes 48 plans
def test_the_sweep_in_the_docs_is_what_the_command_prints() -> None:
    """Budgets, splits and speeds of docs/planning.md are those of today's prediction."""
    [block] = re.findall(r"\$ qwen3ft plan (.*?)^```", read(ROOT / "docs" / "planning.md"), _TO_END)
    arguments, *lines = block.splitlines()
    command = ["plan", *shlex.split(arguments), "--gpu", "h200"]
    printed = CliRunner().invoke(app, command).output.splitlines()
    assert [line for line in lines if re.match(r" +\d", line) and line not in printed] == []
