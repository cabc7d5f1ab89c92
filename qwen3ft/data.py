"""The data stage: question-answer files in, tokenised rows on disk, every row accounted for.

Guarantees: `rows_read` is exactly the sum of the rows trained on, held out, quarantined, too long,
repeated and not used; no row is ever cut. The same files and settings give the same rows in the
same order. What the folder holds is said in `dataset_folder`.

Importing this module imports no torch, transformers or datasets: the flow's process uses it to find
out whether anything changed. It does not cover conversations of several turns, nor data sets larger
than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft import chat
from qwen3ft.config import TrainingConfig
from qwen3ft.dataset_folder import (
    QUARANTINE,
    Prepared,
    Tokenized,
    account,
    check_not_empty,
    quarantine_beside,
    read_manifest,
    report,
    write_folder,
)
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.logs import get_logger
from qwen3ft.reading import read_sources
from qwen3ft.records import DatasetManifest, ModelSnapshot
from qwen3ft.rows import QaRow
from qwen3ft.sources import Fingerprint, Role, fingerprint_sources, resolve_sources
from qwen3ft.splits import HELD_OUT_ROLES, drop_repeats, hold_out
from qwen3ft.storage import sha256_json

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataPipeline",
    "PaddingCollator",
    "dataset_target",
    "fingerprint_sources",
    "read_manifest",
]

logger = get_logger("data")

CODE_VERSION = 1
"""Raised when the same files and settings give other rows than before: old folders are stale."""

CHUNK_ROWS = 2000
"""Rows rendered and tokenised at a time; bounds the text and token lists held beside the rows."""

SETTINGS_THAT_MATTER = (
    *("data_paths", "dev_paths", "test_paths", "question_field", "answer_field"),
    *("reasoning_separator", "max_rows", "held_out_fraction", "max_bad_fraction"),
    *("allow_sample_data", "max_sequence_length", "is_embedded"),
)


def dataset_target(
    config: TrainingConfig, snapshot: ModelSnapshot, sources: Sequence[Fingerprint]
) -> Path:
    """The folder for these files, tokenizer and data settings; the same ones, the same folder.

    Args:
        config: Its other settings (such as the learning rate) do not matter.
        snapshot: Its files, and with them the tokenizer and chat template, are part of the key.
        sources: As `fingerprint_sources` gives them.
    """
    key = {
        "code": CODE_VERSION,
        "sources": [list(source) for source in sources],
        "template": snapshot.chat_template_sha256,
        "model": snapshot.manifest_sha256,
        "settings": _settings(config),
    }
    return Path(config.cache_dir) / "datasets" / sha256_json(key)[:16]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS_THAT_MATTER}


@dataclass(frozen=True)
class PaddingCollator:
    """Makes a batch of rows: padded on the right, labels with -100, and an attention mask."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64, of the shape (rows, longest row)."""
        import torch

        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, chat.IGNORED_LABEL)
        mask = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.as_tensor(row["input_ids"])
            labels[index, :length] = torch.as_tensor(row["labels"])
            mask[index, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class DataPipeline:
    """From files to a `DatasetManifest`; the steps are public because each is of use alone."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the snapshot being prepared for, else of the config's model (local or cached).

        Raises:
            TokenizerError: it cannot be loaded or configured.
        """
        if self._tokenizer is None:
            name = MODEL_DIR if self._config.is_embedded else self._config.model_name
            self._tokenizer = chat.load_tokenizer(name)
        return self._tokenizer

    def load_qa_data_from_files(self) -> list[QaRow]:
        """The usable rows of all files, before repeats are dropped and rows are held out.

        Bad rows are listed in `<cache_dir>/datasets/quarantine.jsonl`.

        Raises:
            DataLoadingError: no data, a missing path, no usable rows, or too many bad ones.
        """
        files, _ = resolve_sources(self._config)
        quarantine = Path(self._config.cache_dir) / "datasets" / QUARANTINE
        return read_sources(files, self._config, quarantine).rows

    def format_for_qwen(self, data: Sequence[QaRow]) -> Dataset:
        """Render rows with the chat template: text columns `prompt` and `completion`.

        Raises:
            TokenizerError: the template would train something else than inference asks for.
        """
        from datasets import Dataset

        rendered = [
            chat.render_row(self.tokenizer, row["question"], row["answer"], row["reasoning"])
            for row in data
        ]
        return Dataset.from_dict(
            {
                "prompt": [row.prompt for row in rendered],
                "completion": [row.completion for row in rendered],
            }
        )

    def tokenize_dataset(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Token ids and labels of rendered rows; rows over `max_sequence_length` are left out.

        Returns:
            Columns input_ids and labels (int32, labels -100 over the prompt), length and
            prompt_length (in tokens).
        """
        return self._tokenize(dataset, tokenizer).dataset

    def create_data_collator(self, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
        """What makes batches of tokenised rows; the tokenizer gets a padding token if need be.

        Raises:
            TokenizerError: it has none that differs from the end token.
        """
        chat.configure_tokenizer(tokenizer)
        return PaddingCollator(int(tokenizer.pad_token_id))

    def prepare(
        self,
        snapshot: ModelSnapshot,
        target: Path,
        progress: Callable[[int], None] = lambda _: None,
    ) -> DatasetManifest:
        """Do it all: the folder `target`, and the record of what is in it.

        Args:
            snapshot: Its folder holds the tokenizer.
            target: See `dataset_target`; replaced only once the new folder is complete.
            progress: Told the number of rows tokenised, every `CHUNK_ROWS` rows.

        Raises:
            DataLoadingError: no data, a missing path, too many bad rows, or nothing left for a
                split. The quarantine then lies beside `target` as `<name>.quarantine.jsonl`.
            TokenizerError: the tokenizer or its template cannot be used.
        """
        self._tokenizer = chat.load_tokenizer(snapshot.path)
        files, degraded = resolve_sources(self._config)
        reading = read_sources(files, self._config, quarantine_beside(target))
        rows, repeats = drop_repeats(reading.rows)
        tokenized = self._tokenize_all(rows, progress)
        given = {file.role for file in files}
        splits = self._split(rows, tokenized.kept, [r for r in HELD_OUT_ROLES if r not in given])
        prepared = Prepared(reading, rows, repeats, tokenized, *splits, degraded=degraded)
        check_not_empty(prepared, target, self._config.max_sequence_length)
        manifest = account(prepared, target, self._digest(prepared))
        write_folder(target, manifest, prepared)
        report(manifest, tokenized.too_long)
        return manifest

    def _tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
        from datasets import Dataset, Features, List, Value

        texts = dataset[:]
        limit = self._config.max_sequence_length
        columns: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "length", "prompt_length")
        }
        kept: list[int] = []
        too_long: dict[int, int] = {}
        for position, (prompt, completion) in enumerate(
            chat.encode_pairs(tokenizer, texts["prompt"], texts["completion"])
        ):
            length = len(prompt) + len(completion)
            if length > limit or not completion:
                too_long[position] = length
                continue
            kept.append(position)
            columns["input_ids"].append(prompt + completion)
            columns["labels"].append([chat.IGNORED_LABEL] * len(prompt) + completion)
            columns["length"].append(length)
            columns["prompt_length"].append(len(prompt))
        tokens, count = List(Value("int32")), Value("int32")
        features = Features(input_ids=tokens, labels=tokens, length=count, prompt_length=count)
        return Tokenized(Dataset.from_dict(columns, features=features), kept, too_long)

    def _tokenize_all(self, rows: Sequence[QaRow], progress: Callable[[int], None]) -> Tokenized:
        """Render and tokenise a chunk at a time, so that only ids are held for all rows."""
        from datasets import concatenate_datasets

        if any(row["reasoning"] for row in rows) and not chat.writes_reasoning(self.tokenizer):
            logger.warning("the chat template writes no reasoning: only the answers are trained")
        parts: list[Dataset] = []
        kept: list[int] = []
        too_long: dict[int, int] = {}
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            part = self._tokenize(self.format_for_qwen(chunk), self.tokenizer)
            parts.append(part.dataset)
            kept += [start + position for position in part.kept]
            too_long |= {start + position: size for position, size in part.too_long.items()}
            progress(start + len(chunk))
        return Tokenized(concatenate_datasets(parts), kept, too_long)

    def _split(
        self, rows: Sequence[QaRow], kept: Sequence[int], missing: Sequence[Role]
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Positions of the rows for train, dev and test, and of those that `max_rows` leaves."""
        places: dict[Role, list[int]] = {"train": [], "dev": [], "test": []}
        for position in kept:
            places[rows[position]["role"]].append(position)
        candidates, places["train"] = places["train"], []
        questions = [rows[position]["question"] for position in candidates]
        homes = hold_out(questions, self._config.held_out_fraction, missing)
        for position, role in zip(candidates, homes, strict=True):
            places[role].append(position)
        used = places["train"][: self._config.max_rows]
        return used, places["dev"], places["test"], places["train"][len(used) :]

    def _digest(self, prepared: Prepared) -> str:
        """sha256 over the rows used, the chat template and the settings that matter."""
        digest = hashlib.sha256()
        for name in ("train", "dev", "test"):
            for position in getattr(prepared, name):
                row = prepared.rows[position]
                digest.update(sha256_json([name, row["question"], row["answer"]]).encode())
                digest.update(sha256_json([row["reasoning"], row["kind"]]).encode())
        digest.update(str(self.tokenizer.chat_template).encode())
        digest.update(sha256_json(_settings(self._config)).encode())
        return digest.hexdigest()
