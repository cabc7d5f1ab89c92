"""The settings of a run: lines for a terminal, and the page docs/settings.md."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from qwen3ft.settings import SettingHelp

_PAGE_HEAD = """# Settings

Set one with `--set NAME=VALUE`, or several in a YAML file given by `--config FILE`;
`qwen3ft settings WORD` shows what is known of some. This page is written by
`qwen3ft settings --markdown > docs/settings.md`.

A value is taken as it is typed: `--set reasoning_separator=####` is four signs, and `no`, `010` or
`1e3` are never turned into something else. `null` unsets a setting. A list is `a,b` or `[a, b]`. In
a file, a text that begins with `#` needs quotes, since YAML takes it for a comment; an empty value
is refused.
"""


def show_settings(console: Console, settings: list[SettingHelp]) -> None:
    """Print each setting with its default, values, meaning and trade-off."""
    for section, group in groupby(settings, key=lambda setting: setting.section):
        console.print(Text(f"--- {section} ---", style="dim"))
        for setting in group:
            line = Text(setting.name, style="bold")
            line.append(f" = {setting.default}", style="cyan")
            line.append(f"   ({setting.values})", style="dim")
            console.print(line)
            console.print(Padding(Text(setting.meaning), (0, 0, 0, 4)))
            console.print(Padding(Text(f"Trade-off: {setting.trade_off}"), (0, 0, 0, 4)))


def settings_markdown(settings: list[SettingHelp]) -> str:
    """Return the settings as a page: a table for each section."""
    lines = [_PAGE_HEAD]
    for section, group in groupby(settings, key=lambda setting: setting.section):
        lines += [
            f"## {section.capitalize()}\n",
            "| setting | default | values | meaning | trade-off |",
            "|---|---|---|---|---|",
        ]
        for setting in group:
            cells = (setting.values, setting.meaning, setting.trade_off)
            rest = " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            lines.append(f"| `{setting.name}` | {setting.default} | {rest} |")
        lines.append("")
    return "\n".join(lines)
