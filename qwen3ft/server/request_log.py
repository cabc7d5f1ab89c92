"""Questions and answers on disk, with a place for a better answer: what a later run may learn from.

    <folder>/requests-20261130-081500-4711.jsonl     one request a line

A line is a row of a data set: the prompt, `answer`, and a label. `answer` is what was served, and
the label is false, so the data stage leaves the row out as one that is no example: a model must not
learn from its own words. Whoever has looked at a row writes the right answer into `answer`, if it
was wrong, and sets `label` to true. Secrets are masked.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from qwen3ft.disk.files import append_json_line, make_folder
from qwen3ft.logs import get_logger, mask_values
from qwen3ft.server.answers import AnsweredRequest
from qwen3ft.server.questions import ChatQuestionBody

logger = get_logger("server")


class RequestLog:
    """Appends every complete answer to a conversation.

    Args:
        folder: Created if it is missing, for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder, 0o700)
        started = datetime.now(UTC)
        self.path = folder / f"requests-{started:%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"
        self.path.touch(0o600)

    def add(self, answered: AnsweredRequest) -> None:
        """Write an answer down; trouble with the disk is logged and disturbs nobody."""
        if answered.ended is None or not isinstance(answered.body, ChatQuestionBody):
            return
        line = {
            "prompt": [message.plain() for message in answered.body.messages],
            "answer": answered.answer,
            "label": False,
            "served_answer": answered.answer,
            "served_thinking": answered.thinking,
            "served_by": answered.version.name,
            "finish_reason": answered.ended.reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            append_json_line(self.path, mask_values(line))
        except OSError as error:
            logger.warning("a request is not written to %s: %s", self.path, error)
