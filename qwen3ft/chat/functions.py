"""Function schemas and calls of a row, in the forms that data sets have them.

A call comes out as a name and its arguments, a schema as OpenAI's servers hand it to a template.
What is not used is noted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3ft.chat.thinking import clean_text
from qwen3ft.records.data import RejectedRowError

CALLS_FROM_JSON = "answers of JSON read as function calls"
CALLS_FROM_TAGS = "function calls and results read from their tags"
WRAPPED_TOOLS = "tools wrapped as OpenAI's servers send them"

_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile("<tool_response>(.*?)</tool_response>", re.DOTALL)


@dataclass
class RowNotes:
    """Remarks on the reading of one row, for the counts that the user is shown."""

    unused: set[str] = field(default_factory=set)
    """Columns and keys with something in them that is not used, such as `messages[].name`."""
    changed: set[str] = field(default_factory=set)
    """Changes of form that were made."""


def parse_tools(value: Any, notes: RowNotes) -> list[dict[str, Any]]:
    """Parse function schemas: a list of objects, or its JSON text; [] for None.

    Each comes out as `{"type": "function", "function": ...}`, as servers hand them to a template.

    Raises:
        RejectedRowError: it is something else.
    """
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise RejectedRowError("tools_not_a_list")
    given = [parse_json(tool, "tools") if isinstance(tool, str) else tool for tool in value]
    if not all(isinstance(tool, dict) for tool in given):
        raise RejectedRowError("tools_not_a_list")
    tools = [_wrapped(tool) for tool in given]
    if tools != given:
        notes.changed.add(WRAPPED_TOOLS)
    return tools


def parse_calls(value: Any, path: str, notes: RowNotes) -> list[dict[str, Any]]:
    """Parse function calls, one or a list, or their JSON text, into names and arguments.

    OpenAI wraps each call, with its arguments as JSON text; Anthropic calls them input.

    Raises:
        RejectedRowError: it is something else.
    """
    if isinstance(value, str):
        value = parse_json(value, "calls")
    calls = []
    for given in value if isinstance(value, list) else [value]:
        item = parse_json(given, "calls") if isinstance(given, str) else given
        wrapper = item if isinstance(item, Mapping) else {}
        call = wrapper.get("function", wrapper)
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RejectedRowError("bad_tool_call")
        key = next((k for k in ("arguments", "parameters", "input") if k in call), "arguments")
        arguments = call.get(key)
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        elif isinstance(arguments, str):
            arguments = parse_json(arguments, "calls")
        if not isinstance(arguments, dict) or not _is_json(arguments):
            raise RejectedRowError("bad_tool_call")
        calls.append({"name": call["name"], "arguments": arguments})
        note_unused(call, ("name", key, "type"), path, notes)
        if call is not wrapper:
            note_unused(wrapper, ("type", "function"), path, notes)
    return calls


def calls_in(value: Any, tool_names: Sequence[str], notes: RowNotes) -> list[dict[str, Any]]:
    """Return the function calls that an answer states as bare JSON, as xLAM's do; [] if it is none.

    A server's template writes calls in another form, which the model would otherwise not learn.
    """
    if not tool_names:
        return []
    if isinstance(value, str):
        if not value.lstrip().startswith(("[", "{")):
            return []
        try:
            value = _loads(value)
        except (ValueError, RecursionError):
            return []
    items = value if isinstance(value, list) else [value]
    if not items or not all(
        isinstance(item, Mapping)
        and item.get("name") in tool_names
        and isinstance(item.get("arguments"), (Mapping, str))
        for item in items
    ):
        return []
    notes.changed.add(CALLS_FROM_JSON)
    return parse_calls(items, "answer", notes)


def tagged_calls(text: str, notes: RowNotes) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and the calls behind it in tags, as Hermes' data has them.

    An answer that has something else in or after its tags is a text, and has no calls.
    """
    before, tag, _ = text.partition("<tool_call>")
    if not tag:
        return text, []
    rest, noted = text[len(before) :], RowNotes()
    try:
        values = [_loads(inner) for inner in _CALL.findall(rest)]
        calls = parse_calls(values, "answer", noted)
    except (ValueError, RecursionError):
        return text, []
    if not calls or _CALL.sub("", rest).strip():
        return text, []
    notes.unused |= noted.unused
    notes.changed.add(CALLS_FROM_TAGS)
    return before.rstrip(), calls


def tagged_results(text: str, notes: RowNotes) -> list[str]:
    """Return the results in a tool's message, without the tags that the template writes itself."""
    found: list[str] = _RESULT.findall(text)
    if not found or _RESULT.sub("", text).strip():
        return [text]
    notes.changed.add(CALLS_FROM_TAGS)
    return [clean_text(result) for result in found]


def parse_json(text: str, part: str) -> Any:
    """Parse the JSON text of a row's `part`.

    Raises:
        RejectedRowError: it is not JSON, or an object in it has two keys of one name.
    """
    try:
        return _loads(text)
    except RejectedRowError:
        raise
    except (ValueError, RecursionError):
        raise RejectedRowError(f"{part}_not_a_list") from None


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):  # the last one would win
        raise RejectedRowError("duplicate_key")
    return value


def is_filled(value: Any) -> bool:
    """Return True unless `value` is None or empty; False and 0 say something."""
    return value is not None and value not in ("", [], {})


def note_unused(item: Mapping[str, Any], used: Sequence[str], path: str, notes: RowNotes) -> None:
    """Note the keys of `item` that hold something and are not in `used`."""
    for key, value in item.items():
        if key not in used and is_filled(value):
            notes.unused.add(f"{path}.{key.strip() or '(a key without a name)'}")


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        wrapped = {"type": "function", **tool}
    else:
        # OpenAI's newer interface has the name beside the type, Anthropic another word for
        # parameters.
        function = {
            "parameters" if key == "input_schema" else key: value
            for key, value in tool.items()
            if key != "type"
        }
        wrapped = {"type": "function", "function": function}
    if not isinstance(wrapped["function"].get("name"), str) or not _is_json(wrapped):
        raise RejectedRowError("bad_tool")
    return wrapped


def _is_json(value: Any) -> bool:
    """Return False for what Parquet files hold and JSON does not, such as a time or bytes."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
