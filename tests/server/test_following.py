"""The server follows the champion: loaded, proven, made the default, while the old one drains."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest
from support.planted_adapters import plant
from support.registered import MODEL, copy_database, register_saved
from support.served import ENGINES, Running, engines_in_threads, keep_test_answers, running
from support.trained_adapter import Trained
from typer.testing import CliRunner

from flows.cli import app
from qwen3ft.config import TrainingConfig
from qwen3ft.records.serving import EngineName
from qwen3ft.registry.moves import Change, this_person
from qwen3ft.registry.registry import Registry
from qwen3ft.server import follower, trial
from qwen3ft.server.follower import NO_TRIALS, Canary, ChampionFollower
from qwen3ft.server.sources import find_source

SOON_SECONDS = 60.0
"""Time for what takes a second or two on a machine with nothing else to do; the campaign
`benchmarks.server.swap` holds it to 10 s."""
RESTART_SECONDS = {"own": SOON_SECONDS, "llama.cpp": 2 * SOON_SECONDS}
BY_HAND = Change(by=this_person(), reason="a test")


@dataclass
class Place:
    """A registry with two versions of which the answers are known."""

    config: TrainingConfig
    registry: Registry
    uri: str
    folder: Path
    answers: dict[str, list[str]]

    def promote(self, number: str) -> None:
        """Make a version the champion, by hand: a flow puts back nothing that was rolled back."""
        champion = self.registry.champion(MODEL)
        before = champion.version if champion else None
        self.registry.promote(MODEL, number, before, BY_HAND)


@pytest.fixture(scope="module")
def place(
    migrated_database: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    folder = tmp_path_factory.mktemp("place")
    uri = copy_database(migrated_database, folder)
    changes = {"name": MODEL, "cache_dir": str(folder / "cache"), "runs_dir": str(folder / "runs")}
    config = trained.config.model_copy(update=changes)
    moved = Trained(**{**vars(trained), "config": config})
    answers = {
        str(number): keep_test_answers(moved, saved)
        for number, saved in enumerate((trained.early, trained.saved), start=1)
    }
    for run, saved in (("night-0", trained.early), ("night-1", trained.saved)):
        register_saved(uri, folder, run, saved)
    return Place(config, Registry(uri), uri, folder, answers)


@pytest.fixture(params=ENGINES)
def server(
    place: Place, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Running]:
    """A server of version 1, which looks at the alias often."""
    monkeypatch.setattr(follower, "FOLLOW_SECONDS", 0.1)
    engines_in_threads(monkeypatch)
    place.promote("1")
    source = find_source(place.config, place.registry, "champion")
    with running(place.config, source, place.registry, follow=MODEL, engine=request.param) as made:
        yield made


def wait_for(server: Running, number: str) -> float:
    """Wait until a version answers; return the seconds."""
    started = time.monotonic()
    while (body := server.ask("Hello").json()).get("model") != f"{MODEL}-v{number}":
        assert "error" not in body, body
        assert time.monotonic() - started < SOON_SECONDS
        time.sleep(0.05)
    return time.monotonic() - started


def test_the_new_champion_answers_soon_and_nothing_fails_meanwhile(
    server: Running, place: Place, trained: Trained
) -> None:
    """Promotion, another one back, rollback: each answer is that of the version it names."""
    stop, wrong = threading.Event(), list[str]()
    seen: Counter[str] = Counter()
    questions = [row["question"] for row in trained.rows]

    def ask_on(first: int) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False) as client:
            number = first
            while not stop.is_set():
                number = (number + 1) % len(questions)
                body = {"messages": [{"role": "user", "content": questions[number]}]}
                response = client.post("/v1/chat/completions", json=body)
                if response.status_code != 200:
                    wrong.append(response.text)
                    continue
                name = response.json()["model"]
                answer = response.json()["choices"][0]["message"]["content"]
                seen[name] += 1
                if answer != place.answers[name.removeprefix(f"{MODEL}-v")][number]:
                    wrong.append(f"{name}: {answer}")

    with ThreadPoolExecutor(4) as pool:
        for first in range(4):
            pool.submit(ask_on, first)
        try:
            place.promote("2")
            wait_for(server, "2")
            place.registry.rollback(MODEL, BY_HAND, verify=False)
            wait_for(server, "1")
            place.promote("2")
            wait_for(server, "2")
        finally:
            stop.set()
    assert wrong == []
    assert set(seen) == {f"{MODEL}-v1", f"{MODEL}-v2"}
    listed = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert listed == [MODEL, f"{MODEL}-v2"]


def test_a_champion_that_answers_otherwise_than_tested_is_not_used(
    server: Running, place: Place
) -> None:
    """Its run kept other answers than it gives; the old version goes on, and metrics say so."""
    kept, others = (
        Path(place.config.runs_dir) / run / "jobs/inference/answers.jsonl"
        for run in ("night-1", "night-0")
    )
    tested = kept.read_bytes()
    kept.write_bytes(others.read_bytes())
    try:
        place.promote("2")
        deadline = time.monotonic() + SOON_SECONDS
        while 'changes_total{result="refused"} 1.0' not in server.client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.ask("Hello").json()["model"] == f"{MODEL}-v1"
        assert server.client.get("/health").json()["status"] == "ready"
    finally:
        kept.write_bytes(tested)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["own", "llama.cpp"])
def test_a_killed_worker_is_started_again(place: Place, engine: EngineName) -> None:
    """Requests fail cleanly until it is back, then are answered as before."""
    place.promote("1")
    source = find_source(place.config, place.registry, "champion")
    with running(place.config, source, place.registry, engine=engine) as server:
        assert server.ask("Hello").status_code == 200
        below = psutil.Process().children(recursive=True)
        [worker] = [process for process in below if process.name() == "qwen3ft-serve"]
        worker.kill()
        deadline = time.monotonic() + RESTART_SECONDS[engine]
        while (response := server.ask("Hello")).status_code != 200:
            assert response.status_code == 503
            assert response.json()["error"]["code"] in ("not_ready", "engine_lost")
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert response.json()["model"] == f"{MODEL}-v1"


def test_a_trial_moves_nothing_that_a_person_has_moved(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it claim a rollback that was not its own."""
    place.promote("2")
    new = place.registry.champion(MODEL)
    assert new is not None
    place.promote("1")
    before = place.registry.history(MODEL)
    nobody, old = SimpleNamespace(front=None, served=None), SimpleNamespace(number="1", name="v1")
    follower = ChampionFollower(cast(Any, nobody), place.registry, MODEL, NO_TRIALS)
    with caplog.at_level("INFO", logger="qwen3ft.server"):
        assert follower._roll_back(new, cast(Any, old), "worse") is False
    assert "2 is not the champion any more" in caplog.text
    assert place.registry.history(MODEL) == before


@pytest.mark.slow
def test_a_bad_version_is_rolled_back_by_its_trial_and_a_good_one_used(
    place: Place, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias goes back, history, version and run say why; then a good one takes over."""
    monkeypatch.setattr(follower, "FOLLOW_SECONDS", 0.1)
    monkeypatch.setattr(trial, "ENOUGH_ANSWERS", 20)
    engines_in_threads(monkeypatch)
    bad = plant(Trained(**{**vars(trained), "config": place.config}), "empty", tmp_path)
    number = register_saved(place.uri, place.folder / "elsewhere", "empty-0", bad)
    (Path(place.config.runs_dir) / "empty-0").mkdir()
    place.promote("1")
    source = find_source(place.config, place.registry, "champion")
    options = {"follow": MODEL, "canary": Canary(0.2), "probe_rows": 0}
    with running(place.config, source, place.registry, **options) as server:
        place.promote(number)
        empty = ask_until(server, place, trained, "1")
        assert 10 <= empty < 30
        place.promote("2")
        ask_until(server, place, trained, "2")
    move = place.registry.history(MODEL).moves[-2]
    assert (move.action, move.version, move.by.kind) == ("rollback", "1", "server")
    assert "10 empty" in move.reason
    version = place.registry.version(MODEL, number)
    assert version is not None
    assert version.tags["trial"].startswith("rolled back after")
    kept = json.loads((Path(place.config.runs_dir) / "empty-0/trial.json").read_text())
    assert kept["trial"] == version.tags["trial"]
    good = place.registry.version(MODEL, "2")
    assert good is not None
    assert good.tags["trial"].startswith("used after 20 answers")


@pytest.mark.slow
def test_a_trial_that_hardly_anybody_asks_ends_by_its_limit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing spoke against the version, so it is used; the outcome says what ended the trial."""
    monkeypatch.setattr(follower, "FOLLOW_SECONDS", 0.1)
    engines_in_threads(monkeypatch)
    place.promote("1")
    source = find_source(place.config, place.registry, "champion")
    options = {"follow": MODEL, "canary": Canary(0.2, hours=1 / 3600), "probe_rows": 0}
    with running(place.config, source, place.registry, **options) as server:
        place.promote("2")
        wait_for(server, "2")
        deadline = time.monotonic() + SOON_SECONDS
        while "trial" not in (version := place.registry.version(MODEL, "2")).tags:
            assert time.monotonic() < deadline  # the first answers of version 2 are the trial's
            time.sleep(0.05)
    assert version.tags["trial"].startswith("used after ")
    assert version.tags["trial"].endswith("the trial ended by its limit of 0.000277778 h")


@pytest.mark.parametrize(
    "options",
    [["--canary-hours", "1"], ["--canary", "0.05", "--adapter", "previous"]],
)
def test_an_option_about_trials_is_refused_where_there_are_none(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", *options])
    assert (result.exit_code, options[0] in result.output) == (2, True)


def ask_until(server: Running, place: Place, trained: Trained, number: str) -> int:
    """Ask until the trial is over and `number` is the champion; return the empty answers."""
    changes, empty, row = "qwen3ft_version_changes_total", 0, 0
    before = server.client.get("/metrics").text.count(changes)
    deadline = time.monotonic() + 120
    while server.client.get("/metrics").text.count(changes) == before:
        for _ in range(20):
            row = (row + 1) % len(trained.rows)
            body = server.ask(trained.rows[row]["question"]).json()
            empty += not body["choices"][0]["message"]["content"]
        assert time.monotonic() < deadline
    champion = place.registry.champion(MODEL)
    assert champion is not None
    assert champion.version == number
    return empty
