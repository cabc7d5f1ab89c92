"""A tokenizer from elsewhere is first used in a worker that time and memory limits end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.golden_conversations import TEMPLATES
from support.hostile_tokenizers import (
    CHANGED_TOKENIZERS,
    TRIGGERS,
    UNREADABLE_TOKENIZERS,
    change_tokenizer,
    runs_away_on,
    with_template,
)

from qwen3ft.chat.probes import probe_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.model import tokenizer_trial
from qwen3ft.model.tokenizer_trial import try_tokenizer
from qwen3ft.records.requests import TokenizerRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(model_name="x/y", cache_dir=str(tmp_path / "cache"), stall_seconds=120)


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_template_of_qwen3_passes(folder: Path, family: str) -> None:
    """All conversations can be rendered, by the published files too."""
    assert probe_tokenizer(with_template(folder, TEMPLATES[family])) > 60


def test_a_template_may_refuse_what_no_row_needs(folder: Path) -> None:
    """Such as tools, or a system message; it renders fewer conversations."""
    refuses = "{% if tools or messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    everything = probe_tokenizer(folder)
    assert 10 < probe_tokenizer(with_template(folder, refuses + TEMPLATES["qwen3"])) < everything


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_template_that_runs_away_on_some_conversations_is_found(
    folder: Path, trigger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the first row of the data looks like."""
    from qwen3ft.chat import limits

    monkeypatch.setattr(limits, "RENDER_CPU_SECONDS", 0.2)
    with pytest.raises(TokenizerError, match="was stopped"):
        probe_tokenizer(with_template(folder, runs_away_on(trigger)))


@pytest.mark.parametrize("name", UNREADABLE_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_a_tokenizer_error(folder: Path, name: str) -> None:
    """Whatever type of exception the library has for it."""
    (folder / "tokenizer.json").write_text(UNREADABLE_TOKENIZERS[name])
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        probe_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    ["no turn markers", "merges of no tokens", "a model of another type"],
)
def test_a_tokenizer_that_is_not_qwen_s_is_a_tokenizer_error(folder: Path, name: str) -> None:
    """Turn markers that are no added tokens would be split into others in every row."""
    change_tokenizer(folder, CHANGED_TOKENIZERS[name])
    with pytest.raises(TokenizerError):
        probe_tokenizer(folder)


def test_native_code_without_end_is_ended(folder: Path, config: TrainingConfig) -> None:
    """A regular expression in the tokenizers library cannot be interrupted: the worker ends."""
    change_tokenizer(folder, CHANGED_TOKENIZERS["alternatives without end"])
    with pytest.raises(TokenizerError) as raised:
        try_tokenizer(config, folder)
    assert raised.value.next_command
    assert not list((Path(config.cache_dir) / "tokenizers").iterdir())


def test_a_tokenizer_that_has_passed_is_not_tried_again(
    folder: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one of its files changes."""
    started: list[str] = []
    run = tokenizer_trial.run_worker

    def counted(kind: str, *arguments: Any, **options: Any) -> Any:
        started.append(kind)
        return run(kind, *arguments, **options)

    monkeypatch.setattr(tokenizer_trial, "run_worker", counted)
    try_tokenizer(config, folder)
    try_tokenizer(config, Path(shutil.copytree(folder, folder.with_name("copy"))))
    assert len(started) == 1
    with pytest.raises(TokenizerError, match="was stopped"):
        try_tokenizer(config, with_template(folder, "{{ 'a' * 10 ** 10 }}"))
    assert len(started) == 2
    try_tokenizer(config, MODEL_DIR)  # ours
    assert len(started) == 2


@pytest.mark.parametrize("kind", ["auto_map", "link"])
def test_what_is_refused_by_its_files_starts_no_worker(
    folder: Path, config: TrainingConfig, kind: str
) -> None:
    """Code and links that lead out are found before."""
    if kind == "auto_map":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(TokenizerError, match="is refused"):
        try_tokenizer(config, folder)
    assert not Path(config.cache_dir).exists()


JOB = """
import sys
from pathlib import Path
from qwen3ft.chat import limits, probes

added = []
limits.limit_process = lambda *_: added.append(set(sys.modules))
from qwen3ft.worker.jobs import Job, tokenizer_job

tokenizer_job(Job(Path(sys.argv[1])))
print(sorted({name.partition(".")[0] for name in sys.modules if name not in added[0]}))
"""


@pytest.mark.slow
def test_no_package_is_imported_within_the_limits(tmp_path: Path) -> None:
    """Torch's build for CUDA maps more than they allow, and its import would fail."""
    job = JobDir(tmp_path / "job").create(TokenizerRequest(folder=str(MODEL_DIR)))
    command = [sys.executable, "-c", JOB, str(job.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() in {"[]", "['encodings']"}
