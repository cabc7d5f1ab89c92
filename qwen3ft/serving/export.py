"""An adapter merged into its base, as a folder to serve from, if it still is what was tested.

    <target>/
      merged/         safetensors in bfloat16, config and tokenizer: what transformers and vLLM load
      adapter/        the adapter itself, for servers that take adapters
      Modelfile       for Ollama, where the chat template is a known one
      SERVING.md      the commands, and what of all this was tested
      parity.json     what the three forms of the model make of held-out rows
      manifest.json   last: sha256 of every file

Guarantees: all or nothing, and nothing where the merged model drifted past its limits; disk is
looked at first; models are loaded by a worker alone, within the memory budget.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DataLoadingError, ExportDriftError, RequestError
from qwen3ft.files import build_folder, find_damage, read_manifest_facts, require_disk, sha256_file
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.logs import get_logger
from qwen3ft.model.hub import check_model_folder, fetch_model, resolve_model
from qwen3ft.model.saved_adapter import ADAPTER_FILE, check_adapter, find_base, read_provenance
from qwen3ft.records.model import ModelSource
from qwen3ft.records.requests import ExportLimits, ExportRequest, ParityReport
from qwen3ft.serving.instructions import write_serving_files

ROWS_FILE = "test.jsonl"


def find_held_out(config: TrainingConfig, adapter: Path) -> Path:
    """The file of the rows that no training of this adapter showed.

    That is the one its inference test read; without it, the one among the cached data sets that has
    the digest of the adapter's run card.

    Raises:
        DataLoadingError: neither is here.
    """
    card = read_provenance(adapter)
    digest = card["data"]["digest"]
    for folder in (*_folder_tested(config, card), *_cached_folders(config)):
        facts = read_manifest_facts(folder)
        if facts.get("digest") == digest and find_damage(folder) is None:
            return folder / ROWS_FILE
    raise DataLoadingError(
        f"The held-out rows of run {card['run_id']} are not on this machine any more.",
        why=f"No data set with digest {digest[:16]} is in {Path(config.cache_dir) / 'datasets'}.",
        next_command=f"qwen3ft export --adapter {adapter} --rows FILE.jsonl",
        digest=digest,
    )


def _folder_tested(config: TrainingConfig, card: dict[str, Any]) -> list[Path]:
    request = RunDir(Path(config.runs_dir) / card["run_id"]).job("inference").request
    if not request.is_file():
        return []
    return [Path(json.loads(request.read_text(encoding="utf-8"))["questions_path"]).parent]


def _cached_folders(config: TrainingConfig) -> list[Path]:
    return sorted((Path(config.cache_dir) / "datasets").glob("*"))


logger = get_logger("export")

MERGED_FOLDER, ADAPTER_FOLDER, PARITY_FILE = "merged", "adapter", "parity.json"

EXPORT_SPARE_BYTES = 2**26
"""Kept free beyond the weights: the tokenizer, the adapter and the file system's own blocks."""

EXPORT_KIND = "export"
"""Fact of an export's manifest: only such a folder is replaced by another export."""


def export_adapter(
    config: TrainingConfig,
    adapter: Path,
    target: Path,
    rows: Path,
    device: Literal["cuda", "cpu"],
    limits: ExportLimits | None = None,
) -> ParityReport:
    """Write `adapter` merged into its base model to the folder `target`.

    Args:
        config: Budget, limits and folders of this machine.
        adapter: A saved adapter.
        target: New, empty, or an earlier export, which is replaced.
        rows: Held-out rows (jsonl) to compare on.
        device: Where the worker computes.
        limits: Extent and limits of the comparison; the defaults if None.

    Raises:
        ExportDriftError: the merged model is not close enough; `target` is as it was.
        ModelNotFoundError, SaveError: the adapter is missing, damaged, or cannot be merged.
        ModelUnavailableError: the 4-bit base that it was trained on is gone.
        EnvironmentNotReadyError: the disk is too full.
        RequestError: `target` holds something else.
    """
    check_adapter(adapter)
    card = read_provenance(adapter)
    find_base(adapter)
    _require_place(target)
    base = _fetch_base(card)
    shape = check_model_folder(base)
    require_disk(
        target,
        2 * shape.total_parameters + EXPORT_SPARE_BYTES,
        "The merged model",
        "The disk is too full; an earlier export stays until the new one is there.",
    )
    scratch = Path(config.cache_dir).resolve() / "export"
    scratch.mkdir(parents=True, exist_ok=True)
    job_folder = Path(tempfile.mkdtemp(dir=scratch))  # its own: two exports may run side by side
    reports: list[ParityReport] = []

    def fill(staging: Path) -> None:
        (staging / MERGED_FOLDER).mkdir()
        request = ExportRequest(
            config=_asking_like_the_run(config, card),
            base=str(base),
            adapter=str(adapter.resolve()),
            quantization=card["base"]["quantization"],
            shape=shape,
            merged=str(staging / MERGED_FOLDER),
            rows_path=str(rows.resolve()),
            device=device,
            limits=limits or ExportLimits(),
        )
        job = JobDir(job_folder).create(request)
        report = run_worker("export", job, ParityReport, stall_seconds=config.stall_seconds)
        _require_parity(report, adapter)
        reports.append(report)
        write_record(staging / PARITY_FILE, report)
        shutil.copytree(adapter, staging / ADAPTER_FOLDER)
        write_serving_files(staging, card, report)

    weights = sha256_file(adapter / ADAPTER_FILE)
    build_folder(target, fill, {"kind": EXPORT_KIND, "run_id": card["run_id"], "adapter": weights})
    shutil.rmtree(job_folder, ignore_errors=True)
    logger.info("exported the adapter of run %s to %s", card["run_id"], target)
    return reports[0]


def _fetch_base(card: dict[str, Any]) -> Path:
    """The unquantised base model of the run card, downloaded if it is not cached.

    A local folder that changed since is used with a warning: whether that matters is what the
    comparison is there to find.
    """
    source = ModelSource.model_validate(
        {name: card["base"][name] for name in ModelSource.model_fields}
    )
    if source.local_path is not None:
        found = resolve_model(TrainingConfig(model_name=source.model_name))
        if found.revision != source.revision:
            logger.warning("%s changed since the adapter was trained", found.local_path)
        return fetch_model(found)
    return fetch_model(source)


def _asking_like_the_run(config: TrainingConfig, card: dict[str, Any]) -> TrainingConfig:
    """`config` with those settings of the run that say how it is asked."""
    asked = ("max_new_tokens", "special_tokens_in_text", "reasoning_separator")
    theirs = card["config"]
    return config.model_copy(update={name: theirs[name] for name in asked if name in theirs})


def _require_place(target: Path) -> None:
    is_export = read_manifest_facts(target).get("kind") == EXPORT_KIND
    if target.exists() and not is_export and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(
            f"{target} is no empty folder and no earlier export.",
            why="Only an export is replaced by another one.",
            next_command=f"ls {target}",
        )


def _require_parity(report: ParityReport, adapter: Path) -> None:
    if objections := report.objections:
        raise ExportDriftError(
            f"The export is refused: {'; '.join(objections)}.",
            why="Merging, or quantising the result again, changed the model that was tested.",
            next_command=f"qwen3ft chat --adapter {adapter}",
            report=report.model_dump(mode="json"),
        )
