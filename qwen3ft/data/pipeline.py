"""From question-answer files to tokenised rows on disk, every row accounted for.

`rows_read` is exactly the sum of the rows trained on, held out, quarantined, too long, repeated and
not used; no answer is ever cut. The same files and settings give the same rows in the same order.
Memory grows by about 250 bytes a row: texts and tokens go through files (see `data.folder`).
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import identify_template
from qwen3ft.chat.tokenizer import configure_tokenizer, load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.data.advice import log_report, warnings_of
from qwen3ft.data.folder import (
    QUARANTINE,
    Prepared,
    account,
    only_builder,
    quarantine_beside,
    read_manifest,
    work_folder,
    write_folder,
)
from qwen3ft.data.known_rows import read_known_rows
from qwen3ft.data.placement import Fate, Placement, place_rows
from qwen3ft.data.reading import Reading, read_sources, rows_path
from qwen3ft.data.refusal import check_not_empty
from qwen3ft.data.row_features import RowFeatures
from qwen3ft.data.row_table import BatchPlace, BatchReader, RowTable
from qwen3ft.data.sources import SETTINGS_THAT_MATTER, resolved
from qwen3ft.data.tokenizing import BatchWork, tokenize_table
from qwen3ft.disk.files import private_files, sha256_file, sha256_json
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.helpers import start_helpers
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.logs import get_logger
from qwen3ft.model.hub import fetch_tokenizer, resolve_model
from qwen3ft.model.tokenizer_trial import try_tokenizer
from qwen3ft.records.data import DatasetManifest, QaRow, ResolvedSources
from qwen3ft.records.model import ModelSnapshot, ModelSource
from qwen3ft.records.requests import DataRequest
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollator, PreTrainedTokenizerBase

logger = get_logger("data")

# Raised when the same files and settings give other rows than before: old folders are then stale.
_CODE_VERSION = 6

_OBJECTS_PER_COLLECTION = 100_000
"""With Python's 700 the search took a seventh of the time that half a million short rows need."""

LEAST_BYTES_FOR_HELPERS = 4 * MIB
"""Size of the files, some ten thousand rows, from which on more than one process works on them."""


def dataset_target(
    sources: ResolvedSources, snapshot: ModelSnapshot, known_rows: str | None = None
) -> Path:
    """Return the folder for these files, this tokenizer and these data settings.

    Args:
        sources: Files and config; settings such as the learning rate do not matter.
        snapshot: Its model, which brings the tokenizer, and its template are part of the key.
        known_rows: File of the rows seen before, where new ones are to be told from them.
    """
    return _target(sources, snapshot.source, snapshot.chat_template_sha256, known_rows)


def _target(
    sources: ResolvedSources, model: ModelSource, template_sha256: str, known_rows: str | None
) -> Path:
    key = {
        "code": _CODE_VERSION,
        "sources": sources.fingerprints,
        # Not by the files of a snapshot: a look at data should not wait for quantising.
        "model": [model.model_name, model.revision],
        "template": template_sha256,
        "known": sha256_file(Path(known_rows)) if known_rows else None,
        "replay_seed": sources.config.seed if known_rows else None,
        "settings": _settings(sources.config),
    }
    return Path(sources.config.cache_dir) / "datasets" / sha256_json(key)[:16]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    # `is_embedded` is a property, which model_dump leaves out.
    return {name: values.get(name, getattr(config, name)) for name in SETTINGS_THAT_MATTER}


def _no_features(places: Iterable[BatchPlace]) -> Iterator[RowFeatures]:
    for _ in places:
        yield from ()


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let Python look for garbage rarely: rows refer to nothing that refers to them."""
    thresholds = gc.get_threshold()
    gc.set_threshold(_OBJECTS_PER_COLLECTION, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def make_dataset(
    sources: ResolvedSources,
    model: ModelSnapshot,
    run: RunDir,
    target: Path,
    known_rows: str | None = None,
) -> DatasetManifest:
    """Read and tokenise the rows into the folder `target`, in a worker.

    Raises:
        DataLoadingError, TokenizerError: as `DataPipeline.prepare`.
    """
    request = DataRequest(sources=sources, model=model, target=str(target), known_rows=known_rows)
    job = run.job("data").create(request)
    return run_worker("data", job, DatasetManifest, stall_seconds=sources.config.stall_seconds)


class DataPipeline:
    """From files to a `DatasetManifest`; its steps are public for use on small data."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the snapshot being prepared for, else of the config's model.

        Raises:
            TokenizerError: it cannot be loaded or configured.
            RequestError, DownloadError: as `hub.resolve_model`.
        """
        if self._tokenizer is None:
            folder = fetch_tokenizer(self._source)
            try_tokenizer(self._config, folder)
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    @cached_property
    def _source(self) -> ModelSource:
        return resolve_model(self._config)

    @private_files()
    def load_qa_data_from_files(self) -> list[QaRow]:
        """Return the usable rows of all files, before repeats are dropped and rows are held out.

        Holds all rows in memory. Bad rows are listed in `<cache_dir>/datasets/quarantine.jsonl`.

        Raises:
            DataLoadingError: no data, a missing path, no usable rows, or too many bad ones.
        """
        files = resolved(self._config).files
        datasets = Path(self._config.cache_dir) / "datasets"
        with work_folder(datasets / "rows") as work:
            reading = read_sources(files, self._config, work, datasets / QUARANTINE, _no_features)
            table = RowTable(BatchReader(rows_path(work), files), reading.places)
            return [row for _, rows in table.batches() for row in rows]

    def format_for_qwen(self, data: Sequence[QaRow]) -> Dataset:
        """Render rows with the chat template.

        Returns:
            Columns `segments` (the texts of a row, in order) and `trained` (which of them carry
            loss).

        Raises:
            TokenizerError: the template would train something else than inference asks for.
        """
        from qwen3ft.data.tokenizing import format_rows

        return format_rows(self.tokenizer, data)

    def tokenize_dataset(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokenise rendered rows; rows over `max_sequence_length` are left out.

        Args:
            dataset: Result of `format_for_qwen`.
            tokenizer: Tokenizer with the chat template that it was rendered by.

        Returns:
            Columns input_ids and trained (int32; start and end of each stretch that carries loss)
            and length (in tokens).
        """
        from qwen3ft.data.tokenizing import tokenize_formatted

        return tokenize_formatted(dataset, tokenizer, self._config)

    def create_data_collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        """Return the collator of padded batches; gives the tokenizer a padding token.

        Raises:
            TokenizerError: no token differs from the end token.
        """
        from qwen3ft.data.collators import PaddingCollator

        configure_tokenizer(tokenizer)
        return PaddingCollator(int(tokenizer.pad_token_id))

    @private_files()
    def prepare(
        self,
        snapshot: ModelSnapshot,
        target: Path,
        progress: Callable[[int], None] = lambda _: None,
        known_rows: str | None = None,
        sources: ResolvedSources | None = None,
    ) -> DatasetManifest:
        """Read, check, place and tokenise the rows into the folder `target`.

        Args:
            snapshot: Model whose folder holds the tokenizer.
            target: Folder of `dataset_target`; replaced once the new one is complete.
            progress: Receives a number of rows every few thousand rows of every pass.
            known_rows: As for `dataset_target`; training rows are then new ones and a sample.
            sources: The files, if they have been resolved already.

        Raises:
            DataLoadingError: no data, a missing path, a file that has changed, too many bad rows,
                or nothing left for a split. The quarantine then lies beside `target` as
                `<name>.quarantine.jsonl`.
            TokenizerError: the tokenizer or its template cannot be used.
        """
        self._tokenizer = load_tokenizer(snapshot.path)
        return self._build(sources or resolved(self._config), target, progress, known_rows)

    @private_files()
    def check(self, progress: Callable[[int], None] = lambda _: None) -> DatasetManifest:
        """Return what `prepare` makes, by the tokenizer of the config's model alone.

        A second look at unchanged data, or a run on it, finds the folder and takes no time.

        Raises:
            DataLoadingError, TokenizerError: as `prepare`.
        """
        sources = resolved(self._config)
        tokenizer = self.tokenizer
        template = identify_template(tokenizer).sha256
        target = _target(sources, self._source, template, None)
        return read_manifest(target) or self._build(sources, target, progress)

    def _build(
        self,
        sources: ResolvedSources,
        target: Path,
        progress: Callable[[int], None],
        known_rows: str | None = None,
    ) -> DatasetManifest:
        files, config, tokenizer = sources.files, self._config, self.tokenizer
        known = read_known_rows(Path(known_rows)) if known_rows else None
        with ExitStack() as stack:
            stack.enter_context(_few_collections())
            waited = stack.enter_context(only_builder(target, lambda: progress(0)))
            if waited and (made := read_manifest(target)):
                return made
            folder = stack.enter_context(work_folder(target))
            work = BatchWork(rows_path(folder), files, tokenizer, config)
            size_bytes = sum(file.size_bytes for file in files)
            helpers = stack.enter_context(
                start_helpers(work, wanted=size_bytes >= LEAST_BYTES_FOR_HELPERS, phase="data")
            )
            features_of = partial(helpers.map, work.features)
            reading = read_sources(
                files, config, folder, quarantine_beside(target), features_of, progress
            )
            table, keys = RowTable(work.reader, reading.places), reading.keys.build()
            placement = place_rows(reading, table, config, known)
            reading.near.clear()
            tokens_of = partial(helpers.map, work.tokens)
            tokens = tokenize_table(table, keys, placement, tokens_of, config, folder, progress)
            helpers.end()
            limit_tokens = config.max_sequence_length
            prepared = Prepared(
                *(reading, table, placement, tokens, limit_tokens, known_rows),
                *(sources.degraded, sources.skipped),
            )
            check_not_empty(prepared, config)
            prepared.warnings = warnings_of(prepared, tokenizer, config)
            manifest = account(prepared, target, self._digest(reading, placement))
            write_folder(target, manifest, prepared)
        log_report(manifest)
        return manifest

    def _digest(self, reading: Reading, placement: Placement) -> str:
        """Return the sha256 over the rows used, the chat template and the settings that matter."""
        # Over rows, not files: a checkpoint may go on with the same rows from other files.
        keys = reading.keys.build()
        digest = hashlib.sha256()
        for fate in (Fate.TRAIN, Fate.DEV, Fate.TEST):
            digest.update(fate.name.encode())
            digest.update(keys.content[placement.positions(fate)].tobytes())
        digest.update(str(self.tokenizer.chat_template).encode())
        digest.update(sha256_json(_settings(self._config)).encode())
        return digest.hexdigest()
