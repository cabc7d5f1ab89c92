"""YAML of settings, read within bounds: what a settings file needs, and nothing that explodes.

A plain value is the text that was written, and null alone is none: the type of a setting decides
what `no`, `010` or `1e3` mean, not YAML, which would make False, 8 and 'a text' of them. An empty
value is refused, because it is mostly a text that begins with # and so became a comment.

Refused as well are aliases (nine lines of them stand for a billion values), more than `MAX_LEVELS`
levels, names given twice, tags, and long texts.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

LONGEST_TEXT = 128 * 2**10
"""Settings are a few hundred lines; PyYAML reads about 50,000 characters a second."""
MAX_LEVELS = 20
NULL = "null"
"""Word that unsets a setting."""
_MOST_SHOWN = 400
"""Characters of a message of PyYAML, which may quote all of the text."""


class UnreadableYamlError(ValueError):
    """The text is not YAML, or more than settings may be; the message says where and why."""


class _Loader(yaml.BaseLoader):
    """Loads texts, lists and mappings."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        flaw = ""
        if isinstance(event, yaml.AliasEvent):
            flaw = "an alias (*), and settings may have none"
        elif tag is not None:
            flaw = f"a tag (!), and settings may have none: {tag[:_MOST_SHOWN]}"
        elif self._level > MAX_LEVELS:
            flaw = f"more than {MAX_LEVELS} levels of lists and names"
        if flaw:
            raise UnreadableYamlError(f"{_place(event.start_mark)}: {flaw}")
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_scalar(self, node: ScalarNode) -> Any:
        is_plain = node.style is None
        if is_plain and node.value in ("", "~"):
            raise UnreadableYamlError(
                f"{_place(node.start_mark)}: {'an empty value' if not node.value else '~'}; {NULL} "
                "unsets a setting, and a text such as '####' or '~' needs quotes"
            )
        return None if is_plain and node.value == NULL else super().construct_scalar(node)

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


def load_yaml(text: str) -> Any:
    """Return the texts, lists and mappings that `text` holds; None for null and an empty text.

    Raises:
        UnreadableYamlError: it is not YAML, or holds what settings may not.
    """
    if len(text) > LONGEST_TEXT:
        raise UnreadableYamlError(f"it has more than {LONGEST_TEXT:,} characters")
    try:
        return yaml.load(text, _Loader)  # noqa: S506  it constructs no objects
    except UnreadableYamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UnreadableYamlError(str(error)[:_MOST_SHOWN] or type(error).__name__) from error


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
