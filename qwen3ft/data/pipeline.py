"""The data stage: question-answer files in, tokenised rows on disk, every row accounted for.

Guarantees: `rows_read` is exactly the sum of the rows trained on, held out, quarantined, too long,
repeated and not used; no answer is ever cut. The same files and settings give the same rows in the
same order. Memory does not grow with the rows but for about 250 bytes each: texts and tokens go
through files. What the folder holds is said in `dataset_folder`.

Importing this module imports no torch, transformers or datasets: the flow's process uses it to find
out whether anything changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat import rendering as chat
from qwen3ft.config import TrainingConfig
from qwen3ft.data.advice import log_report, warnings_of
from qwen3ft.data.folder import (
    QUARANTINE,
    Prepared,
    account,
    check_not_empty,
    quarantine_beside,
    read_manifest,
    work_folder,
    write_folder,
)
from qwen3ft.data.known_rows import read_known_rows
from qwen3ft.data.placement import Fate, Placement, place_rows
from qwen3ft.data.reading import Reading, read_sources
from qwen3ft.data.row_table import RowTable
from qwen3ft.data.sources import Fingerprint, fingerprint_sources, resolve_sources
from qwen3ft.data.tokenizing import tokenize_table
from qwen3ft.files import sha256_file, sha256_json
from qwen3ft.logs import get_logger
from qwen3ft.model.hub import fetch_tokenizer, resolve_model
from qwen3ft.records.data import DatasetManifest, QaRow
from qwen3ft.records.model import ModelSnapshot

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import DataCollator, PreTrainedTokenizerBase

__all__ = ["DataPipeline", "dataset_target", "fingerprint_sources", "read_manifest"]

logger = get_logger("data")

CODE_VERSION = 3
"""Raised when the same files and settings give other rows than before: old folders are stale."""

SETTINGS_THAT_MATTER = (
    *("data_paths", "dev_paths", "test_paths", "columns", "reasoning_separator", "train_turns"),
    *("rows_without_reasoning", "special_tokens_in_text", "personal_data", "too_long"),
    *(
        "near_duplicates",
        "new_data",
        "replay_fraction",
        "max_rows",
        "max_rows_per_source",
        "held_out_fraction",
    ),
    *("max_bad_fraction", "allow_sample_data", "max_sequence_length", "is_embedded"),
)


def dataset_target(
    config: TrainingConfig,
    snapshot: ModelSnapshot,
    sources: Sequence[Fingerprint],
    known_rows: str | None = None,
) -> Path:
    """The folder for these files, tokenizer and data settings; the same ones, the same folder.

    Args:
        config: Its other settings (such as the learning rate) do not matter.
        snapshot: Its files, and with them the tokenizer and chat template, are part of the key.
        sources: As `fingerprint_sources` gives them.
        known_rows: File of the rows seen before, where new ones are to be told from them.
    """
    key = {
        "code": CODE_VERSION,
        "sources": [list(source) for source in sources],
        "template": snapshot.chat_template_sha256,
        "model": snapshot.manifest_sha256,
        "known": sha256_file(Path(known_rows)) if known_rows else None,
        "settings": _settings(config),
    }
    return Path(config.cache_dir) / "datasets" / sha256_json(key)[:16]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {name: values.get(name, getattr(config, name)) for name in SETTINGS_THAT_MATTER}


class DataPipeline:
    """From files to a `DatasetManifest`; the steps of the spec are public for use on small data."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the folder being prepared for, else of the config's model, fetched if need be.

        Raises:
            TokenizerError: it cannot be loaded or configured.
            RequestError, DownloadError: as `hub.resolve_model`.
        """
        if self._tokenizer is None:
            source = resolve_model(self._config)
            self._tokenizer = chat.load_tokenizer(fetch_tokenizer(source))
        return self._tokenizer

    def load_qa_data_from_files(self) -> list[QaRow]:
        """The usable rows of all files, before repeats are dropped and rows are held out.

        All of them at once: meant for small data. Bad rows are listed in
        `<cache_dir>/datasets/quarantine.jsonl`.

        Raises:
            DataLoadingError: no data, a missing path, no usable rows, or too many bad ones.
        """
        files, _ = resolve_sources(self._config)
        datasets = Path(self._config.cache_dir) / "datasets"
        with work_folder(datasets / "rows") as work:
            reading = read_sources(files, self._config, work, datasets / QUARANTINE)
            return [row for rows in RowTable(reading.rows_path, files).batches() for row in rows]

    def format_for_qwen(self, data: Sequence[QaRow]) -> Dataset:
        """Render rows with the chat template.

        Returns:
            Text columns `prompt` (what the last answer is given after) and `completion` (what is
            written there, up to and with the end token), and `row` (the row as JSON).

        Raises:
            TokenizerError: the template would train something else than inference asks for.
        """
        from qwen3ft.data.tokenizing import format_rows

        return format_rows(self.tokenizer, data)

    def tokenize_dataset(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids of rendered rows; rows over `max_sequence_length` are left out.

        Args:
            dataset: As `format_for_qwen` gives it.
            tokenizer: With the chat template that it was rendered by.

        Returns:
            Columns input_ids and trained (int32; start and end of each stretch that carries loss)
            and length (in tokens).
        """
        from qwen3ft.data.tokenizing import tokenize_formatted

        return tokenize_formatted(dataset, tokenizer, self._config)

    def create_data_collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        """What makes padded batches of tokenised rows; gives the tokenizer a padding token.

        Raises:
            TokenizerError: it has none that differs from the end token.
        """
        from qwen3ft.data.collators import PaddingCollator

        chat.configure_tokenizer(tokenizer)
        return PaddingCollator(int(tokenizer.pad_token_id))

    def prepare(
        self,
        snapshot: ModelSnapshot,
        target: Path,
        progress: Callable[[int], None] = lambda _: None,
        known_rows: str | None = None,
    ) -> DatasetManifest:
        """Do it all: the folder `target`, and the record of what is in it.

        Args:
            snapshot: Its folder holds the tokenizer.
            target: See `dataset_target`; replaced only once the new folder is complete.
            progress: Told a number of rows every few thousand of them, in every pass.
            known_rows: As for `dataset_target`; training rows are then new ones and a sample.

        Raises:
            DataLoadingError: no data, a missing path, too many bad rows, or nothing left for a
                split. The quarantine then lies beside `target` as `<name>.quarantine.jsonl`.
            TokenizerError: the tokenizer or its template cannot be used.
        """
        self._tokenizer = chat.load_tokenizer(snapshot.path)
        return self._build(target, progress, known_rows)

    def check(self, progress: Callable[[int], None] = lambda _: None) -> DatasetManifest:
        """What `prepare` would make for the config's model, found out with its tokenizer alone.

        Kept below `cache_dir`, so that a second look at unchanged data takes no time.

        Raises:
            DataLoadingError, TokenizerError: as `prepare`.
        """
        key = {
            "code": CODE_VERSION,
            "sources": [list(source) for source in fingerprint_sources(self._config)],
            "tokenizer": [self.tokenizer.name_or_path, str(self.tokenizer.chat_template)],
            "settings": _settings(self._config),
        }
        target = Path(self._config.cache_dir) / "checks" / sha256_json(key)[:16]
        return read_manifest(target) or self._build(target, progress)

    def _build(
        self, target: Path, progress: Callable[[int], None], known_rows: str | None = None
    ) -> DatasetManifest:
        files, degraded = resolve_sources(self._config)
        known = read_known_rows(Path(known_rows)) if known_rows else None
        with work_folder(target) as work:
            quarantine = quarantine_beside(target)
            reading = read_sources(files, self._config, work, quarantine, progress)
            table = RowTable(reading.rows_path, files)
            placement = place_rows(reading, table, self._config, known, progress)
            keys, tokenizer = reading.keys.build(), self.tokenizer
            tokens = tokenize_table(table, keys, placement, tokenizer, self._config, work, progress)
            limit_tokens = self._config.max_sequence_length
            prepared = Prepared(
                reading, table, placement, tokens, limit_tokens, known_rows, degraded
            )
            check_not_empty(prepared, target)
            prepared.warnings = warnings_of(prepared, self.tokenizer, self._config)
            manifest = account(prepared, target, self._digest(reading, placement))
            write_folder(target, manifest, prepared)
        log_report(manifest)
        return manifest

    def _digest(self, reading: Reading, placement: Placement) -> str:
        """sha256 over the rows used, the chat template and the settings that matter."""
        keys = reading.keys.build()
        digest = hashlib.sha256()
        for fate in (Fate.TRAIN, Fate.DEV, Fate.TEST):
            digest.update(fate.name.encode())
            digest.update(keys.content[placement.positions(fate)].tobytes())
        digest.update(str(self.tokenizer.chat_template).encode())
        digest.update(sha256_json(_settings(self._config)).encode())
        return digest.hexdigest()
