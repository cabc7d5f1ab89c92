"""The work on batches of rows that helpers share: keys and signatures, then token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.config import TrainingConfig
from qwen3ft.data.row_features import RowFeatures, features_of
from qwen3ft.data.row_table import BatchPlace, BatchReader
from qwen3ft.data.tokenizing import BatchTask, BatchTokenizer, TokenizedBatch
from qwen3ft.records.data import SourceFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BatchWork:
    """Reads batches of the row table and works on them.

    Args:
        path: File of the table; it may still grow.
        files: Files that its rows come from.
        tokenizer: Tokenizer with a chat template.
        config: Settings of the data stage.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[SourceFile],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
    ) -> None:
        self.reader = BatchReader(path, files)
        self._tokenizer = BatchTokenizer(self.reader, tokenizer, config)

    def features(self, place: BatchPlace) -> RowFeatures:
        """Return keys and signatures of the rows of a batch."""
        batch = self.reader.batch(place)
        return features_of(self.reader.as_rows(batch), batch.column("source").to_pylist())

    def tokens(self, task: BatchTask) -> TokenizedBatch:
        """Return the token ids of the rows of a batch; see `BatchTokenizer.tokens`."""
        return self._tokenizer.tokens(task)
