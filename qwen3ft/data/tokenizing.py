"""Tokenising of placed rows into files, a batch at a time.

An answer or an end token is never cut. A row that is too long, or in which nothing carries loss, is
not written, and its fate says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3ft.chat import rendering as chat
from qwen3ft.config import TrainingConfig
from qwen3ft.data.placement import Fate, Placement
from qwen3ft.data.row_table import RowTable
from qwen3ft.data.splits import Keys
from qwen3ft.data.token_table import Origin, TokenWriter
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import LengthSummary, QaRow

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SPLITS = {Fate.TRAIN: "train", Fate.DEV: "dev"}
# Test rows are asked as texts, but those that are too long are left out like all others.
_TOKENIZED = (Fate.TRAIN, Fate.DEV, Fate.TEST)

# More than the card shows, so that a secret at the end of what is shown is recognised as one.
_QUESTION_CHARACTERS = 400


@dataclass(frozen=True)
class Tokens:
    """Lengths of the tokenised rows."""

    train: LengthSummary
    dev: LengthSummary
    lengths: np.ndarray
    """Tokens of each usable row, 0 where it was not tokenised; int32, shape (rows,)."""
    bounded: np.ndarray
    """Rows that are too long by their bytes alone: their length is the least that it can be. Bool,
    shape (rows,)."""
    shortened: int


def tokenize_table(
    table: RowTable,
    keys: Keys,
    placement: Placement,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    folder: Path,
    progress: Callable[[int], None],
) -> Tokens:
    """Write train.arrow and dev.arrow into `folder`; rows left out get their fate in `placement`.

    Raises:
        DataLoadingError: rows are too long, and `too_long` is 'fail'.
        TokenizerError: the template cannot be used.
    """
    with ExitStack() as stack:
        writers = {
            fate: stack.enter_context(TokenWriter(folder / f"{split}.arrow"))
            for fate, split in _SPLITS.items()
        }
        work = _Work(keys, placement, tokenizer, config, writers)
        for start, rows in table.batches():
            work.batch(start, rows)
            progress(start + len(rows))
    # Only after all rows, so that the error can name their number and the longest.
    too_long = placement.count(Fate.TOO_LONG)
    if too_long and config.too_long == "fail":
        longest, is_bound = int(work.lengths.max()), bool(work.bounded.any())
        setting = "too_long=drop" if is_bound else f"max_sequence_length={longest}"
        raise DataLoadingError(
            f"{too_long} rows are longer than {config.max_sequence_length} tokens, the longest "
            f"{'at least ' * is_bound}{longest}.",
            why="too_long is 'fail'; 'drop' would leave them out.",
            next_command=f"qwen3ft train --set {setting}",
            too_long=too_long,
            longest_tokens=longest,
        )
    train, dev = (writers[fate].summary() for fate in _SPLITS)
    return Tokens(train, dev, work.lengths, work.bounded, work.shortened)


@dataclass
class _Work:
    """State between batches."""

    keys: Keys
    placement: Placement
    tokenizer: PreTrainedTokenizerBase
    config: TrainingConfig
    writers: dict[Fate, TokenWriter]
    trained_rows: int = 0
    shortened: int = 0
    lengths: np.ndarray = field(init=False)
    bounded: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.zeros(len(self.placement.fates), np.int32)
        self.bounded = np.zeros(len(self.placement.fates), bool)

    def batch(self, start: int, rows: Sequence[QaRow]) -> None:
        """Tokenise the rows that are used; `start` is the position of the first one."""
        fates = self.placement.fates[start : start + len(rows)]
        # Rows beyond `max_rows` are not even tokenised.
        if self.trained_rows == self.config.max_rows:
            fates[fates == Fate.TRAIN] = Fate.NOT_USED
        used = np.flatnonzero(np.isin(fates, _TOKENIZED)).tolist()
        limit = self.config.max_sequence_length
        over = {index: chat.tokens_over(self.tokenizer, rows[index], limit) for index in used}
        fitting = iter(self._tokenize([rows[index] for index in used if not over[index]]))
        batches: dict[Fate, list[tuple[chat.TokenizedRow, Origin]]]
        batches = {fate: [] for fate in self.writers}
        for index in used:
            row = None if over[index] else next(fitting)
            length = over[index] if row is None else len(row)
            self.lengths[start + index] = length
            self.bounded[start + index] = row is None
            if row is None or length > limit:
                row = self._shorten(rows[index])
                if row is None:
                    fates[index] = Fate.TOO_LONG
                    continue
                self.shortened += 1
            if not row.trained:
                fates[index] = Fate.NO_TRAINED_TOKEN
                continue
            if fates[index] == Fate.TRAIN:
                if self.trained_rows == self.config.max_rows:
                    fates[index] = Fate.NOT_USED
                    continue
                self.trained_rows += 1
            if (fate := Fate(int(fates[index]))) in batches:
                batches[fate].append((row, self._origin(start + index, rows[index])))
        for fate, kept in batches.items():
            self.writers[fate].write([row for row, _ in kept], [origin for _, origin in kept])

    def _origin(self, position: int, row: QaRow) -> Origin:
        return Origin(
            int(self.keys.content[position, 0]),
            int(self.keys.source[position]),
            row["question"][:_QUESTION_CHARACTERS],
        )

    def _tokenize(self, rows: Sequence[QaRow]) -> list[chat.TokenizedRow]:
        return chat.tokenize_rows(
            self.tokenizer,
            rows,
            train_turns=self.config.train_turns,
            escape=self.config.special_tokens_in_text == "escape",
        )

    def _shorten(self, row: QaRow) -> chat.TokenizedRow | None:
        if self.config.too_long != "shorten_reasoning" or not row["reasoning"]:
            return None
        limit = self.config.max_sequence_length
        escape = self.config.special_tokens_in_text == "escape"
        shorter = chat.shorten_reasoning(self.tokenizer, row, limit, escape=escape)
        if shorter is None:
            return None
        [tokenized] = self._tokenize([shorter])
        return tokenized if len(tokenized) <= limit else None


def format_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[QaRow]) -> Dataset:
    """Render rows into the columns of `DataPipeline.format_for_qwen`."""
    from datasets import Dataset, Features, List, Value

    rendered = [chat.render_row(tokenizer, row) for row in rows]
    columns = {
        "segments": [[segment.text for segment in segments] for segments in rendered],
        "trained": [[segment.trained for segment in segments] for segments in rendered],
    }
    features = Features(segments=List(Value("string")), trained=List(Value("bool")))
    return Dataset.from_dict(columns, features=features)


def tokenize_formatted(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig
) -> Dataset:
    """Tokenise the result of `format_rows`; see `DataPipeline.tokenize_dataset`."""
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[Any]] = {"input_ids": [], "trained": [], "length": []}
    for row in dataset:
        ids: list[int] = []
        edges: list[int] = []
        parts = chat.encode_texts(tokenizer, row["segments"])
        for part, trained in zip(parts, row["trained"], strict=True):
            if trained:
                edges += [len(ids), len(ids) + len(part)]
            ids += part
        if edges and len(ids) <= config.max_sequence_length:
            columns["input_ids"].append(ids)
            columns["trained"].append(edges)
            columns["length"].append(len(ids))
    tokens, count = List(Value("int32")), Value("int32")
    features = Features(input_ids=tokens, trained=tokens, length=count)
    return Dataset.from_dict(columns, features=features)
