"""One logging set-up for the flow, the tasks and the workers.

Records of the logger `qwen3ft` go to the console for people, and as JSON lines into the run's
folder for programs; Prefect picks them up for the run's log when told to (see `tasks`). Secrets are
masked in every handler that `configure` installs. Nothing is configured at import.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

ROOT = "qwen3ft"

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face tokens
    r"|sk-[A-Za-z0-9_-]{16,}"  # keys of OpenAI-compatible services
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS access keys
    r"|gh[pousr]_[A-Za-z0-9]{30,}"  # GitHub tokens
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/-]{8,}=*"
)


def mask_secrets(text: str) -> str:
    """`text` with everything that looks like a credential replaced by ***."""
    return _SECRETS.sub("***", text)


class ConsoleFormatter(logging.Formatter):
    """`12:00:01 INFO    train: step 20 ...`, secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback where there is one."""
        record = logging.makeLogRecord(record.__dict__)
        record.name = record.name.removeprefix(f"{ROOT}.")
        return mask_secrets(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON, secrets masked."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": mask_secrets(record.getMessage()),
        }
        if record.exc_info:
            entry["traceback"] = mask_secrets(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


def get_logger(name: str) -> logging.Logger:
    """The logger `qwen3ft.<name>`."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(*, console: bool = True, json_path: Path | None = None) -> None:
    """Set up the logger `qwen3ft` for this process; a second call replaces the first.

    Args:
        console: Also write readable lines to standard error.
        json_path: File that receives JSON lines; its folder must exist.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(logging.INFO)
    for handler in [handler for handler in logger.handlers if handler.get_name() == ROOT]:
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if console:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(
            ConsoleFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        )
    if json_path is not None:
        handlers.append(logging.FileHandler(json_path, encoding="utf-8"))
        handlers[-1].setFormatter(JsonFormatter())
    for handler in handlers:
        handler.set_name(ROOT)
        logger.addHandler(handler)
    # PEFT asks by the old name of a property; transformers then tells the user to change it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
