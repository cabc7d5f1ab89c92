"""A headless Chromium whose pages are watched: what they ask for, and what they complain about."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

VARIABLE = "QWEN3FT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOT_INSTALLED = f"no Chromium: apt install chromium, or {VARIABLE}=/path/to/chrome"

FLAGS = (
    "--no-sandbox",  # needs rights that a container lacks; the pages are our own
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # what a page asks of another machine is noticed, and does not get there
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
LOOPBACK = ("127.0.0.1", "localhost")

THEIR_OWN = re.compile(
    r"/mlflow/users/current$"  # answered only by a server with passwords
    r"|/favicon[^/]*$|/[a-z]+\.svg$"  # looked for where Prefect does not have them
    r"|/api/task_runs/filter$"  # with no id, for an artifact of a flow run
    r"|Content Security Policy"  # what `deployments.pages` keeps Prefect from asking
    r"|ResizeObserver loop"
)
"""Complaints that MLflow and Prefect cause themselves, by text and address."""
WIDTH, HEIGHT = 1400, 1000

PICTURES = Path(__file__).parents[2] / "test-output" / "browser"
"""What tests have seen; ignored by git."""

# MLflow opens a chat about its traces on the first visit; pages inside pages have no storage
FIRST_VISIT_IS_OVER = """if (window === window.top) {
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
}"""


def find_chromium() -> str | None:
    """The browser that is installed, if any."""
    asked = os.environ.get(VARIABLE)
    return asked or next(filter(None, map(shutil.which, NAMES)), None)


class WatchedBrowser:
    """One browser; each visit is a page of its own, kept as a picture in `folder`."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self._context = browser.new_context(
            viewport={"width": WIDTH, "height": HEIGHT}, timezone_id="UTC", locale="en-GB"
        )
        self._context.add_init_script(FIRST_VISIT_IS_OVER)
        self._context.set_default_timeout(20_000)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def visit(self, url: str, name: str, wait_for: str) -> Iterator[Page]:
        """The page at `url`, once the text `wait_for` is there; at the end it becomes `name`.png.

        Raises:
            AssertionError: it asked another machine for something, or complained.
        """
        page = self._context.new_page()
        asked, complaints = _watch(page)
        try:
            page.goto(url)
            page.get_by_text(wait_for).first.wait_for()
            yield page
        finally:
            self.keep(page, name)
            page.close()
        assert not asked, f"{name} asks other machines: {asked}"
        assert not complaints, f"{name} complains: {complaints}"

    def keep(self, page: Page, name: str) -> Path:
        """A picture of what is seen now."""
        path = self._folder / f"{name}.png"
        page.screenshot(path=path, animations="disabled")
        return path


def _watch(page: Page) -> tuple[list[str], list[str]]:
    """What `page` asks other machines for, and what it complains about, as it happens."""
    asked: list[str] = []
    complaints: list[str] = []

    def requested(request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob"} and parts.hostname not in LOOPBACK:
            asked.append(request.url)

    def said(message: ConsoleMessage) -> None:
        told = f"{message.text} {message.location['url']}"
        if message.type == "error" and not THEIR_OWN.search(told):
            complaints.append(told)

    page.on("request", requested)
    page.on("console", said)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return asked, complaints


@contextmanager
def open_browser(folder: Path) -> Iterator[WatchedBrowser]:
    """A headless browser that keeps its pictures in `folder`."""
    options: dict[str, Any] = {"executable_path": find_chromium(), "args": list(FLAGS)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield WatchedBrowser(browser, folder)
        browser.close()
