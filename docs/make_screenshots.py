"""Take the screenshots of docs/reading.md: three nights of the embedded model in both UIs.

    python docs/make_screenshots.py [--root /tmp/qwen3ft-demo] [--out docs/screenshots]

Starts servers and a worker of its own in the folder `--root`, registers the deployment, and runs
three nights: one that is promoted, one with new rows that runs out of memory (a planted fault)
before it is promoted, and one with shuffled answers, which is kept out. Then a headless Chromium,
with WebGL drawn by the CPU, takes the screenshots in light and dark colours. Rows in Chinese are
left out, because not every machine has the fonts. Takes about 3 minutes on two cores and leaves
nothing but the screenshots.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image  # noqa: E402
from playwright.sync_api import Locator, Page  # noqa: E402
from support.browser import WEBGL, WIDTH, WatchedBrowser, open_chromium  # noqa: E402

from benchmarks.gate.nights import PRODUCTS, clean_rows, shuffled, write_rows  # noqa: E402
from benchmarks.overhead import make_project, run_once  # noqa: E402
from deployments.deploy import CPU_CONFIG, deploy  # noqa: E402
from deployments.prefect_api import read_deployment, send  # noqa: E402
from deployments.stack import Stack  # noqa: E402
from qwen3ft import faults  # noqa: E402
from qwen3ft.tracking.experiment import TRAINING_VIEW  # noqa: E402
from tasks.artifacts import RUN_CARD  # noqa: E402

MODEL = "products"
FIRST = PRODUCTS[:4]
OUT_OF_MEMORY = "oom@step=90"
FAULTS = "faults.txt"
MOST_BYTES = 200_000
PAGE_SECONDS = 120.0
DRAWN_COLOURS = 60
TWO_CHARTS_PIXELS = 1080
"""Height of a page of MLflow that shows two rows of charts."""
REDRAWN_MILLISECONDS = 2000
"""Time after which MLflow no longer redraws an HTML artifact and scrolls it back to the top."""
SETTINGS = {
    "name": MODEL,
    "data_paths": ["data"],
    "num_epochs": 40,
    "max_steps": 300,
    "evaluate_every_steps": 60,
    "early_stopping_patience": 5,
    "max_memory_gb": 4.0,
}


def english_rows(split: str, products: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the embedded model's rows about these products, without those in Chinese."""
    return [row for row in clean_rows(split, products) if row["question"].isascii()]


def write_project(root: Path) -> None:
    """Make a project folder with settings and held-out rows, and no training data yet."""
    make_project(root)
    held_out = root / "held-out"
    for folder in (held_out, root / "data"):
        folder.mkdir()
    paths = {
        f"{split}_paths": [write_rows(held_out / f"{split}.jsonl", english_rows(split, PRODUCTS))]
        for split in ("dev", "test")
    }
    config = yaml.safe_load((root / CPU_CONFIG).read_text(encoding="utf-8"))
    changed = yaml.safe_dump({**config, **SETTINGS, **paths})
    (root / CPU_CONFIG).write_text(changed, encoding="utf-8")


def run_nights(stack: Stack) -> dict[str, str]:
    """Run the three nights; return run ids by what each night shows."""
    data = stack.root / "data"
    rows = english_rows("train", FIRST)
    write_rows(data / "monday.jsonl", rows)
    promoted = run_once(stack, {"nightly": True})
    write_rows(data / "tuesday.jsonl", english_rows("train", PRODUCTS[len(FIRST) :]))
    planted = stack.root / FAULTS
    planted.write_text(OUT_OF_MEMORY, encoding="utf-8")
    recovered = run_once(stack, {"nightly": True})
    planted.write_text("", encoding="utf-8")
    write_rows(data / "wednesday.jsonl", shuffled(rows, Random("wednesday")))
    kept = run_once(stack, {"nightly": True})
    for night, verdict in ((promoted, "promoted"), (recovered, "promoted"), (kept, "kept")):
        if not night["message"].startswith(verdict):
            sys.exit(f"not {verdict}: {night['message']}")
    return {"promoted": promoted["id"], "recovered": recovered["id"], "kept": kept["id"]}


def take_pictures(stack: Stack, nights: dict[str, str], folder: Path) -> None:
    """Take every screenshot of docs/reading.md, the most telling ones in dark colours, too."""
    cards = {name: _read_card(stack, run) for name, run in nights.items()}
    with open_chromium(WEBGL) as chromium:
        for dark in (False, True):
            browser = WatchedBrowser(chromium, folder, dark=dark, wait_seconds=PAGE_SECONDS)
            browser.sign_in(stack.layout())
            pages = Pages(browser, stack, "-dark" if dark else "")
            pages.all_nights(cards["kept"])
            pages.run_in_prefect("recovered", cards["recovered"])
            pages.card_in_prefect("kept", cards["kept"])
            pages.run_in_mlflow("promoted", cards["promoted"])
            pages.charts_in_mlflow("recovered", cards["recovered"])
            pages.card_in_mlflow("recovered", cards["recovered"], "attempts")
            if not dark:
                pages.form()
                pages.card_in_prefect("promoted", cards["promoted"])
                pages.card_in_mlflow("promoted", cards["promoted"], "answers")
                pages.card_in_mlflow("kept", cards["kept"], "scores")


def _read_card(stack: Stack, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stack.root / "runs" / run / "card.json").read_text("utf-8"))
    return found


class Pages:
    """Pages of one stack; each becomes a picture named after UI, page, night and colours."""

    def __init__(self, browser: WatchedBrowser, stack: Stack, ending: str) -> None:
        self._browser, self._ending = browser, ending
        self._stack, self._layout = stack, stack.layout()

    def _visit(self, url: str, name: str, wait_for: str) -> AbstractContextManager[Page]:
        return self._browser.visit(url, f"{name}{self._ending}", wait_for)

    def form(self) -> None:
        """Show the form of a custom run."""
        deployment = read_deployment(self._stack.layout())
        assert deployment is not None
        url = f"{self._layout.ui_url}/deployments/deployment/{deployment['id']}/run"
        with self._visit(url, "prefect-form", "Max Memory Gb"):
            pass

    def run_in_prefect(self, night: str, card: dict[str, Any]) -> None:
        """Show a run as its link opens: the stages as bars, and the card among the artifacts."""
        with self._visit(card["prefect_url"], f"prefect-run-{night}", RUN_CARD) as page:
            _wait_until_drawn(page.locator("canvas").first)

    def card_in_prefect(self, night: str, card: dict[str, Any]) -> None:
        """Show the run card as an artifact of the run."""
        wanted = {
            "flow_runs": {"id": {"any_": [card["run_id"]]}},
            "artifacts": {"key": {"like_": RUN_CARD}},
        }
        [artifact] = send(self._layout, "artifacts/filter", wanted)
        url = f"{self._layout.ui_url}/artifacts/artifact/{artifact['id']}"
        with self._visit(url, f"prefect-card-{night}", card["title"]) as page:
            page.get_by_role("table").first.wait_for()

    def run_in_mlflow(self, night: str, card: dict[str, Any]) -> None:
        """Show verdict and scores, tags, and the registered version."""
        with self._visit(card["mlflow_url"], f"mlflow-run-{night}", "About this run") as page:
            page.get_by_text("Show more").first.click()
            page.locator("img[src*='scores.png']").wait_for()
            page.wait_for_timeout(REDRAWN_MILLISECONDS)

    def charts_in_mlflow(self, night: str, card: dict[str, Any]) -> None:
        """Show the curves of a run: memory, loss and speed."""
        url = card["mlflow_url"].replace("?", "/model-metrics?")
        with self._visit(url, f"mlflow-charts-{night}", "Auto-refresh") as page:
            page.set_viewport_size({"width": WIDTH, "height": TWO_CHARTS_PIXELS})
            page.get_by_placeholder("Search metric charts").fill("train/|process_gb")
            for curve in ("process_gb", "loss", "tokens_per_second"):
                page.get_by_text(curve, exact=True).first.wait_for()
            page.locator(".js-plotly-plot svg").nth(2).wait_for()
            page.wait_for_timeout(REDRAWN_MILLISECONDS)

    def card_in_mlflow(self, night: str, card: dict[str, Any], part: str) -> None:
        """Show the run card as an HTML artifact, scrolled to one of its parts."""
        url = card["mlflow_url"].replace("?", "/artifacts?")
        with self._visit(url, f"mlflow-card-{night}", "card") as page:
            page.get_by_text("card", exact=True).click()
            page.get_by_text("card.html").click()
            heading = page.frame_locator("iframe").locator(f"#{part}")
            heading.wait_for()
            page.wait_for_timeout(REDRAWN_MILLISECONDS)
            heading.evaluate("heading => heading.scrollIntoView()")

    def all_nights(self, card: dict[str, Any]) -> None:
        """Show all nights side by side: runs in both UIs, and versions."""
        name = f"{card['outcome']}: embedded"
        with self._visit(f"{self._layout.ui_url}/runs", "prefect-nights", name):
            pass
        runs = self._stack.status().mlflow_page
        assert runs is not None
        with self._visit(runs, "mlflow-nights", name) as page:
            page.get_by_role("columnheader", name="verdict", exact=True).first.wait_for()
            page.get_by_role("gridcell", name=card["outcome"], exact=True).first.wait_for()
        model = f"{self._layout.url('mlflow')}/#/models/{MODEL}?{TRAINING_VIEW}"
        with self._visit(model, "mlflow-model", "Version 3"):
            pass


def _wait_until_drawn(canvas: Locator) -> None:
    """Wait until there is more on a canvas than its background."""
    end = time.monotonic() + PAGE_SECONDS
    canvas.wait_for()
    while True:
        colours = Image.open(BytesIO(canvas.screenshot())).convert("RGB").getcolors(1 << 20)
        if colours is not None and len(colours) >= DRAWN_COLOURS:
            return
        if time.monotonic() > end:
            sys.exit("the graph of the run stays empty")
        canvas.page.wait_for_timeout(REDRAWN_MILLISECONDS)


def compress(picture: Path) -> int:
    """Rewrite `picture` with a palette, small enough for a repository; return its size in bytes."""
    image = Image.open(picture).convert("RGB")
    for colours in (256, 128, 64, 32):
        image.quantize(colours).save(picture, optimize=True)
        if picture.stat().st_size <= MOST_BYTES:
            break
    return picture.stat().st_size


@contextmanager
def demo(root: Path) -> Iterator[Stack]:
    """Run a stack in the new folder `root`, which is removed afterwards."""
    if root.exists():
        sys.exit(f"{root} exists.")
    root.mkdir(parents=True)
    stack = Stack(root, {"prefect": 4200, "mlflow": 5000})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ[faults.VARIABLE] = f"@{root / FAULTS}"  # for the worker, and with it for runs
    (root / FAULTS).touch()
    try:
        write_project(root)
        stack.up(print)
        deploy(stack, print)
        yield stack
    finally:
        stack.down()
        shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    """Run the nights and keep the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("/tmp/qwen3ft-demo"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    arguments = parser.parse_args()
    with demo(arguments.root.resolve()) as stack:
        nights = run_nights(stack)
        take_pictures(stack, nights, arguments.out)
    for picture in sorted(arguments.out.glob("*.png")):
        print(f"{compress(picture):9,} {picture.name}")


if __name__ == "__main__":
    main()
