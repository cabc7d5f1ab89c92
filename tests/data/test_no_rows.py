"""Every way to end with no rows has its own reason, numbers, and a next command that works."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_here
from support.data_stage import synthetic, write_jsonl

from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.refusal import _likely_columns
from qwen3ft.errors import DataLoadingError

Rows = Callable[[int], list[dict[str, Any]]]


def long_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of 60 to 260 words, of which the longest are few."""
    return [
        {"question": f"Question {n}?", "answer": "word " * (60 + 10 * (n % 20 == 0) * 20) + str(n)}
        for n in range(count)
    ]


def changed(**values: Any) -> Rows:
    return lambda count: [row | values for row in synthetic(count)]


CASES: dict[str, tuple[Rows, dict[str, Any], str, str]] = {
    "too long": (
        long_rows,
        {"max_sequence_length": 32},
        r"40 of 40 rows are longer than max_sequence_length.* length of \d+ tokens would keep 95%",
        "--set max_sequence_length=",
    ),
    "all repeats": (
        lambda count: [{"question": "Which?", "answer": "It."}] * count,
        {},
        r"the 40 usable rows ask 1 different question, and 39 of them repeat",
        "head -c 2000",
    ),
    "two questions": (
        lambda count: [synthetic(2)[n % 2] for n in range(count)],
        {},
        r"ask 2 different questions, and 38 of them repeat",
        "head -c 2000",
    ),
    "all held out": (
        synthetic,
        {"held_out_fraction": 0.999},
        r"left for train: \d+ of 40 usable rows are held out .*\nWhy: held_out_fraction is 0.999",
        "--set held_out_fraction=0.1",
    ),
    "wrong columns": (
        lambda count: [{"asked of us": f"{n}?", "answr": f"{n}."} for n in range(count)],
        {},
        r"40 of 40 rows are bad \(missing_question 40\).*'asked of us', 'answr'",
        "--set 'columns=",
    ),
    "no reasoning": (
        changed(reasoning=""),
        {"rows_without_reasoning": "leave_out"},
        r"40 good rows have no reasoning",
        "--set rows_without_reasoning=empty_block",
    ),
    "personal data": (
        changed(reasoning="write to jane.doe@acme-corp.io"),
        {"personal_data": "quarantine"},
        r"40 of 40 rows are bad \(personal_data 40\)",
        "--set personal_data=report",
    ),
    "control tokens": (
        changed(reasoning="it ends with <|im_end|>"),
        {},
        r"40 of 40 rows are bad \(control_token 40\)",
        "--set special_tokens_in_text=escape",
    ),
    "answers that some rows lack": (
        lambda count: [
            {**row, "answer": None if n % 2 else row["answer"], "source": f"book {n}"}
            for n, row in enumerate(synthetic(count))
        ],
        {},
        r"20 of 40 rows are bad \(missing_answer 20\)",
        "head ",
    ),
    "answers that all rows lack": (
        lambda count: [{"question": row["question"]} for row in synthetic(count)],
        {},
        r"40 of 40 rows are bad \(missing_answer 40\)",
        "head ",
    ),
    "one row without an answer among others": (
        lambda count: [
            {**row, "answer": "it ends with <|im_end|>" if n else None}
            for n, row in enumerate(synthetic(count))
        ],
        {},
        r"40 of 40 rows are bad \(control_token 39, missing_answer 1\)",
        "--set special_tokens_in_text=escape",
    ),
    "marked as bad": (
        changed(label=False),
        {},
        r"The data marks 40 rows as bad examples",
        "head ",
    ),
    "empty answers": (
        changed(answer=" "),
        {"max_bad_fraction": 1.0},
        r"40 rows read, 40 bad\.\nWhy: All of their rows were quarantined",
        "head ",
    ),
    "empty file": (
        lambda _: [],
        {},
        r"0 rows read, 0 bad\.\nWhy: There is no row in them",
        "wc -c",
    ),
}


def look(config: TrainingConfig) -> None:
    DataPipeline(config).check()


def run(command: str, folder: Path) -> None:
    """Run a printed command: one of the project in this process, any other in a shell."""
    if command.startswith("qwen3ft data check "):
        assert run_here(command, folder) == 0
        return
    done = subprocess.run(command, shell=True, capture_output=True, check=True)
    assert done.stdout.strip()


@pytest.mark.parametrize("name", CASES)
def test_an_end_without_rows_says_why_and_what_to_do(tmp_path: Path, name: str) -> None:
    make, settings, message, command = CASES[name]
    data = write_jsonl(tmp_path / "my rows.jsonl", make(40))
    config = TrainingConfig(
        model_name="embedded", data_paths=(data,), cache_dir=str(tmp_path), **settings
    )
    with pytest.raises(DataLoadingError) as raised:
        look(config)
    assert re.search(message, str(raised.value), re.DOTALL), raised.value
    assert command in raised.value.next_command
    run(raised.value.next_command, tmp_path)


def test_held_out_rows_that_are_those_of_training(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", synthetic(40))
    copy = write_jsonl(tmp_path / "copy.jsonl", synthetic(40))
    config = TrainingConfig(
        model_name="embedded", data_paths=(data,), test_paths=(copy,), cache_dir=str(tmp_path)
    )
    with pytest.raises(
        DataLoadingError, match="40 rows have a question that is held out"
    ) as raised:
        look(config)
    assert "--set 'test_paths=[]'" in raised.value.next_command
    run(raised.value.next_command, tmp_path)


def test_a_held_out_file_without_usable_rows(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", synthetic(40))
    bad = write_jsonl(tmp_path / "test.jsonl", [{"question": "Which?"}] * 3)
    config = TrainingConfig(
        model_name="embedded", data_paths=(data,), test_paths=(bad,), cache_dir=str(tmp_path)
    )
    with pytest.raises(DataLoadingError, match=r"left for test.*its 3 rows for test can") as raised:
        look(config)
    run(raised.value.next_command, tmp_path)


def test_columns_in_another_language_are_suggested_in_their_order() -> None:
    """A misspelt name goes to what it resembles, wherever it stands."""
    assert _likely_columns(("frage", "lösung"), ColumnNames()) == {
        "question": "frage",
        "answer": "lösung",
    }
    assert _likely_columns(("id", "anser", "quesion"), ColumnNames()) == {
        "question": "quesion",
        "answer": "anser",
    }
