"""Which row goes where: repeats dropped, held-out questions kept out of training, rows held out.

Guarantees: pure functions of the rows; no question is ever both trained on and held out; whether a
question is held out depends on its text alone, so it stays where it is as the data grows (but for
the few rows of a set so small that the hash holds out none).
Questions count as the same when they differ only in white space or Unicode composition. It does not
find paraphrases.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from qwen3ft.rows import QaRow
from qwen3ft.sources import Role

DUPLICATE = "duplicate"
LEAKAGE = "held-out leakage"

HELD_OUT_ROLES: tuple[Role, ...] = ("test", "dev")
"""Most protected first: a question of the test rows is kept out of dev as well."""


def question_key(question: str) -> bytes:
    """sha256 of the question, blind to white space and Unicode composition."""
    text = " ".join(unicodedata.normalize("NFC", question).split())
    return hashlib.sha256(text.encode()).digest()


def position(key: bytes) -> float:
    """Where a question stands between 0 and 1; uniform, and fixed for all time."""
    return int.from_bytes(key[:8], "big") / 2**64


def drop_repeats(rows: Sequence[QaRow]) -> tuple[list[QaRow], list[tuple[QaRow, str]]]:
    """Keep each row once, and no question in two roles.

    Returns:
        The rows kept, in their order, and those dropped, each with `DUPLICATE` (question, answer
        and reasoning occurred before in the role) or `LEAKAGE` (the question belongs to the test
        or dev rows).
    """
    reasons: dict[int, str] = {}
    protected: set[bytes] = set()
    for role in (*HELD_OUT_ROLES, "train"):
        seen: set[bytes] = set()
        questions: set[bytes] = set()
        for number, row in enumerate(rows):
            if row["role"] != role:
                continue
            key, content = question_key(row["question"]), _content_key(row)
            if key in protected:
                reasons[number] = LEAKAGE
            elif content in seen:
                reasons[number] = DUPLICATE
            seen.add(content)
            questions.add(key)
        protected |= questions
    kept = [row for number, row in enumerate(rows) if number not in reasons]
    return kept, [(rows[number], reasons[number]) for number in sorted(reasons)]


def hold_out(questions: Sequence[str], fraction: float, roles: Iterable[Role]) -> list[Role]:
    """Assign each training row to `train` or to one of the held-out `roles`.

    The share `fraction` of the questions goes to the roles in equal parts. A role that the hash
    leaves empty gets the question that stands lowest, as long as two others remain.

    Args:
        questions: The question of each training row, in order.
        fraction: Share to hold out, 0 to 1.
        roles: Which of dev and test have no rows of their own; empty to hold out nothing.
    """
    missing = [role for role in HELD_OUT_ROLES if role in tuple(roles)]
    if not missing:
        return ["train"] * len(questions)
    keys = [question_key(question) for question in questions]
    share = fraction / len(missing)
    home: dict[bytes, Role] = {
        key: next(
            (role for place, role in enumerate(missing, 1) if position(key) < place * share),
            "train",
        )
        for key in keys
    }
    for role in missing:
        trained = sorted(key for key, assigned in home.items() if assigned == "train")
        if role not in home.values() and len(trained) > 1:
            home[trained[0]] = role
    return [home[key] for key in keys]


def _content_key(row: QaRow) -> bytes:
    digest = hashlib.sha256()
    for text in (row["question"], row["answer"], row["reasoning"]):
        digest.update(text.encode() + b"\0")
    return digest.digest()
