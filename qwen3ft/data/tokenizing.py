"""Tokenising of placed rows into files, a batch at a time.

An answer or an end token is never cut. A row that is too long, or in which nothing carries loss, is
not written, and its fate says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen3ft.chat import rendering as chat
from qwen3ft.config import TrainingConfig
from qwen3ft.data.placement import Fate, Placement
from qwen3ft.data.row_features import RowFeatures, features_of
from qwen3ft.data.row_table import BatchPlace, BatchReader, RowTable
from qwen3ft.data.sources import command_to_check
from qwen3ft.data.splits import Codes, Hashes, Keys, Mask
from qwen3ft.data.token_table import Origin, TokenWriter, token_batch
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import LengthSummary, QaRow, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKEN_SPLITS = {Fate.TRAIN: "train", Fate.DEV: "dev"}
"""Splits whose token ids are stored."""
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


class BatchTask(NamedTuple):
    """A batch of the row table to be tokenised."""

    place: BatchPlace
    fates: Codes
    """`Fate` of each row; those that are used get tokens."""
    hashes: Hashes
    """`Origin.hash` of each row."""


class TokenizedBatch(NamedTuple):
    """Token ids of a batch, and what became of its rows; all arrays have one entry a row."""

    fates: Codes
    """As in the task, but for rows that are too long or would not be trained."""
    lengths: NDArray[np.int32]
    """Tokens before anything was shortened; 0 where the row was not tokenised."""
    bounded: Mask
    """As `Tokens.bounded`."""
    shortened: Mask
    splits: dict[str, pa.RecordBatch]
    """Rows of each split of `TOKEN_SPLITS` that has any, by its name, as of `token_batch`."""


TokensOf = Callable[[Iterable[BatchTask]], Iterator[TokenizedBatch]]
"""Returns each batch tokenised, in order."""


def tokenize_table(
    table: RowTable,
    keys: Keys,
    placement: Placement,
    tokens_of: TokensOf,
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
            split: stack.enter_context(TokenWriter(folder / f"{split}.arrow"))
            for split in TOKEN_SPLITS.values()
        }
        work = _Work(table, keys, placement, config.max_rows, writers)
        for place, batch in zip(table.places, tokens_of(work.tasks()), strict=True):
            work.take(place, batch)
            progress(place.start + place.rows)
    # Only after all rows, so that the error can name their number and the longest.
    too_long = placement.count(Fate.TOO_LONG)
    if too_long and config.too_long == "fail":
        longest, is_bound = int(work.lengths.max()), bool(work.bounded.any())
        change = {"too_long": "drop"} if is_bound else {"max_sequence_length": longest}
        raise DataLoadingError(
            f"{too_long} rows are longer than {config.max_sequence_length} tokens, the longest "
            f"{'at least ' * is_bound}{longest}.",
            why="too_long is 'fail'; 'drop' would leave them out.",
            next_command=command_to_check(config, **change),
            too_long=too_long,
            longest_tokens=longest,
        )
    train, dev = (writers[split].summary() for split in TOKEN_SPLITS.values())
    return Tokens(train, dev, work.lengths, work.bounded, work.shortened)


@dataclass
class _Work:
    """State between batches."""

    table: RowTable
    keys: Keys
    placement: Placement
    most_rows: int | None
    writers: dict[str, TokenWriter]
    trained_rows: int = 0
    shortened: int = 0
    lengths: np.ndarray = field(init=False)
    bounded: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.zeros(len(self.placement.fates), np.int32)
        self.bounded = np.zeros(len(self.placement.fates), np.bool_)

    def tasks(self) -> Iterator[BatchTask]:
        """Yield all batches to be tokenised."""
        for place in self.table.places:
            rows = slice(place.start, place.start + place.rows)
            self._cap(rows)
            yield BatchTask(place, self.placement.fates[rows], self.keys.content[rows, 0])

    def _cap(self, rows: slice) -> None:
        # Rows beyond `max_rows` are not even tokenised.
        fates = self.placement.fates[rows]
        if self.trained_rows == self.most_rows:
            fates[fates == Fate.TRAIN] = Fate.NOT_USED

    def take(self, place: BatchPlace, batch: TokenizedBatch) -> None:
        """Write the tokens of a batch."""
        rows = slice(place.start, place.start + place.rows)
        self._cap(rows)  # again: batches are tokenised ahead
        fates, train = self.placement.fates[rows], TOKEN_SPLITS[Fate.TRAIN]
        used = np.isin(fates, _TOKENIZED)
        self.lengths[rows] = np.where(used, batch.lengths, 0)
        self.bounded[rows] = used & batch.bounded
        self.shortened += int(batch.shortened[used].sum())
        fates[used] = batch.fates[used]
        trained = np.flatnonzero(fates == Fate.TRAIN)
        if self.most_rows is not None:
            fates[trained[self.most_rows - self.trained_rows :]] = Fate.NOT_USED
            trained = trained[: self.most_rows - self.trained_rows]
        self.trained_rows += len(trained)
        for split, content in batch.splits.items():
            kept = content.slice(0, len(trained)) if split == train else content
            if kept.num_rows:
                self.writers[split].write(kept)


class BatchWork:
    """Work on batches of the row table, which helpers share: features, then token ids.

    Args:
        path: File of the table; it may still grow.
        files: Files that its rows come from.
        tokenizer: Tokenizer with a chat template.
        config: What is trained, how long a row may be, and what happens to longer ones.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[SourceFile],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
    ) -> None:
        self.reader = BatchReader(path, files)
        self._tokenizer, self._config = tokenizer, config

    def features(self, place: BatchPlace) -> RowFeatures:
        """Return keys and signatures of the rows of a batch."""
        batch = self.reader.batch(place)
        return features_of(self.reader.as_rows(batch), batch.column("source").to_pylist())

    def tokens(self, task: BatchTask) -> TokenizedBatch:
        """Tokenise the rows of a batch that are used.

        Raises:
            TokenizerError: the template cannot be used.
        """
        fates, count = task.fates.copy(), len(task.fates)
        lengths, (bounded, shortened) = np.zeros(count, np.int32), np.zeros((2, count), np.bool_)
        used = np.flatnonzero(np.isin(fates, _TOKENIZED))
        batch = self.reader.batch(task.place)
        sources = batch.column("source").to_numpy()
        rows = self.reader.as_rows(batch if len(used) == count else batch.take(used))
        kept: dict[str, list[tuple[chat.TokenizedRow, Origin]]]
        kept = {split: [] for split in TOKEN_SPLITS.values()}
        limit = self._config.max_sequence_length
        over = [chat.tokens_over(self._tokenizer, row, limit) for row in rows]
        fitting = iter(
            self._tokenize([row for row, is_over in zip(rows, over, strict=True) if not is_over])
        )
        for index, row, least_tokens in zip(used.tolist(), rows, over, strict=True):
            tokenized = None if least_tokens else next(fitting)
            lengths[index] = length = least_tokens if tokenized is None else len(tokenized)
            bounded[index] = tokenized is None
            if tokenized is None or length > limit:
                tokenized = self._shorten(row)
                if tokenized is None:
                    fates[index] = Fate.TOO_LONG
                    continue
                shortened[index] = True
            if not tokenized.trained:
                fates[index] = Fate.NO_TRAINED_TOKEN
            elif split := TOKEN_SPLITS.get(Fate(fates[index])):
                question = row["question"][:_QUESTION_CHARACTERS]
                origin = Origin(int(task.hashes[index]), int(sources[index]), question)
                kept[split].append((tokenized, origin))
        splits = {
            split: token_batch([row for row, _ in pairs], [origin for _, origin in pairs])
            for split, pairs in kept.items()
            if pairs
        }
        return TokenizedBatch(fates, lengths, bounded, shortened, splits)

    def _tokenize(self, rows: Sequence[QaRow]) -> list[chat.TokenizedRow]:
        return chat.tokenize_rows(
            self._tokenizer,
            rows,
            train_turns=self._config.train_turns,
            escape=self._config.special_tokens_in_text == "escape",
        )

    def _shorten(self, row: QaRow) -> chat.TokenizedRow | None:
        if self._config.too_long != "shorten_reasoning" or not row["reasoning"]:
            return None
        limit = self._config.max_sequence_length
        escape = self._config.special_tokens_in_text == "escape"
        shorter = chat.shorten_reasoning(self._tokenizer, row, limit, escape=escape)
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
