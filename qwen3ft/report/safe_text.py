"""Write users' texts into markdown, and the lengths that the card cuts them to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

QUESTION_CHARACTERS = 300
ANSWER_CHARACTERS = 600
EXAMPLE_CHARACTERS = 160

# besides markup: "://" and "www.", which GitHub's flavour turns into links
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])|(?<=:)(/)(?=/)|(?<=\bwww)(\.)")
_LINE_START = re.compile(r"^(?:[-+#>=]|[0-9]+(?=[.)](?:\s|$)))")


def escape_markdown(text: str) -> str:
    """Return `text` on one line, escaped so that markdown shows it literally.

    It becomes no tag, table, link, list, heading or emphasis, wherever on a line it stands.
    """
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    escaped = _MARKDOWN.sub(r"\\\g<0>", one_line)
    start = _LINE_START.match(escaped)
    if start is None:
        return escaped
    mark = start.group()
    return f"\\{escaped}" if not mark.isdigit() else f"{mark}\\{escaped[len(mark) :]}"


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> list[str]:
    """Return the lines of a table whose cells are escaped; `right` names right-aligned columns."""
    rule = ["---:" if name in right else "---" for name in header]
    return [
        "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
        for cells in (header, rule, *rows)
    ]
