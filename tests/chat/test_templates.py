"""Templates are identified by their text, and ours renders as Qwen3's."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.golden_conversations import CONVERSATIONS, TEMPLATES, WEATHER, user
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwen3ft.chat.templates import (
    KNOWN_TEMPLATES,
    ThinkingSupport,
    apply_template,
    identify_template,
    probe_thinking,
    with_thinking_default,
)
from qwen3ft.chat.tokenizer import configure_tokenizer, load_tokenizer
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError

Pair = tuple[Tokenizer, Tokenizer]
NAMES = {
    "qwen3": "Qwen3",
    "instruct": "Qwen3-Instruct-2507",
    "thinking": "Qwen3-Thinking-2507",
    "embedded": "qwen3ft embedded",
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL_DIR)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A tokenizer with the published template of Qwen3, and one with ours."""
    theirs, ours = load_tokenizer(MODEL_DIR), load_tokenizer(MODEL_DIR)
    theirs.chat_template = TEMPLATES["qwen3"]
    return theirs, ours


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_published_template_is_known_by_its_hash(tokenizer: Tokenizer, family: str) -> None:
    """The table has the sha256 of these files, and no other template matches."""
    tokenizer.chat_template = TEMPLATES[family]
    info = identify_template(tokenizer)
    assert info.sha256 == hashlib.sha256(TEMPLATES[family].encode()).hexdigest()
    assert info.name == NAMES[family]
    tokenizer.chat_template += " "
    assert identify_template(tokenizer).name == ""
    assert set(KNOWN_TEMPLATES.values()) == set(NAMES.values())


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", TEMPLATES)
def test_a_default_for_thinking_holds_where_a_request_leaves_it_open(
    tokenizer: Tokenizer, family: str, thinking: bool
) -> None:
    """A request that sets it gets what it asks for; with tools and earlier turns too."""

    def rendered(template: str, conversation: Any, **asked: bool) -> str:
        messages, tools = conversation
        text = tokenizer.apply_chat_template(
            messages,
            tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **asked,
        )
        return str(text)

    stored = TEMPLATES[family]
    template = with_thinking_default(with_thinking_default(stored, not thinking), thinking)
    later = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    for asked in (([user("a")], None), (later, [WEATHER])):
        trained = rendered(stored, asked, enable_thinking=thinking)
        assert rendered(template, asked) == trained
        for value in (True, False):
            wanted = rendered(stored, asked, enable_thinking=value)
            assert rendered(template, asked, enable_thinking=value) == wanted
    tokenizer.chat_template = template
    assert identify_template(tokenizer).name == NAMES[family]


def test_an_unknown_template_is_a_warning_with_its_hash(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is used as it is; a known one is not mentioned."""
    with caplog.at_level(logging.WARNING, logger="qwen3ft"):
        configure_tokenizer(tokenizer)
        assert not caplog.text
        tokenizer.chat_template += "{# mine #}"
        configure_tokenizer(tokenizer)
    assert identify_template(tokenizer).sha256 in caplog.text
    assert tokenizer.chat_template.endswith("{# mine #}")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", ThinkingSupport(writes=True, prefills=False, drops_earlier=True)),
        ("instruct", ThinkingSupport(writes=False, prefills=False, drops_earlier=True)),
        ("thinking", ThinkingSupport(writes=True, prefills=True, drops_earlier=True)),
        ("embedded", ThinkingSupport(writes=True, prefills=False, drops_earlier=True)),
    ],
)
def test_what_a_template_does_with_reasoning_is_found_by_rendering(
    tokenizer: Tokenizer, family: str, expected: ThinkingSupport
) -> None:
    """The probe distinguishes the three families without their names."""
    tokenizer.chat_template = TEMPLATES[family] + "{# another hash #}"
    assert probe_thinking(tokenizer) == expected


def test_a_template_that_keeps_all_reasoning_is_seen(tokenizer: Tokenizer) -> None:
    """Dropping it in earlier turns is probed, not assumed."""
    old, new = "{%- if loop.index0 > ns.last_query_index %}", "{%- if true %}"
    assert old in TEMPLATES["qwen3"]
    tokenizer.chat_template = TEMPLATES["qwen3"].replace(old, new)
    assert not probe_thinking(tokenizer).drops_earlier


def test_a_template_that_refuses_a_conversation_is_a_tokenizer_error(tokenizer: Tokenizer) -> None:
    """The message has the template's own error and the form of the conversation."""
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizerError, match=r"2 messages \(user, user\).*roles must alternate"):
        apply_template(tokenizer, [user("a"), user("b")])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_our_template_renders_golden_conversations_as_qwen3_does(pair: Pair, name: str) -> None:
    """Whole conversations and all their prefixes, with and without a generation prompt."""
    row = CONVERSATIONS[name]
    messages = row["messages"] or [
        user(row["question"]),
        {"role": "assistant", "content": row["answer"], "reasoning": row["reasoning"]},
    ]
    for end in range(1, len(messages) + 1):
        for prompt, thinking in ((False, True), (True, True), (True, False)):
            theirs, ours = (
                apply_template(t, messages[:end], row["tools"], prompt=prompt, thinking=thinking)
                for t in pair
            )
            assert ours == theirs


PIECES = st.sampled_from(["a", ".", "\n", " ", "é", "<think>", "</think>"])
TEXTS = st.lists(PIECES, max_size=5).map("".join)
CONTENTS = TEXTS | st.sampled_from(["<tool_response>\nx\n</tool_response>", "<tool_response>", ""])
CALLS = st.fixed_dictionaries(
    {"name": st.just("f"), "arguments": st.just({"a": "<&>"}) | st.just('{"raw":1}')}
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENTS},
    optional={
        "reasoning_content": TEXTS | st.none(),
        "tool_calls": st.lists(CALLS | CALLS.map(lambda c: {"function": c}), max_size=3),
    },
)


@given(
    messages=st.lists(MESSAGES, min_size=1, max_size=6),
    tools=st.sampled_from([None, [WEATHER], [WEATHER, {}]]),
    options=st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]),
    prompt=st.booleans(),
)
def test_our_template_renders_any_messages_as_qwen3_does(
    pair: Pair,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    options: dict[str, bool],
    prompt: bool,
) -> None:
    """In any order, with tags in the texts, and as the template reads messages itself."""
    theirs, ours = (
        t.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **options
        )
        for t in pair
    )
    assert ours == theirs
