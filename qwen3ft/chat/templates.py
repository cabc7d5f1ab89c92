"""Chat templates: identifying, probing and rendering that of a tokenizer.

A template is identified by the sha256 of its text, not by the name of a model; its handling of
reasoning is found by rendering probes. Templates outside `KNOWN_TEMPLATES` are used too. Not
covered: turn markers other than Qwen's (ChatML). If a tokenizer has several templates, transformers
chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.limits import RENDER_BYTES, RENDER_CPU_SECONDS, LimitReachedError, limited
from qwen3ft.errors import TokenizerError
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_TEMPLATES = {
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "Qwen3",
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "Qwen3-Instruct-2507",
    "3802169b2a02b81e6adb7ab4f64f91ff02db753c8c3a64a01c35192d3a61d8d7": "Qwen3-Thinking-2507",
    "147bcedb70dcc9d47e25e3e3afcf64885db8f8e5cbeec59ae19ac775cdc08a1f": "qwen3ft embedded",
}
"""sha256 of the text -> name; rendering by slots is tested for each of them.

The Thinking template differs from Qwen3's in that it cannot switch thinking off: its generation
prompt always opens the think block.
"""

_WITHOUT_THINKING = frozenset({"Qwen3-Instruct-2507"})

TURN_HEADER = "<|im_start|>assistant\n"
END_TOKEN = "<|im_end|>"  # noqa: S105 - a marker, not a secret
OPEN_BLOCK = "<think>\n"
REST_OF_EMPTY_BLOCK = "\n</think>\n\n"
EMPTY_BLOCK = OPEN_BLOCK + REST_OF_EMPTY_BLOCK
MOST_REASON_CHARACTERS = 300
MOST_ROLES_SHOWN = 8

RUNS_AWAY = "runs_away"
"""Fact of a `TokenizerError`: True if the template would have taken all time or memory."""

MOST_ADDED_CHARACTERS = 2**20
"""Longest text of a template itself; Qwen3's has 5,000 characters."""

MOST_TIMES_GIVEN = 16
"""Largest rendering, beside that, as a multiple of the conversation: JSON escapes take 6 for 1."""

TOOL_RESPONSE = "<tool_response>"
"""Start of a user's message that Qwen's templates take for a tool's result, not a question."""

_THINKING_DEFAULT = (
    "{%%- if enable_thinking is not defined %%}{%%- set enable_thinking = %s %%}{%%- endif %%}"
)

JsonDict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """A template's identity; `name` is '' if the hash is not in `KNOWN_TEMPLATES`."""

    sha256: str
    name: str


@dataclass(frozen=True, slots=True)
class ThinkingSupport:
    """A template's handling of the reasoning in assistant turns."""

    writes: bool
    """It renders the reasoning of the last turn."""
    prefills: bool
    """Its generation prompt ends with the opening tag, so the model does not write it."""
    drops_earlier: bool
    """It omits reasoning from turns before the last question."""


def with_thinking_default(template: str, thinking: bool) -> str:
    """Return the template so that it thinks, or does not, where a request leaves that open.

    Requests may still set `enable_thinking`. A template without that switch is returned unchanged.
    """
    template = without_thinking_default(template)
    if "enable_thinking" not in template:
        return template
    return _THINKING_DEFAULT % ("true" if thinking else "false") + template


def without_thinking_default(template: str) -> str:
    """Return the template as it was before `with_thinking_default`."""
    for value in ("true", "false"):
        template = template.removeprefix(_THINKING_DEFAULT % value)
    return template


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template as text; several are joined in a fixed order."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return "\n".join(f"{name}\n{template[name]}" for name in sorted(template))
    return str(template)


def identify_template(tokenizer: PreTrainedTokenizerBase) -> TemplateInfo:
    """Return the identity of the tokenizer's template."""
    return identify_text(template_text(tokenizer))


def identify_text(template: str) -> TemplateInfo:
    """Return the sha256 of a template (UTF-8), without a default for thinking, and its name."""
    sha256 = hashlib.sha256(without_thinking_default(template).encode()).hexdigest()
    return TemplateInfo(sha256, KNOWN_TEMPLATES.get(sha256, ""))


def template_may_think(sha256: str) -> bool:
    """Return False for a known template that writes no reasoning; others are asked to think."""
    return KNOWN_TEMPLATES.get(sha256) not in _WITHOUT_THINKING


def probe_thinking(tokenizer: PreTrainedTokenizerBase) -> ThinkingSupport:
    """Find out how the tokenizer's template handles reasoning, by rendering short probes.

    Raises:
        TokenizerError: the template cannot be rendered.
    """
    thought = "a thought"
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a", "reasoning": thought}
    later = {"role": "assistant", "content": "b"}
    return ThinkingSupport(
        writes=thought in apply_template(tokenizer, [question, answer]),
        prefills=opens_block(apply_template(tokenizer, [question], prompt=True)),
        drops_earlier=thought not in apply_template(tokenizer, [question, answer, question, later]),
    )


def opens_block(prompt: str) -> bool:
    """Return True if a generation prompt leaves a think block open."""
    return prompt.endswith(OPEN_BLOCK)


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
    thinking: bool = True,
) -> str:
    """Render a conversation with the tokenizer's template.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages as in `QaRow`: role, content, and of the assistant also reasoning and
            tool_calls.
        tools: Function schemas offered.
        prompt: Append the beginning of the assistant's next turn.
        thinking: Let that turn think first, if the template has a switch for it.

    Raises:
        TokenizerError: the template rejects the conversation, is broken, or takes more than the
            limits in `qwen3ft.chat.limits`.
    """
    given = [as_template_reads(message) for message in messages]
    try:
        with limited():
            text: Any = tokenizer.apply_chat_template(
                given,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
            )
    except (LimitReachedError, MemoryError, RecursionError, OverflowError) as error:
        reason = f"{RENDER_CPU_SECONDS:g} s of CPU time and {RENDER_BYTES // MIB} MiB do not do"
        if isinstance(error, (RecursionError, OverflowError)):
            reason = f"{type(error).__name__}: {str(error)[:MOST_REASON_CHARACTERS]!a}"
        raise _runaway(messages, tools, reason) from error
    except Exception as error:  # a template can raise anything that Python has
        reason = f"{type(error).__name__}: {str(error)[:MOST_REASON_CHARACTERS]!a}"
        raise template_error(
            f"The chat template cannot render {_described(messages, tools)}: {reason}",
            "It does not support such conversations, or is damaged.",
        ) from error
    allowed = MOST_ADDED_CHARACTERS + MOST_TIMES_GIVEN * len(str(given) + str(tools))
    if len(text) > allowed:
        reason = f"it writes {len(text):,} characters, and {allowed:,} are plenty"
        raise _runaway(messages, tools, reason)
    return str(text)


def _described(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
    roles = [str(message["role"]) for message in messages]
    shown = ", ".join(roles[:MOST_ROLES_SHOWN]) + (", ..." if roles[MOST_ROLES_SHOWN:] else "")
    return f"a conversation of {len(messages)} messages ({shown}) with {len(tools)} tools"


def _runaway(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], reason: str
) -> TokenizerError:
    return template_error(
        f"The chat template was stopped while it rendered {_described(messages, tools)}: {reason}.",
        "It loops, recurses or builds texts without end.",
        **{RUNS_AWAY: True},
    )


def template_error(what: str, why: str, **facts: Any) -> TokenizerError:
    """Return a `TokenizerError` that suggests a model with a working tokenizer and template."""
    next_command = "qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507"
    return TokenizerError(what, why=why, next_command=next_command, **facts)


def as_template_reads(message: Mapping[str, Any]) -> JsonDict:
    """Return the message with the field names that chat templates use."""
    if message["role"] != "assistant":
        return {"role": message["role"], "content": message["content"]}
    read: JsonDict = {
        "role": "assistant",
        "content": message.get("content") or "",
        # Passed even if empty: otherwise templates look for think tags inside the answer.
        "reasoning_content": message.get("reasoning") or "",
    }
    if calls := message.get("tool_calls"):
        read["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return read
