"""Splits of rows by their hashes: repeats, held-out rows, caps and samples.

A row's split depends only on the hash of its group, so that a held-out group stays held out as the
data grows (unless the hash holds out none, in tiny sets). What is left in training after
`find_repeats`, `hold_out` and `leaks` shares no question with a held-out row. A row takes 45 bytes
and, while rows are sorted, about 100 more.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from qwen3ft.records.data import Role
from qwen3ft.text.plain import normalized

ROLES: tuple[Role, ...] = ("train", "dev", "test")
"""Roles by their codes in the arrays; a higher code is the more protected."""
TRAIN, DEV, TEST = range(3)

HELD_OUT_ROLES: tuple[Role, ...] = ("test", "dev")
"""Held-out roles, the most protected first."""

DEV_NAMES = ("dev", "val", "valid", "validation", "eval", "evaluation")
"""Names under which data sets have what is held out during training."""

KEPT, DUPLICATE, LEAKAGE = range(3)

# Equal keys are taken for equal texts: two of a billion rows share one with probability 1e-21.
_KEY_BYTES = 16

Mask = NDArray[np.bool_]
Codes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

# Signs of arithmetic, code and names (C#, 50 %) tell questions apart; other punctuation does not.
_TELLING = "%&@#*/\\_"


def _is_blind(character: str) -> bool:
    kind = unicodedata.category(character)
    if unicodedata.normalize("NFKC", character) in _TELLING:
        return False
    return kind[0] == "P" or kind == "Cf" or character.isspace() or character in "~`´～"


_BLIND_CHARACTERS = [
    character
    for character in map(chr, chain(range(0x3100), range(0xFE10, 0xFF70)))
    if _is_blind(character)
]
_BLIND = re.compile(f"[{''.join(map(re.escape, _BLIND_CHARACTERS))}]+")
_BLIND_ASCII = {ord(character): None for character in _BLIND_CHARACTERS if character.isascii()}
_DIGIT = re.compile("[0-9０-９]")
_JOINTS = "-.,:/~－．，：／～"
_NUMBER = re.compile(f"[-.－．0-9０-９][{_JOINTS}0-9０-９]*")


def question_key(text: str) -> bytes:
    """Return 16 bytes that are the same for a question written in another way.

    White space, case, Unicode form (NFKC) and punctuation, Chinese too, do not matter. Numbers are
    hashed once more as they are written, so that 3-5, 3.5 and 35 stay apart. A text of nothing but
    punctuation is hashed as it is.
    """
    is_ascii = text.isascii()
    # Punctuation goes first: most texts then pass the quick check of NFKC.
    kept = text.translate(_BLIND_ASCII).lower() if is_ascii else _BLIND.sub("", text)
    numbers = ""
    if _DIGIT.search(kept):
        found = map(str.rstrip, _NUMBER.findall(text), repeat(_JOINTS))
        numbers = "\n" + " ".join(filter(None, found))
    if not is_ascii:
        composed = normalized("NFKC", kept)
        kept = (composed if composed == kept else _BLIND.sub("", composed)).casefold()
        numbers = normalized("NFKC", numbers)
    return _digest(kept + numbers if kept else text)


def asked_keys(questions: Sequence[str]) -> tuple[bytes, list[bytes]]:
    """Return the key of everything that a conversation asks, and those of what it asks earlier.

    A conversation is known by all of its questions, for its last one may be "Please continue." It
    gives away the answers of conversations that it begins with, and of each single question in it.
    """
    keys = [question_key(question) for question in questions]
    if len(keys) == 1:
        return keys[0], []
    whole = [_joined(keys[: end + 1]) for end in range(len(keys))]
    return whole[-1], [*whole[:-1], *keys[1:]]


def _joined(keys: Sequence[bytes]) -> bytes:
    """Return the key of questions in a row; that of a single one is its own."""
    if len(keys) == 1:
        return keys[0]
    return _digest_bytes(b"".join(keys))


def content_key(*texts: str) -> bytes:
    """Return 16 bytes that stand for all texts of a row, exactly as they are, each in its place."""
    # With the lengths, because a text may hold the separator.
    return _digest("\0".join(texts) + "\0".join(map(str, map(len, texts))))


def _digest_bytes(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()


def _digest(text: str) -> bytes:
    # Rows with lone surrogates are left out elsewhere.
    return _digest_bytes(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys of all n usable rows, in reading order."""

    question: Hashes
    """(n, 2): `question_key`, as little-endian numbers."""
    content: Hashes
    """(n, 2): `content_key`."""
    group: Hashes
    """(n,): hash of the row's source key; where it has none, the first half of its question key."""
    role: Codes
    """(n,): code in `ROLES` of the role of the row's file."""
    source: NDArray[np.uint32]
    """(n,): number of the row's file."""
    earlier: Hashes
    """(m, 2): keys of what conversations ask before their last question; see `asked_keys`."""
    earlier_row: NDArray[np.uint32]
    """(m,): number of the conversation."""

    def __len__(self) -> int:
        return len(self.role)


class KeysBuilder:
    """Collects the keys of rows without keeping Python objects for them."""

    def __init__(self) -> None:
        self._question = bytearray()
        self._content = bytearray()
        self._group = bytearray()
        self._role = bytearray()
        self._source = array("I")
        self._earlier = bytearray()
        self._earlier_row = array("I")

    def __len__(self) -> int:
        return len(self._role)

    def append(
        self,
        question: bytes,
        content: bytes,
        role: Role,
        source: int,
        group: str = "",
        earlier: Sequence[bytes] = (),
    ) -> None:
        """Add the next row by its keys; `source` is the number of its file, `group` may be ''."""
        for key in earlier:
            self._earlier += key
            self._earlier_row.append(len(self._role))
        self._question += question
        self._content += content
        # The prefix keeps a source key apart from a question of the same text.
        self._group += _digest(f"source key\0{group}")[:8] if group else question[:8]
        self._role.append(ROLES.index(role))
        self._source.append(source)

    def extend(self, other: KeysBuilder) -> None:
        """Add the rows of `other` behind those that are here."""
        rows = len(self)
        self._earlier_row.extend(rows + row for row in other._earlier_row)
        self._question += other._question
        self._content += other._content
        self._group += other._group
        self._role += other._role
        self._source += other._source
        self._earlier += other._earlier

    def build(self) -> Keys:
        """Return the keys of all rows so far; they share memory, so that no row can be added."""
        return Keys(
            question=_numbers(self._question).reshape(-1, 2),
            content=_numbers(self._content).reshape(-1, 2),
            group=_numbers(self._group),
            role=np.frombuffer(self._role, np.uint8),
            source=np.frombuffer(self._source, np.uint32),
            earlier=_numbers(self._earlier).reshape(-1, 2),
            earlier_row=np.frombuffer(self._earlier_row, np.uint32),
        )


def _numbers(data: bytearray) -> Hashes:
    """Return 8 bytes a number; the same numbers on every machine."""
    numbers = np.frombuffer(data, np.uint64)
    return numbers if sys.byteorder == "little" else numbers.byteswap()


def find_repeats(keys: Keys) -> Codes:
    """Keep each row once, and no question in two roles.

    Returns:
        (n,) `KEPT`, `DUPLICATE` (the content came before in the same role) or `LEAKAGE` (a more
        protected role has the question: test before dev before train).
    """
    everything = np.ones(len(keys), np.bool_)
    reasons = np.zeros(len(keys), np.uint8)
    # lexsort is stable: among equal contents the first in reading order comes first.
    order = np.lexsort((keys.role, keys.content[:, 1], keys.content[:, 0]))
    content, role = keys.content[order], keys.role[order]
    again = (content[1:] == content[:-1]).all(axis=1) & (role[1:] == role[:-1])
    reasons[order[1:][again]] = DUPLICATE
    reasons[leaks(keys, keys.role, everything)] = LEAKAGE
    return reasons


def leaks(keys: Keys, roles: Codes, mask: Mask) -> Mask:
    """Return the rows with a question, also an earlier one, of a row of a more protected role.

    Only rows of `mask` protect or leak. Needed again after `hold_out`: two groups of source keys
    may share a question.
    """
    rows = np.flatnonzero(mask)
    question, role = _identities(keys.question[rows]), roles[rows]
    strictest = np.zeros(len(rows), np.uint8)
    for code in (DEV, TEST):
        strictest[question[role == code]] = code
    result = np.zeros(len(keys), np.bool_)
    result[rows] = role < strictest[question]
    for code in (DEV, TEST):
        held_out = keys.question[mask & (roles == code), 0]
        asking = keys.earlier_row[np.isin(keys.earlier[:, 0], held_out)]
        result[asking[mask[asking] & (roles[asking] < code)]] = True
    return result


def hold_out(keys: Keys, kept: Mask, fraction: float, missing: Iterable[Role]) -> Codes:
    """Return (n,) the role of every row after training rows were held out; next comes `leaks`.

    The share `fraction` of the groups goes to the missing roles in equal parts. A role that the
    hash leaves empty gets the group with the lowest hash, as long as training keeps one.

    Args:
        keys: Keys of all rows.
        kept: (n,) rows that count; the others keep their role.
        fraction: Share of the groups to hold out, 0 to 1.
        missing: Roles (dev, test) without rows of their own; empty to hold out nothing.
    """
    roles = keys.role.copy()
    wanted = set(missing)
    empty = [ROLES.index(role) for role in HELD_OUT_ROLES if role in wanted]
    if not empty:
        return roles
    rows = np.flatnonzero(kept & (keys.role == TRAIN))
    groups, group_of = np.unique(keys.group[rows], return_inverse=True)
    position = groups / 2.0**64
    home = np.full(len(groups), TRAIN, np.uint8)
    share = fraction / len(empty)
    for place, code in enumerate(empty):
        home[(position >= place * share) & (position < (place + 1) * share)] = code
    for code in empty:
        trained = np.flatnonzero(home == TRAIN)
        if len(trained) > 1 and code not in home:
            home[trained[0]] = code
    roles[rows] = home[group_of]
    return roles


def cap_sources(keys: Keys, mask: Mask, most_rows: int) -> Mask:
    """Return the rows of `mask` that stay when no source may give more than `most_rows`.

    A source over its cap keeps the rows with the lowest content hashes: a sample in which a new
    row displaces at most one.
    """
    rows = np.flatnonzero(mask)
    low, high = keys.content[rows].T
    order = np.lexsort((low, high, keys.source[rows]))
    source = keys.source[rows[order]]
    rank = np.arange(len(rows)) - np.searchsorted(source, source)
    result = np.zeros(len(keys), np.bool_)
    result[rows[order[rank < most_rows]]] = True
    return result


def sample(keys: Keys, mask: Mask, count: int, seed: int) -> Mask:
    """Return `count` of the rows of `mask` (all, if there are fewer), chosen by seed and content.

    In a grown set the same rows are chosen, unless new ones with lower hashes displace them. A
    larger sample holds every smaller one of the same seed.
    """
    rows = np.flatnonzero(mask)
    salt = int.from_bytes(_digest(f"sample\0{seed}")[:8], "little")
    order = np.argsort(_mixed(keys.content[rows, 0] ^ np.uint64(salt)), kind="stable")
    result = np.zeros(len(keys), np.bool_)
    result[rows[order[:count]]] = True
    return result


def _identities(pairs: Hashes) -> NDArray[np.int32]:
    """Return (n,) a small number for each of the (n, 2) pairs, the same for equal ones alone."""
    # np.unique with an axis takes several times as long (measured on 300,000 pairs).
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    numbers = np.zeros(len(pairs), np.int32)
    ordered = pairs[order]
    numbers[order[1:]] = np.cumsum((ordered[1:] != ordered[:-1]).any(axis=1), dtype=np.int32)
    return numbers


def _mixed(values: Hashes) -> Hashes:
    """Mix with the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
