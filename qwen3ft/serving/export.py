"""Export an adapter merged into its base model, if it still answers like the tested adapter.

    <target>/
      merged/         safetensors in bfloat16, config and tokenizer, for transformers and vLLM
      adapter/        the adapter itself, for servers that take adapters
      model-*.gguf    the merged model for llama.cpp and Ollama, if asked for
      adapter.gguf    the adapter for a llama.cpp server that has its base model
      Modelfile       for Ollama, with GGUF, if the chat template is a known one
      SERVING.md      commands to serve it, and the comparison
      parity.json     scores of the forms of the model on held-out rows
      manifest.json   written last: sha256 of every file

The folder is written completely or not at all. Models are loaded by a worker only, within the
memory budget.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import require_disk, sha256_file
from qwen3ft.disk.manifests import build_folder, find_damage, read_manifest_facts, write_manifest
from qwen3ft.errors import DataLoadingError, ExportDriftError, RequestError
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.model.hub import fetch_model, resolve_model
from qwen3ft.model.saved_adapter import copy_adapter, find_base, open_adapter, require_fit
from qwen3ft.model.source_folder import check_model_folder
from qwen3ft.model.tokenizer_trial import try_tokenizer
from qwen3ft.records.model import ModelSource
from qwen3ft.records.requests import ExportLimits, ExportRequest, GgufType, ParityReport
from qwen3ft.serving.gguf_files import BASE_GGUF, require_gguf_packages
from qwen3ft.serving.instructions import write_serving_files
from qwen3ft.serving.merge import BYTES_PER_WEIGHT
from qwen3ft.serving.prompting import with_settings_of_the_run
from qwen3ft.text.commands import shell_line
from qwen3ft.text.names import flaw_of_name

logger = get_logger("export")

ROWS_FILE = "test.jsonl"
MERGED_FOLDER, ADAPTER_FOLDER, PARITY_FILE = "merged", "adapter", "parity.json"

EXPORT_SPARE_BYTES = 2**26
"""Disk needed beyond the weights: tokenizer, adapter and blocks of the file system."""

GGUF_BYTES_PER_WEIGHT = 4
"""Disk for GGUF: the merged model, and for the comparison the base model, both in bfloat16."""

EXPORT_KIND = "export"
"""Kind in an export's manifest: only such a folder is replaced by another export."""


def find_held_out(config: TrainingConfig, adapter: Path) -> Path:
    """Return the file of held-out rows that the adapter was tested on.

    That is the file that its inference test read, or else the cached data set with its digest.

    Raises:
        DataLoadingError: neither exists any more.
    """
    provenance = open_adapter(adapter).provenance
    digest = provenance["data"]["digest"]
    cached = sorted((Path(config.cache_dir) / "datasets").glob("*"))
    for folder in (*_folder_tested(config, provenance), *cached):
        facts = read_manifest_facts(folder)
        if facts.get("digest") == digest and find_damage(folder) is None:
            return folder / ROWS_FILE
    raise DataLoadingError(
        f"The held-out rows of run {provenance['run_id']} are no longer on this machine.",
        why=f"No data set with digest {digest[:16]} is in {Path(config.cache_dir) / 'datasets'}. "
        "The option --rows names others.",
        next_command="qwen3ft export --help",
        digest=digest,
    )


def _folder_tested(config: TrainingConfig, provenance: dict[str, Any]) -> list[Path]:
    run_id = str(provenance["run_id"])  # an adapter may come from anywhere
    request = RunDir(Path(config.runs_dir) / run_id).job("inference").request
    if flaw_of_name(run_id) or not request.is_file():
        return []
    return [Path(json.loads(request.read_text(encoding="utf-8"))["questions_path"]).parent]


def export_adapter(
    config: TrainingConfig,
    adapter: Path,
    target: Path,
    rows: Path,
    device: Literal["cuda", "cpu"],
    limits: ExportLimits | None = None,
    gguf: GgufType | None = None,
) -> ParityReport:
    """Write `adapter` merged into its base model to the folder `target`.

    Args:
        config: Budget and folders of this machine.
        adapter: A saved adapter.
        target: A new or empty folder, or an earlier export, which is replaced.
        rows: Held-out rows (jsonl) to compare on.
        device: Device of the worker.
        limits: Extent and limits of the comparison; the defaults if None.
        gguf: Also write GGUF files, with weights of this type.

    Raises:
        ExportDriftError: the merged model drifted past a limit; `target` is unchanged.
        ModelNotFoundError, SaveError: the adapter is missing, damaged, or cannot be merged.
        ModelUnavailableError: the 4-bit base that it was trained on is gone.
        EnvironmentNotReadyError: the disk is too full, or the packages for GGUF are missing.
        RequestError: `target` holds something else.
    """
    if gguf is not None:
        require_gguf_packages()
    opened = open_adapter(adapter)
    provenance = opened.provenance
    find_base(opened)
    try_tokenizer(config, adapter)  # it becomes that of the merged model
    _require_place(target)  # cheap refusals before a download of gigabytes
    base = _fetch_base(provenance)
    shape = check_model_folder(base)
    require_fit(opened, shape)
    require_disk(
        target,
        (2 if gguf is None else 2 + GGUF_BYTES_PER_WEIGHT) * shape.total_parameters
        + EXPORT_SPARE_BYTES,
        "The merged model",
        "The disk is too full; an earlier export is only removed once the new one is complete.",
    )
    scratch = Path(config.cache_dir).resolve() / "export"
    scratch.mkdir(parents=True, exist_ok=True)
    if gguf is not None:
        needed_bytes = BYTES_PER_WEIGHT * shape.total_parameters
        why = "The disk of the cache is too full; the comparison asks the adapter on this model."
        require_disk(scratch / BASE_GGUF, needed_bytes, "The base model as GGUF", why)
    job_folder = Path(tempfile.mkdtemp(dir=scratch))  # its own: exports may run in parallel
    reports: list[ParityReport] = []

    def fill(staging: Path) -> None:
        (staging / MERGED_FOLDER).mkdir()
        request = ExportRequest(
            config=with_settings_of_the_run(config, provenance),
            base=str(base),
            adapter=str(adapter.resolve()),
            quantization=provenance["base"]["quantization"],
            shape=shape,
            merged=str(staging / MERGED_FOLDER),
            gguf=gguf,
            rows_path=str(rows.resolve()),
            device=device,
            limits=limits or ExportLimits(),
        )
        job = JobDir(job_folder).create(request)
        report = run_worker("export", job, ParityReport, stall_seconds=config.stall_seconds)
        _require_parity(report, adapter)
        reports.append(report)
        write_record(staging / PARITY_FILE, report)
        copy_adapter(opened, staging / ADAPTER_FOLDER)
        write_manifest(staging / ADAPTER_FOLDER, read_manifest_facts(adapter))
        write_serving_files(staging, provenance, report, gguf)

    weights = sha256_file(adapter / ADAPTER_FILE)
    facts = {"kind": EXPORT_KIND, "run_id": provenance["run_id"], "adapter": weights}
    try:
        build_folder(target, fill, facts)
    finally:  # a worker that is killed leaves it, and it is as large as the model
        (job_folder / BASE_GGUF).unlink(missing_ok=True)
    shutil.rmtree(job_folder, ignore_errors=True)
    logger.info("exported the adapter of run %s to %s", provenance["run_id"], target)
    return reports[0]


def _fetch_base(provenance: dict[str, Any]) -> Path:
    """Return the folder of the unquantised base model, downloaded if it is not cached."""
    source = ModelSource.model_validate(
        {name: provenance["base"][name] for name in ModelSource.model_fields}
    )
    if source.local_path is not None:
        found = resolve_model(TrainingConfig(model_name=source.model_name))
        # Only a warning: the comparison will find out whether the change matters.
        if found.revision != source.revision:
            logger.warning("%s has changed since the adapter was trained", found.local_path)
        return fetch_model(found)
    return fetch_model(source)


def _require_place(target: Path) -> None:
    is_export = read_manifest_facts(target).get("kind") == EXPORT_KIND
    if target.exists() and not is_export and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(
            f"{target} is neither an empty folder nor an earlier export.",
            why="An export never replaces other files.",
            next_command=shell_line("ls", target),
        )


def _require_parity(report: ParityReport, adapter: Path) -> None:
    if objections := report.objections:
        raise ExportDriftError(
            f"The export is refused: {'; '.join(objections)}.",
            why="Merging, or quantising the result again, changed the tested model too much.",
            next_command=shell_line("qwen3ft", "chat", "--adapter", adapter),
            report=report.model_dump(mode="json"),
        )
