"""Settings typed on a command line, and what is known of each setting."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from qwen3ft.config import RENAMED_SETTINGS, ColumnNames, TrainingConfig
from qwen3ft.errors import ConfigError
from qwen3ft.text.names import closest_name
from qwen3ft.text.yaml import NULL, UnreadableYamlError, load_yaml

CHANGEABLE_SETTINGS: dict[str, str] = {
    # how the same result is computed
    "max_memory_gb": "the plan of the next attempt",
    "gpus": "the plan of the next attempt",
    "hosts": "the plan of the next attempt",
    "kernels": "the plan of the next attempt",
    "packing": "the plan of the next attempt",
    "gradient_checkpointing": "the plan of the next attempt",
    "preflight": "whether the next plan is measured first",
    "keep_checkpoints": "the checkpoints of the next attempt",
    "max_attempts": "the attempts from now on",
    "stall_seconds": "the workers from now on",
    "memory_history": "the memory report of the next attempt",
    "when_gpu_is_busy": "the wait for the GPU",
    "wait_for_gpu_seconds": "the wait for the GPU",
    "lock_cpu": "the wait for the CPU",
    # where results go
    "output_dir": "where the adapter is saved",
    "fallback_output_dirs": "where the adapter is saved",
    "runs_dir": "where the run's folder is found, if it was moved",
    "cache_dir": "where models and rows are found or made again",
    # who is told, and whether to train at all
    "notify_blocks": "the notification of the end",
    "notify_on": "the notification of the end",
    "when_unchanged": "a run that has not begun to train",
    # a second opinion, which does not decide
    "judge_url": "the judge, who is asked after training",
    "judge_model": "the judge, who is asked after training",
    "judge_rows": "the judge, who is asked after training",
    "judge_key_variable": "the judge, who is asked after training",
}
"""Effect of a new value, by name of a setting that may change when a run is resumed.

All other settings decide what is learnt or judged: a run keeps them to its end.
"""

_CHECKED_TOGETHER = (("judge_url", "judge_model"), ("gpus", "hosts"))


def with_partners(changes: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of a run's settings, with its own value of what is checked along with them.

    Prefect validates what it is sent without the run's other settings.

    Args:
        changes: Settings that change.
        own: All settings of the run, or none if they are not known.
    """
    pairs = [pair for pair in _CHECKED_TOGETHER if changes.keys() & pair]
    return {name: own[name] for pair in pairs for name in pair if name in own} | dict(changes)


def read_setting(name: str, typed: str) -> Any:
    """Return the value that `typed` gives the setting `name`, to be validated.

    It is taken as it stands: `no`, `010`, `1e3` and `####` are what they look like, whatever YAML
    makes of them. Only null, quotes around all of it, and a [list] or {mapping} where the setting
    is one are read as YAML. A setting that is a list also takes a,b.

    Raises:
        UnreadableYamlError: it is empty, or not closed.
    """
    text = typed.strip()
    if not text:
        raise UnreadableYamlError(f"it is empty; {NULL} unsets a setting, and '\"\"' is no text")
    if text == NULL:
        return None
    holds = _kinds(name)
    is_list, is_mapping = tuple in holds, ColumnNames in holds
    if text[0] in "\"'" and text[-1] == text[0] and len(text) > 1:
        try:
            unquoted = load_yaml(text)
        except UnreadableYamlError:  # 'it' or 'them'
            unquoted = text
        return [unquoted] if is_list else unquoted
    if (is_list and text[0] == "[") or (is_mapping and text[0] == "{"):
        value = load_yaml(text)
        node = yaml.compose(text, yaml.BaseLoader)
        if node is not None and node.end_mark.index != len(text):
            raise UnreadableYamlError("what follows # is a comment; a text with # needs quotes")
        return value
    if is_list:
        return [part.strip() for part in text.split(",")]
    return text


_TEXTS_OF_NUMBERS = ("gpus",)
"""Settings that are texts, in which a number is one all the same."""


def is_read_otherwise(name: str, typed: str) -> bool:
    """Return True if the setting is a free text, and YAML would make something else of it."""
    if str not in _kinds(name) or name in _TEXTS_OF_NUMBERS or typed.strip() == NULL:
        return False
    try:
        return bool(yaml.safe_load(typed) != typed)
    except (yaml.YAMLError, ValueError):
        return True


def _kinds(name: str) -> set[Any]:
    """Return the types, without their arguments, that the setting may hold; none if unknown."""
    field = TrainingConfig.model_fields.get(RENAMED_SETTINGS.get(name, name))
    return set() if field is None else set(_flat(field.annotation))


def _flat(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _flat(part)
    else:
        yield origin or annotation


class SettingHelp(BaseModel):
    """Everything that is known of one setting."""

    model_config = ConfigDict(frozen=True)

    name: str
    section: str
    default: str
    values: str
    meaning: str
    trade_off: str


def describe_settings(defaults: str) -> list[SettingHelp]:
    """Describe every setting, in the order of the class.

    Args:
        defaults: Text of default.yaml: its headings, and the trade-off at the end of each line.
    """
    section, lines = "most used", {}
    for line in defaults.splitlines():
        if heading := re.fullmatch(r"# --- (.*) ---", line):
            section = heading[1]
        elif found := re.match(r"(\w+): .*?  +# (.*)", line):
            lines[found[1]] = (section, found[2])
    return [
        SettingHelp(
            name=name,
            section=lines[name][0],
            default=_written(field.default),
            values=_values(field),
            meaning=" ".join((field.description or "").split()),
            trade_off=lines[name][1],
        )
        for name, field in TrainingConfig.model_fields.items()
    ]


def find_settings(settings: list[SettingHelp], word: str) -> list[SettingHelp]:
    """Return those whose name holds `word`, else those that mention it.

    Raises:
        ConfigError: there is none; the nearest name is in the next command.
    """
    wanted = word.lower().strip()
    if named := [setting for setting in settings if wanted in setting.name]:
        return named
    if mentioned := [
        setting
        for setting in settings
        if wanted in f"{setting.meaning} {setting.trade_off} {setting.values}".lower()
    ]:
        return mentioned
    near = closest_name(word, TrainingConfig.model_fields)
    raise ConfigError(
        f"No setting is named {word[:100]!r} or mentions it.",
        why="It may be the option of one command, which its --help shows.",
        next_command=f"qwen3ft settings {near}".strip(),
    )


def _written(value: Any) -> str:
    """Return a default as it is written in a settings file."""
    if isinstance(value, ColumnNames):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value) if not isinstance(value, str) else value


def _values(field: FieldInfo) -> str:
    """Return which values a setting takes, in words."""
    kinds = set(_flat(field.annotation))
    if ColumnNames in kinds:
        words = "{" + ", ".join(f"{name}: ..." for name in ColumnNames.model_fields) + "}"
    elif choices := [choice for part in _literals(field.annotation) for choice in get_args(part)]:
        words = ", ".join(choices)
    else:
        names = {int: "whole number", float: "number", bool: "true, false", str: "text"}
        words = ", ".join(names[kind] for kind in names if kind in kinds) or "text"
    if tuple in kinds:
        words = f"list of {words}" if "," in words else f"list of {words}s"
    return ", ".join([words, *_bounds(field), *(["null"] if type(None) in kinds else [])])


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield annotation
    for part in get_args(annotation):
        if get_origin(part) is not None:
            yield from _literals(part)


def _bounds(field: FieldInfo) -> Iterator[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for limit in field.metadata:
        for sign, text in words.items():
            if (bound := getattr(limit, sign, None)) is not None:
                yield f"{text} {bound:g}" if isinstance(bound, float) else f"{text} {bound}"
