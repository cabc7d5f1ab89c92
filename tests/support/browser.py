"""A headless Chromium whose requests and console errors are watched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from deployments.services import Layout

VARIABLE = "QWEN3FT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOT_INSTALLED = f"no Chromium: apt install chromium, or {VARIABLE}=/path/to/chrome"

RESOLVED = (
    "MAP rebound.example 127.0.0.1",
    *("MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1", "EXCLUDE localhost"),
)
FLAGS = (
    "--no-sandbox",  # needs rights that a container lacks; the pages are our own
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--process-per-site",  # a process keeps what it has compiled of the servers' large scripts
    # requests to other machines are noticed, and do not get there; one name leads back here
    f"--host-resolver-rules={', '.join(RESOLVED)}",
)
NO_WEBGL = ("--disable-gpu",)
WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""Drawn by the CPU, for pages whose pictures somebody will look at; takes several times longer."""

LOOPBACK = ("127.0.0.1", "localhost")

THEIR_OWN = re.compile(
    r"/mlflow/users/current$"  # answered only by a server with passwords
    r"|/favicon[^/]*$|/[a-z]+\.svg$"  # requested where Prefect does not have them
    r"|/api/task_runs/filter$"  # with no id, for an artifact of a flow run
    r"|Content Security Policy"  # requests that `deployments.pages` blocks
    r"|ResizeObserver loop"
    r"|/mlflow/assistant/[a-z]+$"  # switched off by `deployments.mlflow_server`
    # Prefect's graph of a run, where the address asks for another tab before it is drawn, also if
    # a link of that tab was followed meanwhile
    r"|^Cannot read properties of null \(reading '(addChild|x)'\) "
    r"\S+/(flow-run/\S+[?&]tab=Artifacts|artifacts/key/\S+)"
)
"""Errors that MLflow and Prefect cause themselves, by text and address."""
WIDTH, HEIGHT = 1400, 1000

PICTURES = Path(__file__).parents[2] / "test-output" / "browser"
"""Screenshots of the tests; ignored by git."""

# MLflow opens a chat about its traces on the first visit; frames have no storage
FIRST_VISIT_IS_OVER = """if (window === window.top) {
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
}"""


def find_chromium() -> str | None:
    """Return the installed browser, if any."""
    asked = os.environ.get(VARIABLE)
    return asked or next(filter(None, map(shutil.which, NAMES)), None)


class WatchedBrowser:
    """One browser; each visit is a new page, and leaves a screenshot in `folder`.

    Args:
        browser: The Chromium.
        folder: Folder for screenshots, made if need be.
        dark: Whether pages are asked for their dark colours.
        wait_seconds: Longest wait for what a page is to show.
    """

    def __init__(
        self, browser: Browser, folder: Path, *, dark: bool = False, wait_seconds: float = 20.0
    ) -> None:
        self._browser = browser
        self._context = browser.new_context(
            viewport={"width": WIDTH, "height": HEIGHT},
            timezone_id="UTC",
            locale="en-GB",
            color_scheme="dark" if dark else "light",
        )
        self._context.add_init_script(FIRST_VISIT_IS_OVER)
        self._context.set_default_timeout(1000 * wait_seconds)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def stranger(self) -> WatchedBrowser:
        """Return one without cookies in the same Chromium, which takes seconds to start."""
        return WatchedBrowser(self._browser, self._folder)

    def sign_in(self, layout: Layout) -> None:
        """Open the link that the terminal shows once; after that both servers know the browser.

        A page stays open on which nothing moves, or their process would end with each other page.
        """
        page = self._context.new_page()
        page.goto(layout.sign_in_link(layout.ui_url))
        page.goto(f"{layout.url('prefect')}/api/health")

    @contextmanager
    def visit(self, url: str, name: str, wait_for: str) -> Iterator[Page]:
        """Open `url` and wait for the text `wait_for`; at the end save a screenshot, `name`.png.

        Raises:
            AssertionError: the page made a request to another machine, or logged an error.
        """
        page = self._context.new_page()
        foreign, errors = _watch(page)
        try:
            page.goto(url)
            page.get_by_text(wait_for).first.wait_for()
            yield page
        finally:
            self.keep(page, name)
            page.close()
        assert not foreign, f"{name} makes requests to other machines: {foreign}"
        assert not errors, f"{name} logs errors: {errors}"

    def new_page(self) -> Page:
        """Open a page whose errors and requests do not matter."""
        return self._context.new_page()

    def keep(self, page: Page, name: str) -> Path:
        """Save a screenshot."""
        path = self._folder / f"{name}.png"
        page.screenshot(path=path, animations="disabled")
        return path


def _watch(page: Page) -> tuple[list[str], list[str]]:
    """Return a page's requests to other machines and its errors; both lists grow as they occur."""
    foreign: list[str] = []
    errors: list[str] = []

    def requested(request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob"} and parts.hostname not in LOOPBACK:
            foreign.append(request.url)

    def logged(message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location['url']}"
        if message.type == "error" and not THEIR_OWN.search(text):
            errors.append(text)

    page.on("request", requested)
    page.on("console", logged)

    def raised(error: Exception) -> None:
        text = f"{error} {page.url}"
        if not THEIR_OWN.search(text):
            errors.append(text)

    page.on("pageerror", raised)
    return foreign, errors


@contextmanager
def open_chromium(flags: Sequence[str]) -> Iterator[Browser]:
    """Open a headless Chromium with these flags besides those of `FLAGS`."""
    options: dict[str, Any] = {"executable_path": find_chromium(), "args": [*FLAGS, *flags]}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@contextmanager
def open_browser(folder: Path) -> Iterator[WatchedBrowser]:
    """Open a headless browser that keeps its screenshots in `folder`."""
    with open_chromium(NO_WEBGL) as browser:
        yield WatchedBrowser(browser, folder)
