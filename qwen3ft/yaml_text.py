"""YAML of settings, read within bounds: what a settings file needs, and nothing that explodes.

Refused are aliases (nine lines of them stand for a billion values), more than `MAX_LEVELS` levels,
names given twice, whole numbers of more than `_MOST_DIGITS` digits, and long texts.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

LONGEST_TEXT = 128 * 2**10
"""Settings are a few hundred lines; PyYAML reads about 50,000 characters a second."""
MAX_LEVELS = 20
_MOST_DIGITS = 40
_MOST_SHOWN = 400
"""Characters of a message of PyYAML, which may quote all of the text."""


class UnreadableYamlError(ValueError):
    """The text is not YAML, or more than settings may be; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """Loads plain values, lists and mappings."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        flaw = ""
        if self.check_event(yaml.AliasEvent):
            flaw = "an alias (*), and settings may have none"
        elif self._level > MAX_LEVELS:
            flaw = f"more than {MAX_LEVELS} levels of lists and names"
        if flaw:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise UnreadableYamlError(f"{_place(mark)}: {flaw}")
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, ScalarNode) else None
            if name in seen and name is not None:
                raise UnreadableYamlError(
                    f"{_place(key.start_mark)}: {name[:_MOST_SHOWN]} is given twice"
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: ScalarNode) -> float:
        if len(node.value) > _MOST_DIGITS:
            digits = len(node.value)
            raise UnreadableYamlError(f"{_place(node.start_mark)}: a number of {digits} characters")
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def load_yaml(text: str) -> Any:
    """Return the value that `text` holds.

    Raises:
        UnreadableYamlError: it is not YAML, or holds what settings may not.
    """
    if len(text) > LONGEST_TEXT:
        raise UnreadableYamlError(f"it has more than {LONGEST_TEXT:,} characters")
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a safe loader
    except UnreadableYamlError:
        raise
    # Its constructors trip over values such as 2024-99-99 and 0b_.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UnreadableYamlError(str(error)[:_MOST_SHOWN] or type(error).__name__) from error


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
