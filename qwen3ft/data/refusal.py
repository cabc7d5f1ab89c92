"""Errors for data of which too little can be used, each with its true reason and a way out."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.data.columns import PARTS, find_columns
from qwen3ft.data.placement import Fate
from qwen3ft.data.sources import command_to_check, show_command
from qwen3ft.data.splits import ROLES
from qwen3ft.errors import DataLoadingError
from qwen3ft.text.commands import shell_line

if TYPE_CHECKING:
    from qwen3ft.data.folder import Prepared
    from qwen3ft.data.reading import Reading

PERSONAL_DATA = "personal_data"
"""Reason code of rows with keys or personal data, where the config leaves those out."""
_MOST_NAMES = 20
_SIMILAR = 0.6  # of 1: "quesion" is similar to "question", "frage" to nothing
_LEAST_QUESTIONS = 3  # one for each split
_KEPT_SHARE = 0.95  # of the rows, by the length that is suggested


def _reason_for_none(reading: Reading, config: TrainingConfig, quarantine: str) -> tuple[str, str]:
    """Return why no row is usable, and the command to run next."""
    if rows := reading.without_reasoning_left_out:
        why = f"{rows} good rows have no reasoning, and rows_without_reasoning is 'leave_out'."
        return why, command_to_check(config, rows_without_reasoning="empty_block")
    if reading.marked_left_out:
        return (
            f"The data marks {reading.marked_left_out} rows as bad examples, and no other is good.",
            quarantine,
        )
    if reading.bad:
        why, command = _way_out(reading, config)
        return f"All of their rows were quarantined.{why}", command or quarantine
    paths = (file.path for file in reading.files[:_MOST_NAMES])
    return "There is no row in them.", shell_line("wc", "-c", *paths)


def _likely_columns(names: Sequence[str], wanted: ColumnNames) -> dict[str, str]:
    """Return the columns that may hold the missing parts: of similar names, else in their order."""
    found = find_columns(tuple(names), wanted)
    free, likely = list(found.unused)[:_MOST_NAMES], {}
    missing = [part for part in ("question", "answer") if getattr(found, part) is None]
    for part in reversed(missing):
        similar = [name for name in free if _similarity(name, PARTS[part]) >= _SIMILAR]
        if similar:
            likely[part] = max(similar, key=lambda name: _similarity(name, PARTS[part]))
            free.remove(likely[part])
    for part in missing:
        if part not in likely and free:
            likely[part] = free.pop(0)
    return likely


def _similarity(name: str, usual_names: Sequence[str]) -> float:
    return max(SequenceMatcher(None, name.lower(), usual).ratio() for usual in usual_names)


def _way_out(reading: Reading, config: TrainingConfig) -> tuple[str, str | None]:
    """Return a sentence, and the command that looks again with a setting.

    The setting is the one by which most bad rows were refused, or that helps them.
    """
    [(reason, _)] = reading.bad.most_common(1) or [("", 0)]
    if reason == PERSONAL_DATA:
        return "", command_to_check(config, personal_data="report")
    if reason == "control_token":
        return "", command_to_check(config, special_tokens_in_text="escape")
    # Where some row has both parts, other columns would replace those of the good rows too.
    has_parts = reading.counts.columns or reading.marked_left_out
    if not reason.startswith("missing_") or has_parts:
        return "", None
    (part, names), rows = max(
        reading.counts.incomplete.items(), key=lambda item: (item[0][1] != (), item[1])
    )
    why = (
        f" {rows} of them have no column that is known to hold the {part}; their columns are "
        f"{', '.join(map(repr, names[:_MOST_NAMES])) or 'none'}."
    )
    likely = _likely_columns(names, config.columns)
    if not likely:
        return why, None
    columns = config.columns.model_copy(update=likely)
    return f"{why} The setting `columns` names it.", command_to_check(config, columns=columns)


def check_usable(reading: Reading, config: TrainingConfig, quarantine: Path) -> None:
    """Make sure that some rows are usable, and not too many bad.

    Args:
        reading: Content of the files.
        config: Settings they were read by.
        quarantine: List of the bad rows.

    Raises:
        DataLoadingError: too many rows or files are bad, or no row is usable.
    """
    bad, read, files = reading.bad.total(), reading.rows_read, len(reading.sources)
    max_bad_fraction = config.max_bad_fraction
    next_command = shell_line("head", quarantine.resolve())
    numbers = ", ".join(f"{reason} {count}" for reason, count in reading.bad.most_common())
    # Files have a share of their own: nobody knows how many rows an unreadable one holds.
    if bad > max_bad_fraction * read or reading.unreadable > max_bad_fraction * files:
        what = (
            f"{bad} of {read} rows are bad ({numbers or 'none'}) and {reading.unreadable} of "
            f"{files} file(s) unreadable; max_bad_fraction allows {max_bad_fraction:.0%}."
        )
        listed = f"All but {reading.not_listed:,}" if reading.not_listed else "All"
        why = f"{listed} bad rows are listed with file, line and reason in {quarantine}."
        way_out, command = _way_out(reading, config)
        why, next_command = why + way_out, command or next_command
    elif not reading.usable:
        what = f"No usable row in {files} file(s): {read} rows read, {bad} bad."
        why, next_command = _reason_for_none(reading, config, next_command)
    else:
        return
    raise DataLoadingError(
        what,
        why=why,
        next_command=next_command,
        rows_read=read,
        bad=bad,
        unreadable_files=reading.unreadable,
        reasons=dict(reading.bad),
        quarantine_path=str(quarantine),
    )


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
    sizes = {role: placement.count(Fate(code)) for code, role in enumerate(ROLES)}
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
        command_to_check(config, held_out_fraction=TrainingConfig().held_out_fraction),
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
    unusable = [role for role in rows if ROLES.index(role) not in usable]
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


_REASONS = (_too_few_questions, _empty_files, _too_long, _leaked, _held_out, _not_trained)
