"""Requests in OpenAI's format, checked: what is heeded, what has no effect, and what is refused.

Nothing is dropped silently. A parameter that the server does not know is refused by its name; one
that changes no answer is accepted, and named in a header of the response.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qwen3ft.records.serving import Ask

IGNORED_PARAMETERS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "parallel_tool_calls",
)
"""Parameters that change no answer here."""

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
}
"""Values of parameters that ask for what is done anyway; others are refused."""

MOST_STOPS = 16
_MOST_SHOWN_CHARACTERS = 80


class QuestionError(Exception):
    """A request that is refused, with OpenAI's fields."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: tuple[TextPart, ...]
    reasoning_content: str | None = None
    name: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (TextPart(type="text", text=value),)
        if not isinstance(value, list):
            raise ValueError("a text, or a list of parts of type text, is needed")
        return value

    @model_validator(mode="after")
    def _only_the_assistant_thinks(self) -> ChatMessage:
        if self.reasoning_content and self.role != "assistant":
            raise ValueError("only a message of the assistant can have reasoning_content")
        return self

    def plain(self) -> dict[str, Any]:
        """Return it as a chat template takes it."""
        text = "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text}
        if self.reasoning_content:
            message["reasoning"] = self.reasoning_content
        return message


class StreamOptions(_Strict):
    """Extent of what is streamed."""

    include_usage: bool = False


class TemplateSettings(_Strict):
    """Parameters of the chat template."""

    enable_thinking: bool | None = None


class _Shared(_Strict):
    """Parameters of both kinds of requests."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), max_length=MOST_STOPS)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def _ask(self, name: str) -> dict[str, Any]:
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        return {
            "id": 0,
            "name": name,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
            "stop": self.stop,
        }


class ChatQuestionBody(_Shared):
    """Body of /v1/chat/completions."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateSettings = TemplateSettings()

    @property
    def question(self) -> str:
        """The user's last message."""
        return str(self.messages[-1].plain()["content"])

    @property
    def has_limit(self) -> bool:
        """True if the request itself limits the tokens."""
        return self.max_tokens is not None or self.max_completion_tokens is not None

    def ask(self, name: str) -> Ask:
        """Return the question for the adapter `name`."""
        values = self._ask(name)
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        messages = tuple(message.plain() for message in self.messages)
        return Ask(**values, messages=messages, thinking=self.chat_template_kwargs.enable_thinking)


class TextQuestionBody(_Shared):
    """Body of /v1/completions."""

    prompt: str = Field(min_length=1)

    def ask(self, name: str) -> Ask:
        """Return the question for the adapter `name`."""
        return Ask(**self._ask(name), text=self.prompt)


Body = ChatQuestionBody | TextQuestionBody


def _is_same(value: Any, other: Any) -> bool:
    """Compare as JSON does, where `true` is no 1 and `false` no 0."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def load_body(content: bytes) -> Any:
    """Return a body; of two values under one name, neither is dropped.

    Raises:
        QuestionError: it is not JSON, or an object in it has a name twice.
    """

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            message = f"The body has {shown(twice)} more than once in one object."
            raise QuestionError(400, message, param=twice[:_MOST_SHOWN_CHARACTERS])
        return made

    try:
        body = json.loads(content, object_pairs_hook=to_object, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError):
        raise QuestionError(400, "The body is not JSON.") from None
    return body


def _no_constant(name: str) -> Any:
    """Refuse `NaN` and `Infinity`, which Python reads and JSON does not have."""
    raise ValueError(name)


def shown(text: str) -> str:
    """Return the beginning of a text of a client, for a message."""
    return f"{text[:_MOST_SHOWN_CHARACTERS]!a}"


def parse_body(body: Any, kind: type[Body]) -> tuple[Body, list[str]]:
    """Check a request; return it, and the names of its parameters that have no effect.

    Raises:
        QuestionError: a parameter is unknown, or its value is.
    """
    if not isinstance(body, dict):
        raise QuestionError(400, "The body is not a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    ignored = [name for name in given if name in IGNORED_PARAMETERS]
    for name, allowed in _NEUTRAL.items():
        if name in given and not any(_is_same(given[name], value) for value in allowed):
            raise QuestionError(
                400,
                f"{name} is not supported, except for {' or '.join(map(repr, allowed))}.",
                param=name,
                code="unsupported_parameter",
            )
    left = {name: v for name, v in given.items() if name not in (*IGNORED_PARAMETERS, *_NEUTRAL)}
    try:
        parsed = kind.model_validate(left)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise QuestionError(
                400, f"{place} is not supported.", param=place, code="unsupported_parameter"
            ) from None
        raise QuestionError(400, f"{place}: {first['msg']}.", param=place) from None
    if parsed.stream_options is not None and not parsed.stream:
        message = "stream_options can only be given with stream."
        raise QuestionError(400, message, param="stream_options")
    if isinstance(parsed, ChatQuestionBody):
        if parsed.messages[-1].role != "user":
            raise QuestionError(400, "The last message has to be the user's.", param="messages")
        if None not in (parsed.max_tokens, parsed.max_completion_tokens):
            raise QuestionError(
                400,
                "Only one of max_tokens and max_completion_tokens can be given.",
                param="max_tokens",
            )
    return parsed, ignored
