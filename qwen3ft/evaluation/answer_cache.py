"""Cache of answers and losses by model and question, so that no run asks the same twice.

    <cache_dir>/answers/<key of the model>.jsonl      one `CachedAnswer` per line

An answer is found again only for the same weights, question, reference and settings. Files are
replaced atomically; one that cannot be read or written costs time and nothing else. A new answer
need not be bit-identical to a cached one, because padding depends on the rest of its batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen3ft.disk.files import sha256_json, write_bytes_atomic
from qwen3ft.evaluation.answer_loss import RowLoss
from qwen3ft.evaluation.answers import Generated
from qwen3ft.logs import get_logger
from qwen3ft.records.base import Record

logger = get_logger("answer_cache")

ANSWER_VERSION = 2
"""Part of the key; raise it when the same model and question give another answer or loss."""

MAX_ANSWERS = 5000
"""Most answers kept for one model: those of this run, then the newest of the others."""

MAX_MODELS = 16

_NOT_PART_OF_THE_QUESTION = ("split", "kind", "group")


class CachedAnswer(Record):
    """One answer with the loss of its reference; `text` is None if only the loss was asked for."""

    key: str
    text: str | None = None
    stopped: bool = False
    tokens: int = 0
    thinking_cut: bool = False
    loss_nats: float | None
    loss_tokens: int

    @property
    def generated(self) -> Generated:
        """The answer as `answer_questions` returned it."""
        return Generated(self.text or "", self.stopped, self.tokens, self.thinking_cut)

    @property
    def loss(self) -> RowLoss:
        """The loss of the reference; NaN if it was not finite."""
        nats = math.nan if self.loss_nats is None else self.loss_nats
        return RowLoss(nats, self.loss_tokens)


def new_entry(key: str, generated: Generated | None, loss: RowLoss) -> CachedAnswer:
    """Return the cache entry of an answer and a loss."""
    answer = {} if generated is None else vars(generated)
    nats = loss.nats if math.isfinite(loss.nats) else None
    return CachedAnswer(key=key, **answer, loss_nats=nats, loss_tokens=loss.tokens)


def answer_key(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the hash of everything but the model that the answer to `row` depends on."""
    asked = {name: row[name] for name in row if name not in _NOT_PART_OF_THE_QUESTION}
    return sha256_json([asked, settings])


class AnswerCache:
    """Answers of one model.

    Args:
        folder: Place of the files; None to keep answers in memory alone.
        model_key: Must identify its weights, tokenizer and template.
    """

    def __init__(self, folder: Path | None, model_key: Sequence[str]) -> None:
        name = f"{sha256_json([ANSWER_VERSION, *model_key])[:32]}.jsonl"
        self.path = folder / name if folder else None
        self._entries = self._read(self.path) if self.path else {}
        self._used: dict[str, None] = {}

    def get(self, key: str) -> CachedAnswer | None:
        """Return the answer under `key`, None if there is none."""
        if (entry := self._entries.get(key)) is not None:
            self._used[key] = None
        return entry

    def __getitem__(self, key: str) -> CachedAnswer:
        return self._entries[key]

    def add(self, entries: Iterable[CachedAnswer]) -> None:
        """Add answers; `save` writes them to disk."""
        for entry in entries:
            self._entries[entry.key] = entry
            self._used[entry.key] = None

    def save(self) -> None:
        """Write the file and remove those of the models that were used longest ago."""
        if self.path is None:
            return
        others = [key for key in self._entries if key not in self._used]
        kept = [*others[::-1][: max(0, MAX_ANSWERS - len(self._used))][::-1], *self._used]
        lines = [self._entries[key].model_dump_json() + "\n" for key in kept]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self.path, "".join(lines).encode())
            files = sorted(self.path.parent.glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
            for old in files[:-MAX_MODELS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot keep the answers for the next run: %s", error)

    def _read(self, path: Path) -> dict[str, CachedAnswer]:
        try:
            lines = path.read_bytes().splitlines()
            found = (CachedAnswer.model_validate_json(line) for line in lines)
            entries = {entry.key: entry for entry in found}
            os.utime(path)  # marks the model as used: `save` removes the oldest files
            return entries
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            logger.warning("cannot use the cached answers in %s: %s", path, error)
            return {}
