"""Warnings about the data, each with its numbers and what to do, and the log of its counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qwen3ft.chat.templates import probe_thinking
from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import LEFT_OUT, Prepared
from qwen3ft.data.placement import DUPLICATES, Fate
from qwen3ft.data.reading import FINDINGS_NAME, MOST_LISTED_BYTES
from qwen3ft.data.row_features import MOST_COMPARED_BYTES
from qwen3ft.logs import get_logger
from qwen3ft.records.data import DatasetManifest
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A smaller share of rows lost is no reason for a warning.
_NOTABLE_SHARE = 0.05
# With fewer test rows, one answer moves exact match by more than a percentage point.
_FEW_TEST_ROWS = 100
_MOST_NAMES = 12

logger = get_logger("data")


def warnings_of(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig
) -> tuple[str, ...]:
    """Return a sentence for each thing that was probably not intended."""
    return (
        *_about_reasoning(prepared, tokenizer, config),
        *_about_unused(prepared),
        *_about_losses(prepared, config),
    )


def _about_unused(prepared: Prepared) -> Iterator[str]:
    unused = prepared.reading.counts.unused
    if unused:
        shown = ", ".join(f"{name} ({rows:,})" for name, rows in unused.most_common(_MOST_NAMES))
        more = f" and {len(unused) - _MOST_NAMES} more" if len(unused) > _MOST_NAMES else ""
        yield (
            f"Not used, with the number of rows: {shown}{more}. A column that is part of a row is "
            "named by a setting, as in: columns: {context: NAME}."
        )


def _about_reasoning(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig
) -> Iterator[str]:
    reading, thinking = prepared.reading, probe_thinking(tokenizer)
    bare = reading.usable - reading.with_reasoning
    if not thinking.writes and reading.with_reasoning:
        yield (
            f"{reading.with_reasoning} of {reading.usable} rows have reasoning, which this model's "
            "chat template does not write: only their answers are trained. Choose a Thinking model "
            "to train it."
        )
    if thinking.drops_earlier and reading.earlier_reasoning and config.train_turns == "all":
        yield (
            f"{reading.earlier_reasoning} rows are conversations with reasoning before the last "
            "question, which this model's template drops: those answers are trained without it. To "
            "train only the last answer of each: train_turns: last."
        )
    if thinking.writes and thinking.prefills and bare:
        yield (
            f"{bare} of {reading.usable} rows have no reasoning, and this model always thinks "
            "first: such rows teach it not to. Leave them out (rows_without_reasoning: leave_out), "
            "or choose an Instruct model."
        )


def _about_losses(prepared: Prepared, config: TrainingConfig) -> list[str]:
    placement, reading = prepared.placement, prepared.reading
    warnings = []
    tokens, too_long = prepared.tokens, placement.count(Fate.TOO_LONG)
    endless = np.iinfo(np.int32).max
    lengths = np.where(tokens.bounded, endless, tokens.lengths)
    lengths = np.sort(lengths[lengths > 0])
    if too_long > _NOTABLE_SHARE * len(lengths):
        enough = int(lengths[int(0.99 * (len(lengths) - 1))])
        advice = f"; max_sequence_length: {enough} would keep 99 %" if enough < endless else ""
        warnings.append(
            f"{too_long} of {len(lengths)} rows are longer than {config.max_sequence_length} "
            f"tokens and left out{advice}."
        )
    if reading.not_listed:
        warnings.append(
            f"{reading.not_listed} bad rows are counted and not listed: the quarantine file ends "
            f"at {MOST_LISTED_BYTES // MIB} MiB."
        )
    if bounded := int(tokens.bounded.sum()):
        warnings.append(
            f"{bounded} rows are too long by their bytes alone: the lengths stated for them are "
            "the least that they can have."
        )
    if not_compared := placement.not_compared:
        warnings.append(
            f"{not_compared} rows are larger than {MOST_COMPARED_BYTES // MIB} MiB, and were not "
            "compared with others: near-duplicates of them are not found, exact ones are."
        )
    if shortened := prepared.tokens.shortened:
        warnings.append(f"{shortened} rows lost the middle of their reasoning to fit.")
    if leaked := placement.count(Fate.LEAKAGE, Fate.NEAR_LEAKAGE):
        warnings.append(
            f"{leaked} training rows have a held-out question, or nearly one, and were removed; "
            f"they are listed in {LEFT_OUT}."
        )
    repeated = placement.count(*DUPLICATES) - leaked
    if repeated > _NOTABLE_SHARE * reading.usable:
        warnings.append(f"{repeated} of {reading.usable} rows repeat others.")
    if reading.personal:
        found = ", ".join(f"{kind} {rows}" for kind, rows in reading.personal.most_common())
        warnings.append(
            f"Keys or personal data were found ({found}); places are in {FINDINGS_NAME}. Leave "
            "such rows out with personal_data: quarantine."
        )
    if (test_rows := placement.count(Fate.TEST)) < _FEW_TEST_ROWS:
        warnings.append(
            f"Only {test_rows} questions are held out for the final comparison: its verdict will "
            "be uncertain. Raise held_out_fraction, or set test_paths."
        )
    return warnings


def log_report(manifest: DatasetManifest) -> None:
    """Log where the rows went, how long they are, and the warnings."""
    logger.info(
        "%d rows read = %d train + %d dev + %d test + %d quarantined + %d too long "
        "+ %d duplicates + %d not used",
        *(manifest.rows_read, manifest.train.rows, manifest.dev.rows, manifest.test_rows),
        *(manifest.quarantined, manifest.too_long, manifest.duplicates, manifest.not_used),
    )
    for name, split in (("train", manifest.train), ("dev", manifest.dev)):
        logger.info(
            "%s: %d tokens, %d of them trained; median %d, 95 %% up to %d, longest %d",
            *(name, split.tokens, split.trained_tokens),
            *(split.median_tokens, split.p95_tokens, split.longest_tokens),
        )
    for warning in manifest.warnings:
        logger.warning(warning)
