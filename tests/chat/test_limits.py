"""A template from elsewhere that loops, recurses or fills memory ends as a tokenizer's error."""

from __future__ import annotations

import resource
import signal
import threading
from typing import Any

import pytest
from support.golden_conversations import user
from support.hostile_tokenizers import BROKEN_TEMPLATES, LOOP, RUNAWAY_TEMPLATES
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwen3ft.chat import limits
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.chat.templates import RUNS_AWAY, apply_template
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError

TEMPLATE = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shared() -> Tokenizer:
    return load_tokenizer(MODEL_DIR)


@pytest.fixture
def tokenizer(shared: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The embedded model's, within limits that are soon reached."""
    monkeypatch.setattr(limits, "RENDER_CPU_SECONDS", 0.2)
    monkeypatch.setattr(limits, "RENDER_BYTES", 2**27)
    monkeypatch.setattr(shared, "chat_template", TEMPLATE)
    return shared


@pytest.mark.parametrize("name", RUNAWAY_TEMPLATES)
def test_a_template_that_runs_away_is_stopped(tokenizer: Tokenizer, name: str) -> None:
    """Loops, repeated texts, wide fields, powers, doublings, recursion, endless output."""
    tokenizer.chat_template = RUNAWAY_TEMPLATES[name]
    with pytest.raises(TokenizerError) as raised:
        apply_template(tokenizer, [user("a")])
    assert raised.value.facts[RUNS_AWAY]
    assert raised.value.why
    assert raised.value.next_command


@pytest.mark.parametrize("name", BROKEN_TEMPLATES)
def test_whatever_a_template_raises_is_a_tokenizer_error(tokenizer: Tokenizer, name: str) -> None:
    """Arithmetic, missing values, the sandbox, syntax, nesting, other files."""
    tokenizer.chat_template = BROKEN_TEMPLATES[name]
    with pytest.raises(TokenizerError) as raised:
        apply_template(tokenizer, [user("a")])
    assert raised.value.why
    assert raised.value.next_command
    assert str(raised.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "trigger", ["'secret word' in messages[-1].content", "messages | length > 4", "tools"]
)
def test_a_template_that_runs_away_on_some_rows_is_stopped_there(
    tokenizer: Tokenizer, trigger: str
) -> None:
    """Rows before it are rendered as ever."""
    tokenizer.chat_template = "{% if " + trigger + " %}" + LOOP + "{% endif %}" + TEMPLATE
    row: dict[str, Any] = {"question": "q", "answer": "a"}
    assert tokenize_rows(tokenizer, [row])
    turns = [user("q"), {"role": "assistant", "content": "the secret word"}] * 3
    with pytest.raises(TokenizerError) as raised:
        tokenize_rows(tokenizer, [{"messages": turns, "tools": [{"name": "f"}]}])
    assert raised.value.facts[RUNS_AWAY]


def test_limits_end_with_the_rendering(tokenizer: Tokenizer) -> None:
    """Timer, handler and memory limit are as they were, whatever happened within."""
    handler, memory = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_DATA)
    for template in (TEMPLATE, LOOP, "{{ 'a' * 10 ** 10 }}", "{{ 1 / 0 }}"):
        tokenizer.chat_template = template
        try:
            apply_template(tokenizer, [user("a")])
        except TokenizerError:
            assert template != TEMPLATE
        assert signal.getsignal(signal.SIGVTALRM) == handler
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
        assert resource.getrlimit(resource.RLIMIT_DATA) == memory


def test_other_threads_render_too(tokenizer: Tokenizer) -> None:
    """There is no timer for them, and no error either."""
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(apply_template(tokenizer, [user("a")])))
    thread.start()
    thread.join()
    assert "<|im_start|>user\na" in texts[0]
