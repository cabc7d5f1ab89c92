"""Warnings about the data, each with its numbers and what to do, and the log of its counts.

Where nothing is left of the data, that is an error with its true reason and a way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qwen3ft.chat.templates import probe_thinking
from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import LEFT_OUT, Prepared
from qwen3ft.data.placement import DUPLICATES, Fate
from qwen3ft.data.reading import FINDINGS_NAME, MOST_LISTED_BYTES
from qwen3ft.data.row_features import MOST_COMPARED_BYTES
from qwen3ft.data.sources import command_to_check, show_command
from qwen3ft.errors import DataLoadingError
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
            f"{bounded} rows are too long by their bytes alone and were not tokenised: the lengths "
            "stated for them are the least that they can have."
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


# --- nothing left ---

_SPLITS = {"train": Fate.TRAIN, "dev": Fate.DEV, "test": Fate.TEST}
_LEAST_QUESTIONS = 3
_USUAL_HELD_OUT = 0.1
_KEPT_SHARE = 0.95


class _Reason(NamedTuple):
    rows: int
    what: str
    why: str
    next_command: str


def check_not_empty(prepared: Prepared, config: TrainingConfig) -> None:
    """Make sure that each split has a row; with nothing but known rows, train may be empty.

    Raises:
        DataLoadingError: a split has no row; it names what took most of them.
    """
    placement = prepared.placement
    sizes = {name: placement.count(fate) for name, fate in _SPLITS.items()}
    # Then the run ends before it trains (`flows.run_context.nothing_new`).
    nothing_new = prepared.known_rows is not None and placement.new_rows == 0
    if all(sizes.values()) or (nothing_new and sizes["dev"] and sizes["test"]):
        return
    empty = [name for name, size in sizes.items() if not size]
    reasons = [reason(prepared, config, empty) for reason in _REASONS]
    chosen = max(reasons, key=lambda reason: reason.rows)
    raise DataLoadingError(
        f"No rows are left for {' and '.join(empty)}: {chosen.what}",
        why=chosen.why,
        next_command=chosen.next_command,
        too_long=placement.count(Fate.TOO_LONG),
        **sizes,
    )


def _too_long(prepared: Prepared, config: TrainingConfig, _empty: Sequence[str]) -> _Reason:
    tokens, limit = prepared.tokens, config.max_sequence_length
    lengths = np.sort(tokens.lengths[(tokens.lengths > 0) & ~tokens.bounded])
    rows, counted = prepared.placement.count(Fate.TOO_LONG), int((tokens.lengths > 0).sum())
    enough = int(lengths[int(np.ceil(_KEPT_SHARE * len(lengths))) - 1]) if len(lengths) else 0
    what = f"{rows} of {counted} rows are longer than max_sequence_length, {limit} tokens"
    if enough <= limit:
        return _Reason(
            rows,
            f"{what}.",
            "Longer rows are left out, never cut.",
            show_command(file.path for file in prepared.reading.files),
        )
    return _Reason(
        rows,
        f"{what}; half of them have more than {int(np.median(lengths))}.",
        f"Longer rows are left out, never cut. A length of {enough} tokens would keep "
        f"{_KEPT_SHARE:.0%} of these rows.",
        command_to_check(config, max_sequence_length=enough),
    )


def _too_few_questions(
    prepared: Prepared, _config: TrainingConfig, _empty: Sequence[str]
) -> _Reason:
    reading, placement = prepared.reading, prepared.placement
    questions = len(np.unique(reading.keys.build().question[:, 0]))
    repeated = placement.count(Fate.DUPLICATE, Fate.NEAR_DUPLICATE, Fate.NEAR_LEAKAGE)
    is_cause = questions < _LEAST_QUESTIONS
    return _Reason(
        # Then no setting helps.
        reading.usable + 1 if is_cause else repeated,
        f"the {reading.usable} usable rows ask {questions} different question"
        f"{'s' * (questions != 1)}, and {repeated} of them repeat another or nearly do.",
        "Training, dev and test need a question each, so that there must be three or more.",
        show_command(file.path for file in reading.files),
    )


def _held_out(prepared: Prepared, config: TrainingConfig, empty: Sequence[str]) -> _Reason:
    placement = prepared.placement
    held_out = placement.count(Fate.DEV, Fate.TEST)
    return _Reason(
        held_out if "train" in empty else 0,
        f"{held_out} of {prepared.reading.usable} usable rows are held out for dev and test.",
        f"held_out_fraction is {config.held_out_fraction:g}.",
        command_to_check(config, held_out_fraction=_USUAL_HELD_OUT),
    )


def _leaked(prepared: Prepared, config: TrainingConfig, empty: Sequence[str]) -> _Reason:
    leaked = prepared.placement.count(Fate.LEAKAGE, Fate.NEAR_LEAKAGE)
    return _Reason(
        2 * leaked if "train" in empty else leaked,  # of as many held-out rows, those are the cause
        f"{leaked} rows have a question that is held out, or nearly one, and are not trained on.",
        "dev_paths and test_paths, or files named as a test split, hold the same questions. "
        "Without them, a share of the training rows is held out.",
        command_to_check(config, dev_paths=(), test_paths=()),
    )


def _empty_files(prepared: Prepared, config: TrainingConfig, empty: Sequence[str]) -> _Reason:
    reading = prepared.reading
    given = {role for role in empty if any(source.role == role for source in reading.sources)}
    rows = {
        role: sum(source.rows for source in reading.sources if source.role == role)
        for role in sorted(given)
    }
    usable = set(np.unique(reading.keys.build().role).tolist())
    codes = {"train": 0, "dev": 1, "test": 2}
    unusable = [role for role in rows if codes[role] not in usable]
    of_each = " and ".join(f"its {rows[role]} rows for {role}" for role in unusable)
    return _Reason(
        reading.usable if unusable else 0,
        f"of {reading.rows_read} rows read, {reading.bad.total()} are bad, and none of "
        f"{of_each} can be used.",
        "Files that are given for a split are all that it has.",
        command_to_check(config, **{f"{role}_paths": () for role in unusable if role != "train"}),
    )


def _not_trained(prepared: Prepared, config: TrainingConfig, _empty: Sequence[str]) -> _Reason:
    rows = prepared.placement.count(Fate.NO_TRAINED_TOKEN)
    return _Reason(
        rows,
        f"{rows} rows have no token that would carry loss.",
        "Their answers before the last are all that is to be trained, and train_turns is "
        f"{config.train_turns!r}."
        if config.train_turns == "last"
        else "The model's template writes none of their answers.",
        command_to_check(config, train_turns="all"),
    )


_REASONS: tuple[Callable[[Prepared, TrainingConfig, Sequence[str]], _Reason], ...] = (
    *(_too_few_questions, _empty_files, _too_long, _leaked, _held_out, _not_trained),
)
