"""What the data stage tells people: where the rows went, and what they should know about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3ft.chat import rendering as chat
from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import LEFT_OUT, Prepared
from qwen3ft.data.placement import DUPLICATES, Fate
from qwen3ft.data.reading import FINDINGS_NAME
from qwen3ft.logs import get_logger
from qwen3ft.records.data import DatasetManifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTABLE_SHARE = 0.05
"""Share of rows lost from which on a person is told."""
FEW_TEST_ROWS = 100
"""With fewer, one answer more or less moves exact match by a per cent and more."""

logger = get_logger("data")


def warnings_of(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig
) -> tuple[str, ...]:
    """What is probably not as it was meant: each sentence with its numbers and what to do."""
    thinking = _about_reasoning(prepared, tokenizer, config)
    return (*([thinking] if thinking else []), *_about_losses(prepared, config))


def _about_reasoning(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig
) -> str:
    reading, thinking = prepared.reading, chat.probe_thinking(tokenizer)
    bare = reading.usable - reading.with_reasoning
    if not thinking.writes and reading.with_reasoning:
        return (
            f"{reading.with_reasoning} of {reading.usable} rows have reasoning, which this model's "
            "chat template does not write: only their answers are trained. Choose a Thinking model "
            "to train it."
        )
    if thinking.drops_earlier and reading.conversations and config.train_turns == "all":
        return (
            f"{reading.conversations} rows are conversations; this model's template shows earlier "
            "answers without their thinking, and they are trained so. To train the last answer of "
            "each alone: train_turns: last."
        )
    if thinking.writes and thinking.prefills and bare:
        return (
            f"{bare} of {reading.usable} rows have no reasoning, and this model always thinks "
            "first: trained on bare answers it learns to skip that. Leave them out "
            "(rows_without_reasoning: leave_out), or choose an Instruct model."
        )
    return ""


def _about_losses(prepared: Prepared, config: TrainingConfig) -> list[str]:
    placement, reading = prepared.placement, prepared.reading
    told = []
    too_long = placement.count(Fate.TOO_LONG)
    tokenized = int((prepared.tokens.lengths > 0).sum())
    if too_long > NOTABLE_SHARE * tokenized:
        lengths = sorted(prepared.tokens.lengths[prepared.tokens.lengths > 0])
        enough = int(lengths[int(0.99 * (len(lengths) - 1))])
        told.append(
            f"{too_long} of {tokenized} rows are longer than {config.max_sequence_length} tokens "
            f"and left out; max_sequence_length: {enough} would keep 99 %."
        )
    if prepared.tokens.shortened:
        told.append(f"{prepared.tokens.shortened} rows lost the middle of their reasoning to fit.")
    leaked = placement.count(Fate.LEAKAGE, Fate.NEAR_LEAKAGE)
    if leaked:
        told.append(
            f"{leaked} training rows ask what is held out, or nearly so, and were removed; they "
            f"are listed in {LEFT_OUT}."
        )
    repeated = placement.count(*DUPLICATES) - leaked
    if repeated > NOTABLE_SHARE * reading.usable:
        told.append(f"{repeated} of {reading.usable} rows repeat others.")
    if reading.personal:
        found = ", ".join(f"{kind} {rows}" for kind, rows in reading.personal.most_common())
        told.append(
            f"Keys or personal data were found ({found}); places are in {FINDINGS_NAME}. Leave "
            "such rows out with personal_data: quarantine."
        )
    test_rows = placement.count(Fate.TEST)
    if test_rows < FEW_TEST_ROWS:
        told.append(
            f"Only {test_rows} questions are held out for the final comparison: its verdict will "
            "be unsure. Raise held_out_fraction, or name test_paths."
        )
    return told


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
