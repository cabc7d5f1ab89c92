"""A template from elsewhere that loops, recurses or fills memory ends as a tokenizer's error."""

from __future__ import annotations

import resource
import signal
import threading
from typing import Any

import pytest
from support.golden_conversations import user
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwen3ft.chat import limits
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.chat.templates import RUNS_AWAY, apply_template
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TIMES = "{% for i in range(60) %}"
SQUARES = f"{{% set s = namespace(n=9) %}}{TIMES}{{% set s.n = s.n * s.n %}}{{% endfor %}}"
DOUBLED = f"{{% set s = namespace(t='aa') %}}{TIMES}{{% set s.t = s.t + s.t %}}{{% endfor %}}"
BODY = "{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}"
TWICE = f"{{% macro twice(n) %}}{BODY}{{% endmacro %}}{{{{ twice(60) }}}}"
HUGE = "{% set n = 10 ** 10 %}"
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


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 'a' * 10 ** 10 }}",
        HUGE + "{{ 'a' * n }}",
        HUGE + "{{ ['a'] * n }}",
        HUGE + "{{ 'a'.center(n) }}",
        HUGE + "{{ 'a'.ljust(n) }}",
        HUGE + "{{ 'a'.zfill(n) }}",
        HUGE + "{{ 'a' | center(n) }}",
        HUGE + "{{ 'a' | indent(n) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ '%01000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        SQUARES + "{{ s.n }}",
        DOUBLED + "{{ s.t }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        TWICE,
        "{% for i in range(90000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
        "{{ ('a' * 30 * 10 ** 6) | list | length }}",
        "{{ lipsum(n=10 ** 8) }}",
        "{{ messages | map('tojson', indent=10 ** 9) | list }}",
    ],
)
def test_a_template_that_runs_away_is_stopped(tokenizer: Tokenizer, template: str) -> None:
    """Loops, repeated texts, wide fields, powers, doublings, recursion, endless output."""
    tokenizer.chat_template = template
    with pytest.raises(TokenizerError) as raised:
        apply_template(tokenizer, [user("a")])
    assert raised.value.facts[RUNS_AWAY]
    assert raised.value.why
    assert raised.value.next_command


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[10 ** 30] }}{{ messages[5].x.y }}",
        "{{ none.x.y }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in 5 %}{% endfor %}",
        "{{ 'a' + 1 }}",
        "{{ messages | no_such_filter }}",
        "{% if %}",
        "{{ " * 1000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('\x1b[2J') }}",
    ],
)
def test_whatever_a_template_raises_is_a_tokenizer_error(
    tokenizer: Tokenizer, template: str
) -> None:
    """Arithmetic, missing values, the sandbox, syntax, nesting, other files."""
    tokenizer.chat_template = template
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
