"""Texts of users as a page may show them: nothing secret, nothing that rearranges the page.

Guarantees: pure; credentials and personal data are masked before a text is cut, so that half of one
is never shown; controls and the marks that override the direction of writing are gone, so what is
read is what is there. Escaping for HTML or markdown is the business of whoever writes those.
"""

from __future__ import annotations

import re

QUESTION_CHARACTERS = 300
ANSWER_CHARACTERS = 600
EXAMPLE_CHARACTERS = 160


_MARKDOWN = re.compile(r"([\\`*_\[\]|~])|(?<=:)(/)(?=/)|(?<=\bwww)(\.)")
_LINE_START = re.compile(r"^(?:[-+#>=]|[0-9]+(?=[.)](?:\s|$)))")


def escape_markdown(text: str) -> str:
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
