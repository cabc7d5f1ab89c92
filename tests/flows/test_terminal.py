"""Nothing from outside steers the terminal, and no key is shown: in rows, names and errors."""

from __future__ import annotations

import io
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.reported_run import SECRET, make_facts

from flows.cli import main
from flows.cli.output import AnswerPrinter, open_console, print_json, say
from flows.cli.views import common
from qwen3ft import logs
from qwen3ft.errors import FinetuneError
from qwen3ft.operations.retention import Removal
from qwen3ft.registry.moves import Aliases, History, Move, Mover
from qwen3ft.report.build import build_card

ROOT = Path(__file__).parents[2]
STEERING = ("\x1b[2J", "\x1b]0;owned\x07", "\x9b41m", "\u202e", "\u2066", "\x08", "\x7f")
HOSTILE = f"{''.join(STEERING)}[red]x[/] {SECRET}"


def assert_plain(printed: str) -> None:
    """Make sure that nothing of `HOSTILE` that steers, and no key, was printed."""
    assert [text for text in STEERING if text in printed] == []
    assert SECRET not in printed
    assert "\\x1b" in printed or "\\u001b" in printed  # it was there


@pytest.fixture(params=["terminal", "pipe"])
def run(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Run a command in this process; return all that it printed."""
    monkeypatch.setenv("FORCE_COLOR" if request.param == "terminal" else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(ROOT)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["qwen3ft", *arguments])
        with suppress(SystemExit):
            main()
        return "".join(capsys.readouterr())

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a folder of rows whose names and texts are hostile."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"question": f"{n} {HOSTILE}?", "answer": f"{HOSTILE} {n}", "kind": HOSTILE}
        for n in range(40)
    ]
    name = HOSTILE.replace("/", "")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken")
    return folder


@pytest.mark.parametrize("arguments", [["check"], ["check", "--json"], ["preview"]])
def test_hostile_rows_and_names_are_shown_harmlessly(
    run: Callable[..., str], data: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """`data check` and `data preview`, with and without --json, on a terminal and in a pipe."""
    settings = ["--set", f"cache_dir={tmp_path / 'cache'}", "--set", "model_name=embedded"]
    settings += ["--set", "max_sequence_length=1024"]
    printed = run("data", *arguments, str(data), *settings)
    assert_plain(printed)
    if "--json" in arguments:
        assert json.loads(printed)["rows_read"] == 41


def test_a_row_of_few_tokens_is_masked_in_its_preview(
    run: Callable[..., str], tmp_path: Path
) -> None:
    """The key is cut into tokens, and the words around it are shown."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"Which one is {n}?", "answer": f"It is {SECRET}, said {n}."})
            + "\n"
            for n in range(30)
        )
    )
    settings = ["--set", f"cache_dir={tmp_path / 'cache'}", "--set", "model_name=embedded"]
    shown = json.loads(run("data", "preview", str(path), "--json", *settings))["shown"]
    text = "".join(token["text"] for token in shown)
    assert SECRET not in text
    assert "***" in text
    assert "It is" in text
    assert "said" in text


def move() -> Move:
    """Return a promotion with hostile words of a person."""
    return Move(
        number=1,
        action="promotion",
        at=datetime(2026, 1, 2, tzinfo=UTC),
        version="1",
        run=HOSTILE,
        by=Mover(kind="person", name=HOSTILE),
        reason=HOSTILE,
    )


VIEWS: dict[str, Callable[..., None]] = {
    "error": lambda c: common.show_error(c, FinetuneError(HOSTILE, why=HOSTILE)),
    "history": lambda c: common.show_history(
        c, History(registered_model=HOSTILE, aliases=Aliases(champion="1"), moves=(move(),))
    ),
    "removals": lambda c: common.show_removals(
        c, [Removal(path=HOSTILE, kind="run", size_bytes=1, why=HOSTILE)], ROOT
    ),
    "sections": lambda c: common.show_sections(c, HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}}),
    "card": lambda c: common.show_card(c, build_card(make_facts(run_id=HOSTILE))),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_every_view_shows_hostile_texts_harmlessly(name: str, is_terminal: bool) -> None:
    """Errors, what is in use, what is removed, a card: also where they look like rich's markup."""
    stream = io.StringIO()
    VIEWS[name](open_console(file=stream, width=200, force_terminal=is_terminal))
    assert_plain(stream.getvalue())


def test_remarks_pieces_and_json_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed without a view; JSON means the same as before."""
    say(HOSTILE)
    assert_plain("".join(capsys.readouterr()))
    print_json({HOSTILE: [HOSTILE, 1, None]})
    printed = capsys.readouterr().out
    assert_plain(printed)
    masked = HOSTILE.replace(SECRET, "***")
    assert json.loads(printed) == {masked: [masked, 1, None]}
    printer = AnswerPrinter()
    printer.add("\x1b[2Jowned\n", err=False)
    assert capsys.readouterr().out == "\\x1b[2Jowned\n"


OF_RSA = "RSA PRIVATE" + " KEY-----\n"
KEY_LINES = "\n".join("Ab1+/" * 12 for _ in range(3))
ANSWERS = {
    "key": f"The key is {SECRET}, and nothing else.",
    "key at the end": f"It is {SECRET}",
    "password": "See https://me:pa55!wörd#x@example.org/x for that.",
    "bearer": "Send `Authorization: Bearer abcdefgh12345678` with it.",
    "private key": f"So:\n-----BEGIN {OF_RSA}{KEY_LINES}\n-----END {OF_RSA}Done.",
    "cut private key": f"So:\n-----BEGIN {OF_RSA}{KEY_LINES}",
    "nothing": "三个数的和是 6。The answer: 3 + 3 = 6; see https://example.org/a?b=c. ----- BEGIN",
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_comes_in_pieces_is_masked_as_the_whole_would_be(
    capsys: pytest.CaptureFixture[str], name: str, size: int
) -> None:
    """However its secrets are cut."""
    text, printer = ANSWERS[name], AnswerPrinter()
    for start in range(0, len(text), size):
        printer.add(text[start : start + size], err=False)
    printer.end()
    printed = capsys.readouterr().out
    assert printed == logs.mask_secrets(text)
    assert (printed == text) == (name == "nothing")


def test_an_answer_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    """All but its last word; Chinese text, which has no spaces, up to the last character."""
    printer = AnswerPrinter()
    printer.add("One two thr", err=False)
    assert capsys.readouterr().out == "One two "
    printer.add("ee. 三个数的和", err=False)
    assert capsys.readouterr().out == "three. 三个数的和"
    printer.add("thinking", err=True)
    printer.add("answer ", err=False)
    assert capsys.readouterr() == ("answer ", "thinking")


def test_errors_that_leave_a_task_quote_no_secret() -> None:
    """They keep their type where there is nothing to hide; what led to them is not shown."""

    @logs.without_secrets()
    def fail(text: str) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(text) from error

    with pytest.raises(RuntimeError, match=r"^ValueError: a \*\*\* b\\x1b$") as raised:
        fail(f"a {SECRET} b\x1b")
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(ValueError, match=r"^plain$"):
        fail("plain")


def test_logs_are_harmless_for_every_handler(capsys: pytest.CaptureFixture[str]) -> None:
    """On the console, and for handlers that are not ours, such as Prefect's."""
    import logging

    seen: list[str] = []

    class Foreign(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(self.format(record))

    handler = Foreign()
    logging.getLogger(logs.ROOT).addHandler(handler)
    try:
        logs.configure()
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logs.get_logger("test").exception("%s and %s", HOSTILE, Path(HOSTILE))
    finally:
        logging.getLogger(logs.ROOT).removeHandler(handler)
        logs.configure(console=False)
    assert_plain(capsys.readouterr().err)
    assert_plain(seen[0])
    assert "Traceback" in seen[0]
