"""Answers are cached by model and question, and a damaged cache costs only time."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from qwen3ft.evaluation import answer_cache
from qwen3ft.evaluation.answer_cache import AnswerCache, answer_key, new_entry
from qwen3ft.evaluation.answer_loss import RowLoss
from qwen3ft.evaluation.answers import Generated

ANSWER = Generated(text="亚麻 \u2028 linen", stopped=True, tokens=4)


def fill(folder: Path, model: str, *keys: str) -> AnswerCache:
    """Add an answer under each key to the cache of `model`, and save it."""
    cache = AnswerCache(folder, [model])
    cache.add([new_entry(key, ANSWER, RowLoss(1.0, 1)) for key in keys])
    cache.save()
    return cache


def test_an_answer_is_found_again_for_the_same_model_alone(tmp_path: Path) -> None:
    """Text, end and loss come back unchanged, and no other model finds them."""
    cache = AnswerCache(tmp_path, ["base"])
    cache.add([new_entry("k", ANSWER, RowLoss(1.5, 3)), new_entry("a", None, RowLoss(math.inf, 2))])
    cache.save()
    again = AnswerCache(tmp_path, ["base"])
    kept = again.get("k")
    assert kept is not None
    assert (kept.generated, kept.loss) == (ANSWER, RowLoss(1.5, 3))
    assert math.isnan(again["a"].loss.nats)
    assert AnswerCache(tmp_path, ["base", "adapter"]).get("k") is None


def test_the_key_holds_what_the_answer_depends_on() -> None:
    """The group that scores are reported by is not part of it."""
    row = {"question": "q", "answer": "a", "split": "fact"}
    key = answer_key(row, {"max_new_tokens": 16})
    assert answer_key({**row, "split": "date"}, {"max_new_tokens": 16}) == key
    others = [
        answer_key({**row, "answer": "b"}, {"max_new_tokens": 16}),
        answer_key({**row, "reasoning": "r"}, {"max_new_tokens": 16}),
        answer_key(row, {"max_new_tokens": 17}),
    ]
    assert len({key, *others}) == 4


@pytest.mark.parametrize("content", [b"no json\n", b'{"key": 1}\n', b"\xff\xfe", b'{"key": "k"'])
def test_a_damaged_file_is_replaced(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its questions are asked again, and the log says so."""
    cache = AnswerCache(tmp_path, ["base"])
    cache.path.write_bytes(content)
    cache = AnswerCache(tmp_path, ["base"])
    assert cache.get("k") is None
    assert "cannot use the cached answers" in caplog.text
    assert fill(tmp_path, "base", "k").get("k") is not None
    assert AnswerCache(tmp_path, ["base"]).get("k") is not None


def test_a_folder_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with the answers it has."""
    (tmp_path / "file").write_text("")
    assert fill(tmp_path / "file" / "answers", "base", "k").get("k") is not None
    assert "cannot keep the answers" in caplog.text


def test_the_cache_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used answers stay, then the newest; of models, those used last."""
    monkeypatch.setattr(answer_cache, "MAX_ANSWERS", 3)
    monkeypatch.setattr(answer_cache, "MAX_MODELS", 2)
    fill(tmp_path, "a", "1", "2", "3")
    cache = AnswerCache(tmp_path, ["a"])
    assert cache.get("1") is not None
    cache.add([new_entry("4", None, RowLoss(1.0, 1))])
    cache.save()
    kept = AnswerCache(tmp_path, ["a"])
    assert [key for key in "1234" if kept.get(key) is not None] == ["1", "3", "4"]
    for model in ("b", "c"):
        fill(tmp_path, model, "1")
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert AnswerCache(tmp_path, ["a"]).get("1") is None


def test_a_model_that_is_asked_about_every_night_is_never_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's answers are kept although only candidates write new ones."""
    monkeypatch.setattr(answer_cache, "MAX_MODELS", 2)
    for model in ("base", *"abcde"):
        time.sleep(0.02)  # file systems count time in steps
        assert model == "base" or AnswerCache(tmp_path, ["base"]).get("k") is not None
        fill(tmp_path, model, "k")
