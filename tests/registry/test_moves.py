"""Which adapter is in use changes by one recorded move at a time, and back within a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from support.registered import MODEL, add_version, copy_database, stored_adapter
from support.verdicts import BASE, GOOD, gain, report, saved

from flows import cli
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    ChampionChangedError,
    RequestError,
    RolledBackError,
    SaveError,
    TrackingUnavailableError,
)
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry import aliases
from qwen3ft.registry.bounded_calls import promotion_lock
from qwen3ft.registry.moves import (
    EARLIER_TAG_PREFIX,
    MOVE_TAG_PREFIX,
    Aliases,
    Change,
    History,
    Move,
    Mover,
    describe_history,
    from_tags,
    succession,
    tag_name,
    this_person,
    to_tag,
)
from qwen3ft.registry.registry import Registry
from qwen3ft.text.commands import runnable
from qwen3ft.tracking.connection import Connection, connect
from tasks.promote import promote as promote_task

ROOT = Path(__file__).parents[2]
NIGHT = Change(by=Mover(kind="flow", name="run-x"), verdict="better: 90 % against 10 %")
PERSON = Change(by=Mover(kind="person", name="ada@host"), reason="wrong dates")


@pytest.fixture(scope="module")
def versions(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with versions 1 to 4 of the runs night-1 to night-4; the last one is degraded."""
    folder = tmp_path_factory.mktemp("versions")
    uri = copy_database(migrated_database, folder)
    for night in (1, 2, 3):
        assert add_version(uri, folder, f"night-{night}") == str(night)
    assert add_version(uri, folder, "night-4", degraded=("lower rank",)) == "4"
    return folder


@pytest.fixture(scope="module")
def used(versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which version 1 was promoted and then version 2."""
    uri = copy_database(versions / "mlruns" / "mlflow.db", tmp_path_factory.mktemp("used"))
    promoted(uri, "1", "2")
    return Path(uri.removeprefix("sqlite:///"))


@pytest.fixture
def uri(versions: Path, tmp_path: Path) -> str:
    """A fresh database with the versions, none of them in use; their artifacts are shared."""
    return copy_database(versions / "mlruns" / "mlflow.db", tmp_path)


@pytest.fixture
def in_use(used: Path, tmp_path: Path) -> str:
    """A fresh database in which version 2 replaced version 1."""
    return copy_database(used, tmp_path)


@pytest.fixture
def damaged(versions: Path) -> Iterator[None]:
    """Change a byte of version 1 in MLflow's files."""
    weights = stored_adapter(versions, "night-1") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    yield
    weights.write_bytes(whole)


def promoted(uri: str, *versions: str) -> Registry:
    """A registry in which the versions were promoted one after the other."""
    registry = Registry(uri)
    for version, expected in zip(versions, (None, *versions), strict=False):
        registry.promote(MODEL, version, expected, NIGHT)
    return registry


def named(champion: str | None, previous: str | None, challenger: str | None = None) -> Aliases:
    return Aliases(champion=champion, previous=previous, challenger=challenger)


def test_every_promotion_is_in_the_history(uri: str) -> None:
    """An entry says when, which version, why and by whom; promoting twice is one entry."""
    registry = promoted(uri, "1", "2", "2")
    history = registry.history(MODEL)
    assert history.aliases == named("2", "1")
    first, second = history.moves
    assert (first.number, first.action) == (1, "promotion")
    assert (first.version, first.replaced) == ("1", None)
    assert (second.number, second.version, second.replaced) == (2, "2", "1")
    assert (second.run, second.verdict, second.by) == ("night-2", NIGHT.verdict, NIGHT.by)
    assert first.at < second.at
    assert second.state == "done"
    assert registry.history("never-heard-of").moves == ()


def test_a_rollback_leads_back_and_is_not_undone_by_the_next(in_use: str) -> None:
    """Two rollbacks lead two versions back; from the first version there is no way back."""
    registry = Registry(in_use)
    registry.promote(MODEL, "3", "2", NIGHT)
    move = registry.rollback(MODEL, PERSON)
    assert (move.action, move.version, move.replaced) == ("rollback", "2", "3")
    assert (move.reason, move.by.name) == ("wrong dates", "ada@host")
    assert registry.history(MODEL).aliases == named("2", "1")
    registry.rollback(MODEL, PERSON)
    assert registry.history(MODEL).aliases == named("1", None)
    with pytest.raises(RequestError, match="no version of qwen3ft-embedded to go back to"):
        registry.rollback(MODEL, PERSON)
    actions = [move.action for move in registry.history(MODEL).moves]
    assert actions == ["promotion"] * 3 + ["rollback"] * 2


def test_a_rollback_leads_to_what_came_before_the_last_use(in_use: str) -> None:
    """A version that was in use twice has two that came before it."""
    registry = Registry(in_use)
    registry.promote(MODEL, "1", "2", PERSON)
    registry.promote(MODEL, "3", "1", PERSON)
    registry.rollback(MODEL, PERSON)
    assert registry.history(MODEL).aliases == named("1", "2")


def test_what_was_rolled_back_is_promoted_again_by_a_person_only(in_use: str) -> None:
    """That holds for later versions of the same bytes, until a person promotes it."""
    registry = Registry(in_use)
    registry.rollback(MODEL, PERSON)
    with pytest.raises(RolledBackError, match="wrong dates"):
        registry.promote(MODEL, "2", "1", NIGHT)
    client = connect(in_use).client
    old = client.get_model_version(MODEL, "2")
    again = client.create_model_version(MODEL, old.source, run_id=old.run_id, tags=dict(old.tags))
    client.delete_model_version_tag(MODEL, str(again.version), aliases.ROLLED_BACK_TAG)
    with pytest.raises(RolledBackError, match="version 2, the same adapter"):
        registry.promote(MODEL, str(again.version), "1", NIGHT)
    assert not registry.set_challenger(MODEL, "2", "kept")
    assert registry.history(MODEL).aliases == named("1", None)
    registry.promote(MODEL, "2", "1", PERSON)
    assert registry.history(MODEL).aliases == named("2", "1")
    registry.promote(MODEL, "3", "2", NIGHT)
    registry.promote(MODEL, "2", "3", NIGHT)


def test_a_kept_candidate_is_the_challenger_until_it_is_promoted(uri: str) -> None:
    """A later promotion by hand shows its verdict; the champion is never challenger."""
    registry = promoted(uri, "1")
    assert registry.set_challenger(MODEL, "2", "no better: 80 % against 90 %")
    assert not registry.set_challenger(MODEL, "1", "kept")
    assert registry.history(MODEL).aliases == named("1", None, "2")
    move = registry.promote(MODEL, "2", "1", PERSON)
    assert (move.verdict, move.reason) == ("no better: 80 % against 90 %", "wrong dates")
    assert registry.history(MODEL).aliases == named("2", "1")


def test_a_rollback_compares_before_it_sets(in_use: str) -> None:
    """An alias that somebody else moved meanwhile is noticed, and nothing moves."""
    connection = connect(in_use)
    with pytest.raises(ChampionChangedError, match="champion is 2, not 1"):
        aliases.restore_previous(connection, MODEL, "1", "1", PERSON)
    with pytest.raises(ChampionChangedError, match="not rolled back to 3"):
        aliases.restore_previous(connection, MODEL, "3", "2", PERSON)
    assert Registry(in_use).history(MODEL).aliases == named("2", "1")


@pytest.mark.usefixtures("damaged")
def test_a_previous_adapter_that_is_damaged_is_not_gone_back_to(in_use: str) -> None:
    """One changed byte is enough, unless the check is left out on purpose."""
    registry = Registry(in_use)
    with pytest.raises(SaveError, match="has sha256"):
        registry.rollback(MODEL, PERSON)
    assert registry.history(MODEL).aliases == named("2", "1")
    registry.rollback(MODEL, PERSON, verify=False)
    assert registry.history(MODEL).aliases == named("1", None)


class CutError(Exception):
    """A planned crash."""


class CutClient:
    """An MLflow client whose process dies before its n-th change."""

    def __init__(self, client: Any, changes_left: int) -> None:
        self.client, self.changes_left = client, changes_left

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if not name.startswith(("set_", "delete_")):
            return method

        def change(*arguments: Any) -> Any:
            if self.changes_left == 0:
                raise CutError("killed")
            self.changes_left -= 1
            return method(*arguments)

        return change


Operation = Callable[[Connection], Any]
OPERATIONS: dict[str, tuple[Operation, Aliases, Aliases]] = {
    "promotion": (
        lambda connection: aliases.make_champion(connection, MODEL, "3", "2", NIGHT),
        named("2", "1", "3"),
        named("3", "2"),
    ),
    "rollback": (
        lambda connection: aliases.restore_previous(connection, MODEL, "1", "2", PERSON),
        named("2", "1", "3"),
        named("1", None, "3"),
    ),
}


@pytest.mark.parametrize("action", OPERATIONS)
def test_a_crash_at_any_point_leaves_the_move_undone_or_done(
    in_use: str, tmp_path: Path, action: str
) -> None:
    """Killed before each of its changes in turn, a move is then wholly there or not at all."""
    operation, before, after = OPERATIONS[action]
    Registry(in_use).set_challenger(MODEL, "3", "kept")
    outcomes = []
    for changes in range(20):
        uri = copy_database(Path(in_use.removeprefix("sqlite:///")), tmp_path / str(changes))
        connection = connect(uri)
        client = CutClient(connection.client, changes)
        try:
            operation(replace(connection, client=client))
            break
        except CutError:
            pass
        history = aliases.settle(connection, MODEL)
        made = len(history.moves) == 3
        assert history.aliases == (after if made else before)
        tags = connection.client.get_model_version(MODEL, "2").tags
        assert (aliases.ROLLED_BACK_TAG in tags) == (made and action == "rollback")
        assert len(from_tags(connection.client.get_registered_model(MODEL).tags)) == 2 + made
        outcomes.append(made)
    assert set(outcomes) == {True, False}
    assert outcomes == sorted(outcomes)


def test_a_promoter_that_hangs_is_not_waited_for_forever(in_use: str) -> None:
    """While another process holds the lock, the call ends in time and moves nothing."""
    registry = Registry(in_use)
    before = registry.history(MODEL)  # the connection is open: only the lock is waited for
    with promotion_lock(in_use, 1.0):
        registry.deadline_seconds = 0.5
        with pytest.raises(TrackingUnavailableError, match="moving aliases for"):
            registry.promote(MODEL, "3", "2", NIGHT)
    registry.deadline_seconds = 30.0
    assert registry.history(MODEL) == before


# --- the commands ---


EMBEDDED = ("--set", "model_name=embedded")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; it returns exit status, standard output and error."""

    def run(uri: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["qwen3ft", *arguments, *EMBEDDED])
        try:
            status = cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_person_goes_back_within_a_minute(in_use: str) -> None:
    """The start of the command and the check of the adapter are included."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "qwen3ft", "rollback", "--reason", "wrong dates", *EMBEDDED],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": in_use, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert seconds < 60
    assert "1 (run night-1) is the champion now, instead of 2" in done.stderr
    assert Registry(in_use).history(MODEL).aliases == named("1", None)


def test_the_history_says_who_moved_what_and_why(
    in_use: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    """People see the newest move first, programs the oldest."""
    Registry(in_use).rollback(MODEL, Change(by=this_person(), reason="wrong dates"))
    status, out, _ = command(in_use, "history")
    shown = out.splitlines()
    assert (status, shown[0]) == (0, "qwen3ft-embedded: champion 1")
    assert "rollback   2 -> 1     of run night-1, by " in shown[1]
    assert shown[1].endswith(": wrong dates")
    assert shown[2].endswith("by run run-x: better: 90 % against 10 %")
    _, out, _ = command(in_use, "history", "--json")
    moves = json.loads(out)["moves"]
    assert [move["action"] for move in moves] == ["promotion", "promotion", "rollback"]
    assert moves[2]["by"] == this_person().model_dump()


@pytest.mark.usefixtures("damaged")
def test_a_version_is_promoted_by_hand_if_intact_and_degraded_only_if_asked_for(
    in_use: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    """The output names what is replaced, and a refusal names the way out."""
    status, _, error = command(in_use, "promote", "4", "--reason", "a demo")
    assert status == 1
    assert "qwen3ft-embedded 4 is degraded: lower rank." in error
    again = "qwen3ft promote 4 --allow-degraded --set name=qwen3ft-embedded --reason 'a demo'"
    assert f"Next:  {runnable(again)}" in error
    _, out, _ = command(in_use, "promote", "4", "--allow-degraded", "--reason", "a demo", "--json")
    move = json.loads(out)["move"]
    assert (move["version"], move["replaced"], move["reason"]) == ("4", "2", "a demo")
    status, _, error = command(in_use, "promote", "1")
    assert status == 1
    assert "is refused" in error
    status, _, error = command(in_use, "promote", "9")
    assert "no version '9'" in error
    assert Registry(in_use).history(MODEL).aliases == named("4", "2")


# --- a night ---


def test_a_night_names_what_it_tested_and_leaves_alone_what_a_person_took_back(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed after its promotion finds the same verdict, and moves nothing."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    registry = Registry(uri)

    def decide(version: str, gained: float, champion: Champion | None = None) -> str:
        verdict = promote_task.fn(
            TrainingConfig(model_name="embedded"),
            saved(version=version, registered_model=MODEL),
            report(BASE, GOOD, gains=(gain(gained),)),
            champion,
            f"runs/night-{version}",
        )
        return str(verdict.sentence)

    assert decide("2", -0.3).startswith("kept: worse than the base model")
    assert registry.history(MODEL).aliases == named(None, None, "2")
    assert decide("1", 0.3).startswith("promoted: better than the base model")
    history = registry.history(MODEL)
    assert history.aliases == named("1", None, "2")
    assert history.moves[0].by == Mover(kind="flow", name="night-1")
    beside = decide("2", 0.3)  # compared with the champion before, which there was not
    assert beside.startswith("deferred: qwen3ft-embedded 2 is not promoted: the champion is 1")
    assert "qwen3ft run --resume night-2" in beside
    again = decide("1", -0.3, registry.champion(MODEL))
    assert again.startswith("promoted: better than the base model")
    assert registry.history(MODEL) == history
    assert history.moves[0].verdict.startswith("promoted: better than the base model")
    registry.promote(MODEL, "3", "1", NIGHT)
    registry.rollback(MODEL, PERSON)
    client = connect(uri).client
    client.delete_registered_model_alias(MODEL, "champion")
    assert decide("3", 0.3).startswith("kept: qwen3ft-embedded 3 is not promoted: version 3")
    assert registry.champion(MODEL) is None


def test_the_pages_of_a_model_say_in_words_what_happened(in_use: str) -> None:
    """Its description lists the moves, a version's is its verdict, and no JSON is shown."""
    registry, client = Registry(in_use), connect(in_use).client
    registry.rollback(MODEL, PERSON)
    model = client.get_registered_model(MODEL)
    first, _, *lines = model.description.splitlines()
    assert first.startswith("LoRA adapters of one task")
    assert [line.partition(": ")[2] for line in lines] == [
        "version 1 put back in place of version 2 by ada@host: wrong dates",
        f"version 2 promoted in place of version 1 by run run-x: {NIGHT.verdict}",
        f"version 1 promoted by run run-x: {NIGHT.verdict}",
    ]
    assert all(tag.startswith("mlflow.") for tag in model.tags)  # which the pages hide
    assert client.get_model_version(MODEL, "2").description == NIGHT.verdict
    assert registry.set_challenger(MODEL, "3", "kept: no better")
    assert client.get_model_version(MODEL, "3").description == "kept: no better"


def test_what_a_person_wrote_stays_and_no_move_depends_on_a_description(
    in_use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move that MLflow describes no more is one all the same."""
    registry, client = Registry(in_use), connect(in_use).client
    client.update_registered_model(MODEL, "Ask Ada first.")
    client.update_model_version(MODEL, "3", "Made for the fair.")
    assert registry.set_challenger(MODEL, "3", "kept: no better")
    version = client.get_model_version(MODEL, "3")
    assert (version.description, version.tags["verdict"]) == (
        "Made for the fair.",
        "kept: no better",
    )
    registry.rollback(MODEL, PERSON)
    assert client.get_registered_model(MODEL).description == "Ask Ada first."

    def fail(*_: object) -> None:
        raise MlflowException("the database is locked")

    client.update_registered_model(MODEL, "")
    monkeypatch.setattr(type(client), "update_registered_model", fail)
    registry.promote(MODEL, "3", "1", NIGHT)
    assert registry.history(MODEL).moves[-1].state == "done"


def test_a_description_of_many_moves_fits_into_mlflow() -> None:
    """Its database holds 5,000 characters; the newest moves are named."""
    long = {"verdict": "v" * 900, "by": Mover(kind="person", name="n" * 64)}
    moves = [
        Move(number=number, action="promotion", version=str(number), replaced="1", **long)
        for number in range(1, 41)
    ]
    text = describe_history(History(registered_model=MODEL, aliases=Aliases(), moves=tuple(moves)))
    assert len(text) <= 5000
    assert "version 40 promoted" in text


@pytest.mark.parametrize("made", [True, False])
def test_a_move_that_an_earlier_version_left_half_made_is_settled(in_use: str, made: bool) -> None:
    """Its record has another name, which is gone afterwards; the history before it stays."""
    client = connect(in_use).client
    for name, text in client.get_registered_model(MODEL).tags.items():
        client.set_registered_model_tag(
            MODEL, name.replace(MOVE_TAG_PREFIX, EARLIER_TAG_PREFIX), text
        )
        client.delete_registered_model_tag(MODEL, name)
    begun = Move(number=3, action="promotion", version="3", replaced="2", previous="2", by=NIGHT.by)
    client.set_registered_model_tag(MODEL, tag_name(3, EARLIER_TAG_PREFIX), to_tag(begun)[1])
    if made:
        client.set_registered_model_alias(MODEL, "champion", "3")
    aliases.settle(connect(in_use), MODEL)
    moves = Registry(in_use).history(MODEL).moves
    assert [(move.number, move.version) for move in moves] == [(1, "1"), (2, "2"), (3, "3")][
        : 3 if made else 2
    ]
    tags = client.get_registered_model(MODEL).tags
    assert tag_name(3, EARLIER_TAG_PREFIX) not in tags
    assert (tag_name(3) in tags) is made


# --- records alone ---


def test_a_move_fits_a_tag_and_comes_back_from_it() -> None:
    """The longest sentences are cut to what MLflow's database holds, whatever the script."""
    long = {"verdict": "长" * 9000, "reason": "y" * 9000}
    move = Move(number=7, action="rollback", version="3", by=this_person(), **long)
    name, text = to_tag(move)
    assert len(text) <= 5000
    [read] = from_tags({name: text, f"{MOVE_TAG_PREFIX}zzz": "edited by hand", "other": "{}"})
    assert read.reason.endswith("…")
    assert read == move.model_copy(update={"verdict": read.verdict, "reason": read.reason})


@given(st.lists(st.sampled_from(["promotion", "rollback"]), max_size=30))
def test_succession_is_a_stack(actions: list[str]) -> None:
    """Promotions push and rollbacks pop, so rollbacks visit each earlier version once."""
    stack: list[str] = []
    moves: list[Move] = []
    for number, action in enumerate(actions, 1):
        replaced = stack[-1] if stack else None
        if action == "promotion":
            stack.append(f"v{number}")
        elif len(stack) > 1:
            stack.pop()
        else:
            continue
        move = {"number": number, "action": action, "version": stack[-1], "replaced": replaced}
        moves.append(Move(**move, by=NIGHT.by))
    assert succession(moves) == stack


def test_versions_in_use_before_the_history_began_are_part_of_it() -> None:
    """The first recorded promotion names the version it replaced."""
    move = Move(number=1, action="promotion", version="9", replaced="8", by=NIGHT.by)
    assert succession([move]) == ["8", "9"]
