"""What the documents show and link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
MOST_PICTURE_BYTES = 200_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """Pages, pictures and folders; addresses elsewhere are not asked."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    here = {link for link in links if link and "://" not in link}
    assert [link for link in here if not (page.parent / link).exists()] == []


def test_every_picture_is_shown_and_small() -> None:
    """A repository keeps every picture for ever."""
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.name in shown
        assert picture.stat().st_size <= MOST_PICTURE_BYTES
