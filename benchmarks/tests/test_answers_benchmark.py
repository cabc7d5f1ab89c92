"""The answers benchmark: its cases, its table, and agreement of answers."""

from __future__ import annotations

from benchmarks.answers.__main__ import agreement, table
from benchmarks.answers.cases import Case, parse_case, prompts


def test_a_case_is_parsed_and_drawn_alike_every_time() -> None:
    """Lengths stay within the most, and the same seed gives the same questions."""
    case = parse_case("4b:13:256:20:3")
    assert case == Case("4b", 13.0, 256, 20, 3)
    drawn = prompts(case, 0)
    assert drawn == prompts(case, 0) != prompts(case, 1)
    assert all(8 <= length <= 256 for _, length in drawn)


def test_agreement_goes_as_far_as_both_answers_do() -> None:
    """A peer answers the first questions alone, perhaps at another length."""
    ours = [[1, 2, 3], [4, 5], [6]]
    assert agreement(ours, [[1, 2], [4, 9]]) == 0.5
    assert agreement(ours, [[1, 2, 3, 7]]) == 1.0


def test_the_table_has_a_line_for_each_contestant() -> None:
    """With what is missing said."""
    row = {"case": "tiny", "contestant": "ours", "status": "ok", "tokens_per_second": 12281.2}
    lines = table([row, {"case": "tiny", "contestant": "vllm", "status": "not installed"}])
    first, second = lines.splitlines()[1:]
    assert first.split() == ["tiny", "ours", "12,281"]
    assert second.endswith("not installed")
