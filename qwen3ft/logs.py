"""One logging set-up for the flow, the tasks and the workers.

Records of the logger `qwen3ft` go to the console for people, and as JSON lines into the run's
folder for programs; Prefect adds them to the run's log if configured to (see `tasks`). Secrets are
masked, and control characters escaped, before any handler has a record. Nothing is configured at
import.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from qwen3ft.text.plain import escaped

ROOT = "qwen3ft"

PROGRESS_LOGGER = f"{ROOT}.progress"
"""Logger of the lines about steps; a console that shows progress in another way leaves them out."""

# Masking reads every line of a log and every row, so its time may grow no faster than the text,
# whatever that holds: nothing may be read again from each of many starts, or be divided in many
# ways. Hence the possessive quantifiers (*+), and the bound on a part that a dot must end.
_LINE_ENDS = r"(?:\s|\\+[nr]?)*+"  # real, or written as \n
# the lines of the key, and the end mark if there is one
_PRIVATE_KEY = (
    rf"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:{_LINE_ENDS}[A-Za-z0-9+/=]{{20,}}+)*+"
    rf"(?:{_LINE_ENDS}[A-Za-z0-9+/=]*+{_LINE_ENDS}-----END [A-Z ]+-----)?"
)


def _beginning_a_word(start: str) -> str:
    """Return a pattern of `start` where no letter or digit of a word stands before it."""
    # In JSON a line break is \n, and other characters may be \u and their code.
    short, code = rf"(?<=\\[bfnrt]{start})", rf"(?<=\\u[0-9A-Fa-f]{{4}}{start})"
    return f"{start}(?:(?<![A-Za-z0-9]{start})|{short}|{code})"


# A start without dots behind is matched all the same, without the group: what follows it then is
# not read again from each further start in it.
_JSON_WEB = _beginning_a_word("eyJ") + (
    r"(?:[A-Za-z0-9_-]{8,}+(\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,})?|[A-Za-z0-9_-]*+)"
)


class _Secret(NamedTuple):
    """Pattern of one form of credential.

    Python looks for its first characters a hundred times faster than for a choice of patterns, so
    each is searched for by itself, and what must stand before it is checked behind them.
    """

    kind: str
    mark: str
    """Part of every match, or of what precedes it: texts without it are not searched."""
    pattern: re.Pattern[str]
    """If it has a group, a match without this group is no credential."""


_SECRETS = tuple(
    _Secret(kind, mark, re.compile(pattern))
    for kind, mark, pattern in (
        ("private_key", "-----BEGIN ", _PRIVATE_KEY),
        ("api_key", "hf_", r"hf_[A-Za-z0-9]{16,}"),  # Hugging Face tokens
        # keys of OpenAI-compatible services
        ("api_key", "sk-", _beginning_a_word("sk-") + "[A-Za-z0-9_-]{16,}"),
        ("api_key", "IA", r"A(?:KIA|SIA)[A-Z0-9]{16}"),  # AWS access keys
        ("api_key", "LTAI", r"LTAI[A-Za-z0-9]{12,}"),  # Alibaba Cloud
        ("api_key", "AKID", r"AKID[A-Za-z0-9]{12,}"),  # Tencent Cloud
        ("api_key", "AIza", r"AIza[A-Za-z0-9_-]{35}"),  # Google
        ("api_key", "gh", r"gh[pousr]_[A-Za-z0-9]{30,}"),  # GitHub tokens
        ("api_key", "github_pat_", r"github_pat_[A-Za-z0-9_]{40,}"),
        ("api_key", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),  # GitLab
        ("api_key", "xox", r"xox[abeprs]-[A-Za-z0-9-]{10,}"),  # Slack
        ("api_key", "k_", r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"),  # Stripe
        ("api_key", "npm_", r"npm_[A-Za-z0-9]{36}"),  # package registries
        ("api_key", "pypi-", r"pypi-AgE[A-Za-z0-9_-]{40,}"),
        ("api_key", "eyJ", _JSON_WEB),
        # user:password in a URL
        ("password_url", "://", r"[^/\s:@](?<=://.)[^/\s:@]*+:[^/\s@]++(?=@)"),
        ("api_key", "earer ", r"[A-Za-z0-9._~+/-](?<=[Bb]earer .)[A-Za-z0-9._~+/-]{7,}=*"),
    )
)

MASK = "***"


def find_secrets(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield (kind, match) of everything that looks like a credential, in order; none overlap."""
    ahead = [
        (found, secret)
        for secret in _SECRETS
        if secret.mark in text and (found := _next_match(secret.pattern, text, 0))
    ]
    while ahead:
        first, secret = min(ahead, key=lambda one: one[0].start())  # of several, the first pattern
        yield secret.kind, first
        end = first.end()
        ahead = [
            (found, secret)
            for found, secret in (
                one if one[0].start() >= end else (_next_match(one[1].pattern, text, end), one[1])
                for one in ahead
            )
            if found
        ]


def _next_match(pattern: re.Pattern[str], text: str, start: int) -> re.Match[str] | None:
    matches = pattern.finditer(text, start)
    return next((found for found in matches if not pattern.groups or found[1]), None)


def mask_secrets(text: str) -> str:
    """Replace everything in `text` that looks like a credential by ***."""
    parts, end = [], 0
    for _, found in find_secrets(text):
        parts += [text[end : found.start()], MASK]
        end = found.end()
    return "".join(parts) + text[end:] if parts else text


def secret_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of everything in `text` that looks like a credential."""
    return [found.span() for _, found in find_secrets(text)]


def mask_values(value: Any) -> Any:
    """Return JSON-compatible values with every text in them masked, names of fields included."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, Mapping):
        return {mask_secrets(str(name)): mask_values(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_values(inner) for inner in value]
    return value


class ConsoleFormatter(logging.Formatter):
    """Formats a record as `12:00:01 INFO    train: step 20 ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record, with its traceback if it has one."""
        record = logging.makeLogRecord(record.__dict__)
        record.name = record.name.removeprefix(f"{ROOT}.")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: time, level, logger, message, traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as one line of JSON."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_text:
            entry["traceback"] = record.exc_text
        return json.dumps(entry, ensure_ascii=False)


def get_logger(name: str) -> logging.Logger:
    """Return the logger `qwen3ft.<name>`; whatever it logs is masked and fit to be shown."""
    logger = logging.getLogger(f"{ROOT}.{name}")
    logger.addFilter(_make_plain)  # no effect the second time
    return logger


def _make_plain(record: logging.LogRecord) -> bool:
    """Mask a record before any handler sees it; Prefect's handlers do not mask."""
    record.msg, record.args = escaped(mask_secrets(record.getMessage())), None
    if record.exc_info:
        traceback = logging.Formatter().formatException(record.exc_info)
        record.exc_text = escaped(mask_secrets(traceback))  # formatters use it if it is there
    return True


def mask_logger(name: str) -> None:
    """Mask what a logger of a library is given, such as Prefect's, before its handlers send it."""
    logging.getLogger(name).addFilter(_make_plain)


@contextmanager
def without_secrets() -> Iterator[None]:
    """Let errors leave the body, or a function that this decorates, only with secrets masked.

    Prefect shows and stores what they say. One that quotes a secret, or what steers a terminal,
    becomes a RuntimeError with its name and the masked text.
    """
    try:
        yield
    except Exception as error:  # every error, to see what it quotes
        shown = escaped(mask_secrets(str(error)))
        if shown == str(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {shown}") from None


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
    # without any handler, warnings go to standard error
    handlers: list[logging.Handler] = [logging.NullHandler()]
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
    # PEFT uses the old name of a property; transformers then warns the user about it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
