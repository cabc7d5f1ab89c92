"""The card shows every model's scores, the interval of the gain, and what happened in the run."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.reported_run import CHAMPION, HOSTILE, SECRET, make_facts, make_report

from flows.cli.views.common import show_card
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.records.data import DataChange
from qwen3ft.records.evaluation import SideBySide
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.build import RunFacts, answered_question, build_card
from qwen3ft.report.facts import card_facts
from qwen3ft.report.html import CARD_TEMPLATE, card_html
from qwen3ft.report.markdown import card_description, card_markdown
from qwen3ft.report.safe_text import escape_markdown

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:  # noqa: D102
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """The visible text, with white space as a browser shows it."""
        return " ".join(" ".join(self.words).split())


# --- what it says ---


def test_the_scores_of_all_three_stand_side_by_side_with_the_gain() -> None:
    """Both gains have intervals; form checks and forgetting are there too."""
    lines = card_markdown(build_card(make_facts())).splitlines()
    forgotten = "1.500 → 1.600 (+0.100 nats per token, limit +0.25)"
    points = "+80.0 (+78.0 to +82.0) points | +40.0 (+38.0 to +42.0) points"
    nats = "+0.800 (+0.780 to +0.820) nats | +0.400 (+0.380 to +0.420) nats"
    assert lines[0] == "# embedded: promoted"
    assert lines[2].startswith("**promoted: better than champion v7: exact match 90.0%")
    for line in (
        "| score | base | champion | candidate | gain over base | gain over champion |",
        f"| exact match | 10.0% | 50.0% | 90.0% | {points} |",
        "| its 95% interval | 4.0% to 23.1% | 35.2% to 64.8% | 76.9% to 96.0% | | |",
        f"| answer loss | 2 | 1 | 0.5 | {nats} |",
        "| loss on the ability set | 1.5 | 1.6 | 1.6 | | |",
        "| perplexity of the right answers | 7.389 | 2.718 | 1.649 | | |",
        "| language of the question | 100.0% | 100.0% | 100.0% | | |",
        f"| forgetting | loss on the ability set {forgotten} |",
        "| questions | rows | base | champion | candidate |",
        "| fact | 40 | 10.0% | 50.0% | 90.0% |",
    ):
        assert line in lines


def test_what_was_forgotten_is_the_verdict() -> None:
    """A better adapter is kept if it forgets; a missing loss is not shown as a number."""
    lines = card_markdown(build_card(make_facts(4.0))).splitlines()
    assert lines[0] == "# embedded: kept"
    assert lines[2].startswith("**kept: it forgets: loss on the ability set 4 against 1.5")
    text = card_markdown(build_card(make_facts(None)))
    assert "| forgetting | not measured |" in text
    assert "| loss on the ability set | 1.5 | 1.6 | not finite | | |" in text


def test_all_forms_show_the_same_facts() -> None:
    """Markdown and the terminal show every fact, the page those that are headlines."""
    card = build_card(make_facts()).model_copy(update={"judge": None})
    stream = io.StringIO()
    show_card(Console(file=stream, width=120), card)
    markdown, page = card_markdown(card), Page(card_html(card)).text
    for fact in card_facts(card):
        assert escape_markdown(fact.value) in markdown
        assert fact.text.replace("→", "->") in stream.getvalue()
        if fact.headline:
            assert f"{fact.label} {fact.text}" in page
    labels = ", ".join(fact.label for fact in card_facts(card) if fact.headline)
    assert (
        labels
        == "put into use, exact match, gain over champion, held-out loss, peak memory, speed, time"
    )


def test_the_whole_run_is_in_all_three_forms() -> None:
    """Each has new data, plan, attempts, memory, times and answers."""
    card = build_card(make_facts())
    as_json = json.dumps(card.model_dump(mode="json"), ensure_ascii=False)
    for form in (card_markdown(card), Page(card_html(card)).text, as_json):
        for words in ("qwen3ft-embedded v7", "מה השעה?", "Memory ran out: micro-batch of 2."):
            assert words in form
    page = Page(card_html(card)).text
    for words in (
        "3 training rows are new since qwen3ft-embedded v7.",
        "All of a step | at once.",
        "batch 4 x 1 → 2 x 2; from the checkpoint of step 40",
        "out of memory: 4.10 of 4 GB <b>needed</b> | step 41",
        "0.50 GB of 4 GB",
        "12 min 5 s",
        "Memory: at most 1.99 GB in use, predicted 1.25 GB, budget 4 GB.",
        "training from 4.000 to 0.013",
        "+40.0 (+38.0 to +42.0) points",
    ):
        assert words in page


def test_how_to_roll_back_is_the_exact_command_and_what_follows_from_it() -> None:
    """The command names the model; if nothing was in use before, there is none."""
    promoted = build_card(make_facts()).roll_back
    command = 'qwen3ft rollback --reason "..." --set name=qwen3ft-embedded'
    assert promoted.command == command
    assert promoted.what.startswith("This puts qwen3ft-embedded v7 back into use instead of")
    first = build_card(make_facts(champion=None)).roll_back
    assert (first.command, "Nothing was in use before" in first.what) == ("", True)
    kept = build_card(make_facts(4.0))
    assert kept.roll_back.what == "This run changed nothing: qwen3ft-embedded v7 stays in use."
    assert kept.roll_back.command == ""


def test_the_card_says_what_came_into_use() -> None:
    """The new version and the one that it replaced, also where a resumed run finds its own."""
    for facts, said in (
        (make_facts(), "put into use: version 8 in place of version 7"),
        (make_facts(champion=None), "put into use: version 8"),
        (
            make_facts(champion=CHAMPION.model_copy(update={"version": "8"})),
            "put into use: version 8",
        ),
        (make_facts(4.0), "in use before: version 7 not replaced by this run"),
        (make_facts(4.0, champion=None), None),
        (make_facts(champion=None, verdict=None), None),
    ):
        found = {fact.label: fact.text for fact in card_facts(build_card(facts))}
        labels = [label for label in found if " use" in label]
        assert [f"{label}: {found[label]}" for label in labels] == [said] * (said is not None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the base model and qwen3ft-embedded v7"),
        ({"champion": None}, "the base model; no adapter of qwen3ft-embedded was in use"),
        (
            {"change": DataChange(champion_paths=("other.jsonl",))},
            "v7, trained on 'other.jsonl', which are others than this run's",
        ),
        ({"change": DataChange(champion_paths=())}, "v7, trained on the bundled rows"),
        ({"report": None}, ""),
    ],
)
def test_the_card_names_what_was_compared(changes: dict[str, Any], said: str) -> None:
    """With the data of the champion, and whether that is another."""
    compared = build_card(make_facts(**changes)).compared_with
    assert compared.endswith(said)
    assert bool(compared) == bool(said)


def test_what_to_type_next_follows_from_the_end() -> None:
    """A kept adapter can be promoted by hand, a deferred or failed run can be resumed."""

    def commands(*arguments: Any, **changes: Any) -> list[str]:
        return [step.command for step in build_card(make_facts(*arguments, **changes)).next_steps]

    assert "qwen3ft promote 8 --set name=qwen3ft-embedded" in commands(4.0)
    assert "qwen3ft chat --adapter '/out/night 1'" in commands(4.0)
    assert not any("promote" in command for command in commands())
    error = InsufficientMemoryError("Nothing fits.", next_command="qwen3ft plan --set x=1")
    failed = commands(verdict=None, report=None, saved=None, error=error)
    assert failed[:2] == ["qwen3ft plan --set x=1", "qwen3ft run --resume night-1"]


@pytest.mark.parametrize(
    "error", [InsufficientMemoryError("4 GB\nare too little | <b>", why="It is."), KeyError("x")]
)
def test_a_failed_run_shows_what_it_got_to(error: Exception) -> None:
    """The card has the error, its reason and the attempts, and no scores."""
    nothing = {"verdict": None, "report": None, "saved": None, "trained": None}
    card = build_card(make_facts(**nothing, error=error))
    assert (card.outcome, card.title) == ("failed", "embedded: failed")
    assert card.failure.kind == type(error).__name__
    assert card.peak_memory_gb == 1.99
    assert card.roll_back.what == "This run changed nothing: qwen3ft-embedded v7 stays in use."
    page, markdown = Page(card_html(card)).text, card_markdown(card)
    for form in (page, markdown):
        assert "What went wrong" in form
        assert "Memory ran out: micro-batch of 2." in form
        assert "Scores" not in form


def test_a_run_that_broke_at_its_first_step_and_one_with_nothing_to_do_have_cards() -> None:
    """Only the settings and the outcome are known."""
    config = TrainingConfig(model_name="embedded")
    for known, words in (
        ({"error": OSError("no space left")}, "failed: no space left"),
        ({"nothing_since": "m v3"}, "nothing new since m v3"),
    ):
        card = build_card(RunFacts(config, "a", **known))
        assert card.verdict == words
        assert words in Page(card_html(card)).text
        assert words in card_markdown(card)
        # Whether something is in use was not asked.
        assert card.roll_back.what == "This run changed nothing that is in use."
        assert card.champion_version is None


# --- what it survives ---


def test_a_hostile_text_is_never_markup_in_html() -> None:
    """Only the template's tags and attributes are there, and every text is shown literally."""
    hostile, tame = (
        Page(card_html(build_card(make_facts(report=make_report(texts=texts)))))
        for texts in (HOSTILE, tuple(f"text {number}" for number in range(len(HOSTILE))))
    )
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
    assert hostile.open == tame.open == []
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in hostile.text
    assert "{{ 7 * 7 }} {% raw %} ${x}" in hostile.text
    for _, attributes in hostile.tags:
        assert not any(name.startswith("on") for name in attributes)


def test_the_page_needs_nothing_but_itself() -> None:
    """It loads no script, image, font or style from elsewhere, and its policy forbids that."""
    card = build_card(make_facts()).model_copy(
        update={"prefect_url": "http://127.0.0.1:4200/x", "mlflow_url": "javascript:alert(1)"}
    )
    html = card_html(card)
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert [given["href"] for tag, given in page.tags if tag == "a"] == ["http://127.0.0.1:4200/x"]
    assert not re.search(r"url\(|@import|src=", html.partition("</style>")[0])
    policy = [given for tag, given in page.tags if given.get("http-equiv")]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_can_be_used_without_seeing_it() -> None:
    """It has a language, headings in order, names of charts, and headers of every table."""
    page = Page(card_html(build_card(make_facts())))
    found = [given for tag, given in page.tags if tag == "html"]
    assert found[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    pictures = [given for tag, given in page.tags if given.get("role") == "img"]
    ids = {given["id"] for _, given in page.tags if "id" in given}
    assert len(pictures) == 2
    for picture in pictures:
        assert set((picture["aria-labelledby"] or "").split()) <= ids
    assert all("scope" in given for tag, given in page.tags if tag == "th")
    named = {given["aria-labelledby"] for tag, given in page.tags if tag == "section"}
    assert named <= ids


def test_a_hostile_text_stays_in_its_cell_of_markdown() -> None:
    """GitHub's flavour of markdown renders no tag, link, image or table from it."""
    markdown_it = pytest.importorskip("markdown_it")
    text = card_markdown(build_card(make_facts()))
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence"}
    headings = [token.tag for token in tokens if token.type == "heading_open"]
    assert headings == ["h1", *["h2"] * (len(headings) - 1)]
    assert sum(token.type == "table_open" for token in tokens) == 7
    shown = " ".join(child.content for child in inline)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in shown.replace("&lt;", "<")


def test_nothing_secret_and_no_control_is_in_any_form() -> None:
    """Not even half of a key appears, nor a mark that reverses text."""
    card = build_card(make_facts())
    as_json = json.dumps(card.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)
    for form in (as_json, card_markdown(card), card_html(card)):
        assert SECRET[:8] not in form
        assert "use ***" in form or r"use \*\*\*" in form
        assert not set("\u202e\u202c\x00\x1b") & set(form)
        assert "more characters)" in form


def test_a_card_is_read_back_as_it_was_written() -> None:
    """Losses that were NaN are not in it."""
    card = build_card(make_facts())
    assert RunCard.model_validate_json(card.model_dump_json()) == card
    assert all(loss == loss for curve in card.loss for _, loss in curve.training)


def test_a_description_is_whole_sections_and_short_enough() -> None:
    """MLflow refuses a longer tag; the beginning is kept, and no table is torn."""
    card = build_card(make_facts())
    whole = card_markdown(card)
    for most in (2000, 3000, 5000, 10**6):
        text = card_description(card, most)
        assert 0 < len(text) <= most
        assert text.rstrip("\n") in whole
        assert text.endswith("\n")
    assert card_description(card, 10) == card.verdict[:10]
    text = card_description(card, 2000, "somewhere.png")
    order = [text.index(part) for part in ("**promoted", "![scores](somewhere.png)", "| exact m")]
    assert order == sorted(order)


def test_answers_that_never_came_are_said_and_thinking_is_left_out() -> None:
    """An answer is marked right if it is an exact match."""
    answers = {"base": "<think>hm", "champion": "", "candidate": "<think>hm</think>paris"}
    pair = SideBySide(question="q", reference="Paris.", **answers)
    shown = answered_question(pair).answers
    assert [(answer.model, answer.text, answer.right) for answer in shown] == [
        ("base", "(no answer: the reasoning did not end)", False),
        ("champion", "(no answer)", False),
        ("candidate", "paris", True),
    ]
    alone = answered_question(pair.model_copy(update={"champion": None}))
    assert [answer.model for answer in alone.answers] == ["base", "candidate"]


def test_the_template_is_in_the_wheel() -> None:
    """An installed package can render the page."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    builder = wheel.WheelBuilder(str(ROOT))
    packed = {file.distribution_path for file in builder.recurse_included_files()}
    assert f"qwen3ft/report/{CARD_TEMPLATE}" in packed
