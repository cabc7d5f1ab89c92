"""Logged requests: masked, private, and data of a later run once somebody has corrected them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from support.data_stage import accounted, prepare, questions, read_lines, write_jsonl

from qwen3ft.records.serving import Ended
from qwen3ft.server.answers import AnsweredRequest
from qwen3ft.server.questions import ChatQuestionBody
from qwen3ft.server.request_log import RequestLog
from qwen3ft.server.served import Version

VERSION = Version("served-v3", "3", Path(), {}, cast(Any, None))
KEY = "sk-abcdefghijklmnopqrstuvwx"
ENDED = Ended(id=1, reason="stop", prompt_tokens=9, completion_tokens=3)


def answered(question: str, answer: str, ended: Ended | None = ENDED) -> AnsweredRequest:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": question},
    ]
    body = ChatQuestionBody.model_validate({"messages": turns})
    return AnsweredRequest(VERSION, body, 200, "", answer, ended, 0.1)


def test_a_line_has_all_that_a_later_run_needs_and_no_secret(tmp_path: Path) -> None:
    """Broken off answers are not kept; only the owner can read the rest."""
    log = RequestLog(tmp_path / "requests")
    log.add(answered(f"Is {KEY} a key?", f"{KEY} is."))
    log.add(answered("And this?", "Half of", None))
    [line] = read_lines(log.path)
    assert KEY not in log.path.read_text()
    assert line["prompt"][-1] == {"role": "user", "content": "Is *** a key?"}
    assert (line["answer"], line["label"], line["served_by"]) == ("*** is.", False, VERSION.name)
    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o777 == 0o700


def test_the_data_stage_takes_what_was_corrected_and_leaves_out_the_rest(tmp_path: Path) -> None:
    """The folder is taken as it is: rows nobody looked at are neither trained nor bad."""
    log = RequestLog(tmp_path / "requests")
    for number in range(60):
        log.add(answered(f"What is {number} + 1?", str(number)))
    lines = read_lines(log.path)
    for number in range(30):
        lines[number] |= {"answer": str(number + 1), "label": True}
    write_jsonl(log.path, lines)
    manifest = prepare(tmp_path, str(tmp_path / "requests"))
    asked = [text for split in ("train", "dev", "test") for text in questions(manifest, split)]
    assert accounted(manifest) == 60
    assert (manifest.quarantined, manifest.not_used) == (0, 30)
    assert len(asked) == 30
