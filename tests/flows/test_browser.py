"""Both UIs in a real browser, on a real run: form, links, artifacts; nothing leaves the machine.

Screenshots are kept in test-output/browser/*.png.
"""

from __future__ import annotations

import html
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
from playwright.sync_api import Page
from support.browser import NOT_INSTALLED, PICTURES, WatchedBrowser, find_chromium, open_browser
from support.flow_project import MODEL, FlowProject
from support.mlflow_server import wait_until
from support.registered import add_version

from deployments.prefect_api import send
from deployments.secret import authorization
from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.registry.moves import Change, Mover
from tasks.artifacts import MLFLOW_RUN, RUN_CARD

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason=NOT_INSTALLED),
    pytest.mark.timeout(600),
]

FIELDS = """labels => labels.map(label => {
    const input = document.getElementById(label.htmlFor);
    return {
        title: label.textContent,
        description: label.nextElementSibling?.textContent,
        minimum: input?.min, maximum: input?.max, step: input?.step,
    };
})"""


@pytest.fixture(scope="module")
def run(finished: tuple[Any, RunDir]) -> RunDir:
    """Return the folder of the finished run."""
    return finished[1]


@pytest.fixture(scope="module")
def card(run: RunDir) -> dict[str, Any]:
    """Return its card."""
    found: dict[str, Any] = json.loads((run.path / "card.json").read_text())
    return found


@pytest.fixture(scope="module")
def browser(project: FlowProject, deployment: Any, champion: str) -> Iterator[WatchedBrowser]:
    """Open one browser for the module, once everything that it will show is there."""
    with open_browser(PICTURES) as opened:
        opened.sign_in(project.stack.layout())
        yield opened


def flow_run(project: FlowProject, run: RunDir) -> dict[str, Any]:
    """Return the server's record of the run."""
    found: dict[str, Any] = send(project.stack.layout(), f"flow_runs/{run.path.name}", method="GET")
    return found


def started_runs(project: FlowProject, deployment: dict[str, Any]) -> set[str]:
    """Return the ids of the deployment's runs."""
    of_it = {"deployments": {"id": {"any_": [deployment["id"]]}}}
    return {run["id"] for run in send(project.stack.layout(), "flow_runs/filter", of_it)}


# --- the form ---


def form_url(project: FlowProject, deployment: dict[str, Any]) -> str:
    """Return the page of a custom run."""
    return f"{project.stack.layout().ui_url}/deployments/deployment/{deployment['id']}/run"


def settings() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each setting's schema, and the schema of its values other than None."""
    schema = TrainingConfig.model_json_schema()
    columns = schema["$defs"]["ColumnNames"]["properties"].values()
    for field in (*schema["properties"].values(), *columns):
        choices = field.get("anyOf", [field])
        yield field, next(choice for choice in choices if choice.get("type") != "null")


def test_the_deployment_is_on_prefects_pages(
    browser: WatchedBrowser, project: FlowProject, deployment: dict[str, Any]
) -> None:
    """It is there by name, with its schedule; the front page leads to the same UI as links do."""
    with browser.visit(project.stack.layout().url("prefect"), "prefect-front", "Dashboard") as page:
        assert page.url.startswith(project.stack.layout().ui_url)
        page.get_by_role("link", name="Deployments").click()
        page.get_by_role("link", name="default", exact=True).first.click()
        page.get_by_text("At 02:00 AM").wait_for()
        page.get_by_role("tab", name="Description").click()
        page.get_by_text(deployment["description"]).wait_for()


def test_every_setting_is_in_the_form_with_description_bounds_and_choices(
    browser: WatchedBrowser, project: FlowProject, deployment: dict[str, Any]
) -> None:
    """They are those of the schema in the code; every setting has a description."""
    with browser.visit(form_url(project, deployment), "prefect-form", "Max Memory Gb") as page:
        labels = page.locator("label[data-slot=label]")
        shown = {field["title"]: field for field in labels.evaluate_all(FIELDS)}
        offered = {field["title"]: choices_of(page, field) for field, _ in with_choices()}
    for field, value in settings():
        there = shown[f"{field['title']} (Optional)"]
        assert " ".join(field["description"].split()) == there["description"]
        if value is field and value.get("type") in {"integer", "number"}:
            for bound in ("minimum", "maximum"):
                asked = str(field[bound]) if bound in field else ""
                assert there[bound] == asked.removesuffix(".0"), field
            assert there["step"] == ("1" if field["type"] == "integer" else "any")
    assert offered == {field["title"]: choices for field, choices in with_choices()}
    for name in ("config", "continue_run", "nightly", "resumed"):
        assert shown[f"{name} (Optional)"]["description"]


def with_choices() -> list[tuple[dict[str, Any], list[str]]]:
    """Return the settings that take one or several words of a list, and the list."""
    found = [
        (field, value.get("enum") or value.get("items", {}).get("enum"))
        for field, value in settings()
    ]
    return [(field, choices) for field, choices in found if choices]


def choices_of(page: Page, field: dict[str, Any]) -> list[str]:
    """Return the choices that the form offers for a setting."""
    label = page.locator("label").get_by_text(f"{field['title']} (Optional)", exact=True)
    page.locator(f'[id="{label.get_attribute("for")}"]').click()
    options = page.get_by_role("option")
    options.first.wait_for()
    offered = options.all_inner_texts()
    page.keyboard.press("Escape")
    options.first.wait_for(state="detached")
    return offered


def test_a_value_out_of_bounds_is_refused_by_the_form_and_what_is_in_bounds_starts_a_run(
    browser: WatchedBrowser, project: FlowProject, deployment: dict[str, Any], champion: str
) -> None:
    """The first starts no run; one click on the second does, and the worker finds nothing new."""
    layout, before = project.stack.layout(), started_runs(project, deployment)
    with browser.visit(form_url(project, deployment), "prefect-submitted", "Gate Metric") as page:
        budget = page.get_by_label("Max Memory Gb")
        budget.fill("0.1")
        page.get_by_role("button", name="Submit").click()
        said = budget.evaluate("input => input.validationMessage")
        assert "greater than or equal to 0.5" in said
        browser.keep(page, "prefect-refused")
        assert started_runs(project, deployment) == before
        budget.fill("4")
        page.get_by_label("When Unchanged").click()
        page.get_by_role("option", name="skip").click()
        page.get_by_role("option").first.wait_for(state="detached")
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("At 02:00 AM").wait_for()  # the deployment's page
    [started] = started_runs(project, deployment) - before
    # The id of a run is only in its logs, which a page that opens after its end may not have yet.
    with browser.visit(layout.flow_run_url(started), "prefect-nothing-new", "Work Queue") as page:
        page.get_by_text("Nothing new").first.wait_for(timeout=120_000)
    of_it = {"logs": {"flow_run_id": {"any_": [started]}}, "limit": 200}
    wait_until(lambda: send(layout, "logs/filter", of_it), 30)  # logs are sent after the state
    logged = {line["name"].partition(".")[0] for line in send(layout, "logs/filter", of_it)}
    assert logged == {"qwen3ft"}, "Prefect's own lines"


# --- the run ---


def test_the_runs_page_lists_its_tasks_and_its_artifacts(
    browser: WatchedBrowser, project: FlowProject, run: RunDir, card: dict[str, Any]
) -> None:
    """The card's link leads to it; every task run and every artifact of the run is there."""
    name, api = flow_run(project, run)["name"], project.stack.layout()
    mine = {"flow_runs": {"id": {"any_": [run.path.name]}}}
    tasks = {item["name"] for item in send(api, "task_runs/filter", mine)}
    artifacts = send(api, "artifacts/filter", mine)
    assert len(tasks) > 10
    with browser.visit(card["prefect_url"], "prefect-run", name) as page:
        assert page.url.startswith(api.ui_url)
        page.get_by_role("tab", name="Task Runs").click()
        for task in tasks:
            page.get_by_role("link", name=task, exact=True).first.wait_for()
        browser.keep(page, "prefect-tasks")
        page.get_by_role("tab", name="Artifacts").click()
        panel = page.get_by_role("tabpanel")
        for artifact in artifacts:
            panel.get_by_text(artifact["key"], exact=True).wait_for()


def artifact_url(project: FlowProject, run: RunDir, key: str) -> str:
    """Return the page of the run's artifact whose key contains `key`."""
    layout = project.stack.layout()
    mine = {
        "flow_runs": {"id": {"any_": [run.path.name]}},
        "artifacts": {"key": {"like_": key}},
    }
    [found] = send(layout, "artifacts/filter", mine)
    return f"{layout.ui_url}/artifacts/artifact/{found['id']}"


def test_the_card_is_read_in_prefect_and_leads_to_the_run_in_mlflow(
    browser: WatchedBrowser, project: FlowProject, run: RunDir, card: dict[str, Any]
) -> None:
    """It is text with tables; the link beside it opens the MLflow run of this run."""
    with browser.visit(artifact_url(project, run, RUN_CARD), "prefect-card", card["title"]) as page:
        page.get_by_role("table").nth(2).wait_for()
        page.get_by_text(card["verdict"]).first.wait_for()
    link = artifact_url(project, run, MLFLOW_RUN)
    with browser.visit(link, "mlflow-run", "This run") as page:
        target = page.get_by_role("link", name="This run in MLflow")
        assert target.get_attribute("href") == card["mlflow_url"]
        page.goto(str(target.get_attribute("href")))
        page.get_by_text("About this run").wait_for()
        page.get_by_role("heading", name=flow_run(project, run)["name"]).wait_for()
        assert page.get_by_text(run.path.name).count()


def test_every_link_of_the_card_answers(
    project: FlowProject, run: RunDir, card: dict[str, Any]
) -> None:
    """That holds for the markdown, which both UIs show, and for the HTML page."""
    signed_in = {"Authorization": authorization(project.stack.layout().secret)}
    text = html.unescape((run.path / "card.md").read_text() + (run.path / "card.html").read_text())
    links = set(re.findall(r"""(?:\]\(|href=["'])(https?://[^)"']+)""", text))
    assert {card["prefect_url"], card["mlflow_url"]} <= links
    for link in links:
        with urllib.request.urlopen(
            Request(link, headers={"Accept": "text/html", **signed_in})
        ) as answer:
            assert answer.status == 200


def test_a_run_opens_with_its_card_first(
    browser: WatchedBrowser, run: RunDir, card: dict[str, Any]
) -> None:
    """The link leads to the artifacts, the list says the verdict, and one click shows the card."""
    with browser.visit(card["prefect_url"], "prefect-artifacts", f"{RUN_CARD}-embedded") as page:
        panel = page.get_by_role("tabpanel").filter(has_text=RUN_CARD)
        first = panel.get_by_role("link").first
        first.get_by_text(card["outcome"]).wait_for()
        first.click()
        page.get_by_text(card["verdict"]).first.wait_for()
        page.get_by_text(run.path.name[:8]).first.wait_for()


# --- MLflow ---


def mlflow_url(project: FlowProject, page: str) -> str:
    """Return a page of MLflow, in its view of training."""
    return f"{project.tracking_uri}/#/{page}?workflowType=machine_learning"


def test_the_printed_page_shows_the_verdicts_of_the_runs(
    browser: WatchedBrowser, project: FlowProject, card: dict[str, Any]
) -> None:
    """It opens in the view of training, with the experiment's description and its columns."""
    url = project.stack.status().mlflow_page
    assert url is not None
    with browser.visit(url, "mlflow-front", "matching runs") as page:
        page.get_by_text("Its name begins with the verdict").wait_for()
        for header in ("verdict", "exact_match/candidate", "gain", "tokens_per_second"):
            page.get_by_role("columnheader", name=header, exact=True).first.wait_for()
        page.get_by_role("gridcell", name=card["outcome"], exact=True).first.wait_for()


def test_the_experiment_lists_the_run(
    browser: WatchedBrowser, project: FlowProject, run: RunDir, card: dict[str, Any]
) -> None:
    """It has the name that it has in Prefect; its attempts are below it."""
    experiment = re.search(r"experiments/(\d+)/", card["mlflow_url"])
    assert experiment
    url = mlflow_url(project, f"experiments/{experiment[1]}/runs")
    with browser.visit(url, "mlflow-runs", flow_run(project, run)["name"]) as page:
        assert page.get_by_text("matching runs").count()


def test_the_run_has_its_numbers_charts_tags_and_files(
    browser: WatchedBrowser, project: FlowProject, card: dict[str, Any]
) -> None:
    """The verdict is among the tags, the scores are a picture, and the card is a page."""
    with browser.visit(card["mlflow_url"], "mlflow-metrics", "About this run") as page:
        page.get_by_text("verdict", exact=False).first.wait_for()
        page.get_by_text("Show more").first.click()
        picture = page.locator("img[src*='scores.png']")
        picture.wait_for()
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
        assert page.get_by_text("Registered models").count()
        page.get_by_role("tab", name="Model metrics").click()
        page.get_by_text("exact_match").first.wait_for()
        browser.keep(page, "mlflow-charts")
        page.get_by_role("tab", name="Artifacts").click()
        page.get_by_text("card", exact=True).click()
        page.get_by_text("card.html").click()
        shown = page.frame_locator("iframe").get_by_text(card["title"]).first
        shown.wait_for()


@pytest.fixture
def two_versions(project: FlowProject, champion: str, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Yield the version in use and the one before it; afterwards roll back."""
    second = add_version(project.tracking_uri, tmp_path, "another-run")
    by_hand = Change(by=Mover(kind="person", name="a test"))
    project.registry.promote(MODEL, second, champion, by_hand)
    yield second, champion
    project.registry.rollback(MODEL, by_hand)


def test_the_registered_model_names_the_version_in_use_and_the_one_before(
    browser: WatchedBrowser, project: FlowProject, two_versions: tuple[str, str]
) -> None:
    """They are the aliases that `qwen3ft rollback` exchanges."""
    with browser.visit(mlflow_url(project, f"models/{MODEL}"), "mlflow-model", "Versions") as page:
        for version, alias in zip(two_versions, ("champion", "previous"), strict=True):
            row = page.get_by_role("row").filter(has_text=f"Version {version}")
            row.get_by_text(alias).wait_for()
