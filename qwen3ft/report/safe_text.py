"""Texts of users as a page may show them: nothing secret, nothing that rearranges the page.

Guarantees: pure; credentials and personal data are masked before a text is cut, so that half of one
is never shown; controls and the marks that override the direction of writing are gone, so what is
read is what is there. Escaping for HTML or markdown is the business of whoever writes those.
"""

from __future__ import annotations

import re
import unicodedata

from qwen3ft.data.safety import mask

QUESTION_CHARACTERS = 300
ANSWER_CHARACTERS = 600
EXAMPLE_CHARACTERS = 160

_LOOK_AHEAD = 4096
"""Characters behind the cut that are looked at: the longest secrets are private keys."""

_OVERRIDES = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks of Unicode's bidirectional algorithm; text in Arabic or Hebrew reads right without them."""

_MARKDOWN = re.compile(r"([\\`*_\[\]|~])|(?<=:)(/)(?=/)|(?<=\bwww)(\.)")
_LINE_START = re.compile(r"^(?:[-+#>=]|[0-9]+(?=[.)](?:\s|$)))")


def shown(text: str, most_characters: int) -> str:
    """`text` masked, without controls and direction marks, and cut with a note of how much."""
    looked_at = text[: most_characters + _LOOK_AHEAD]
    # Before masking: a control in the middle of a secret would hide it, and be gone afterwards.
    kept = mask("".join(character for character in looked_at if _is_plain(character))).strip()
    left_out = len(kept) - most_characters + max(0, len(text) - most_characters - _LOOK_AHEAD)
    if left_out <= 0:
        return kept
    return f"{kept[:most_characters].rstrip()} … ({left_out:,} more characters)"


def as_markdown(text: str) -> str:
    """`text` on one line, so that markdown shows it as it is.

    No tag, table, link, list, heading or emphasis comes of it, wherever on a line it is put.
    """
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    escaped = _MARKDOWN.sub(r"\\\g<0>", one_line)
    start = _LINE_START.match(escaped)
    if start is None:
        return escaped
    mark = start.group()
    return f"\\{escaped}" if not mark.isdigit() else f"{mark}\\{escaped[len(mark) :]}"


def _is_plain(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in _OVERRIDES
