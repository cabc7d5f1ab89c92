"""The first use of a tokenizer and chat template from elsewhere: in a worker, within limits.

It comes before anything else of a run. A tokenizer that has passed is not tried again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_file, sha256_json
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import AttemptError, PreemptedError, TokenizerError
from qwen3ft.jobs.folders import JobDir, write_record
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.model.hub import TOKENIZER_PATTERNS
from qwen3ft.model.source_folder import check_tokenizer_files
from qwen3ft.records.requests import TokenizerReport, TokenizerRequest

TRIAL_VERSION = 1
"""Increment when tokenizers that passed before must be tried again."""


def try_tokenizer(config: TrainingConfig, folder: Path) -> None:
    """Load the tokenizer in `folder` and render conversations, in a worker of its own.

    Raises:
        TokenizerError: it is refused or cannot be used, or it takes too much time or memory.
    """
    if folder == MODEL_DIR:
        return
    check_tokenizer_files(folder)
    trials = Path(config.cache_dir).resolve() / "tokenizers"
    digests = {p.name: sha256_file(p) for p in _files(folder)}
    passed = trials / f"{sha256_json([TRIAL_VERSION, digests])[:16]}.json"
    if passed.exists():
        return
    trials.mkdir(parents=True, exist_ok=True)
    job = JobDir(Path(tempfile.mkdtemp(dir=trials))).create(TokenizerRequest(folder=str(folder)))
    try:
        report = run_worker("tokenizer", job, TokenizerReport, stall_seconds=config.stall_seconds)
    except PreemptedError:
        raise
    except AttemptError as error:  # killed by a limit, out of memory, or by a fault in native code
        raise TokenizerError(
            f"The tokenizer in {folder} was stopped at its first use: {error.what}",
            why="Loading it and rendering a few conversations took too much time or memory.",
            next_command="qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507",
            folder=str(folder),
        ) from error
    finally:
        shutil.rmtree(job.path, ignore_errors=True)
    write_record(passed, report)


def _files(folder: Path) -> list[Path]:
    found = [path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)]
    return sorted(found)
