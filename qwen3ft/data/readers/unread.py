"""Files that no reader takes: why, and what to do about it."""

from __future__ import annotations

import shlex
from pathlib import Path

from qwen3ft.data.readers.open import suffix_of
from qwen3ft.data.readers.sheets import SHEET_SUFFIXES, can_read_sheets, why_no_sheets
from qwen3ft.machine.installing import extra_command

_RENAME = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".ldjson": ".jsonl", ".tab": ".tsv"}
_UNPACK = {
    **dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz"), "tar -xf"),
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".gz": "gunzip -k",
    ".zst": "zstd -d",
}
_OLD_SHEETS = (".xls", ".xlsb", ".et", ".numbers")
_TEXTS = (".txt", ".text", ".log")
_DOCUMENTS = (
    *(".md", ".rst", ".html", ".htm", ".pdf", ".doc", ".docx", ".wps", ".rtf", ".odt", ".tex"),
    *(".ppt", ".pptx", ".epub", ".ipynb"),
)
_SCRIPTS = (".py", ".sh", ".js", ".r")


def why_unread(path: Path) -> str:
    """Return why a file is not read, and what to do; '' if it is, by its name."""
    suffix = suffix_of(path.name)
    if suffix in SHEET_SUFFIXES and not can_read_sheets():
        return why_no_sheets(suffix)
    return "" if suffix else _why_foreign(path.name.lower())


def next_command_for(path: Path) -> str:
    """Return the command that helps with a file that is not read."""
    lower, given = path.name.lower(), shlex.quote(str(path))
    if suffix_of(lower) in SHEET_SUFFIXES:
        return extra_command("sheets")
    if suffix := _ends_in(lower, _RENAME):
        return f"mv {given} {shlex.quote(str(path.with_suffix(_RENAME[suffix])))}"
    if suffix := _ends_in(lower, _UNPACK):
        return f"{_UNPACK[suffix]} {given}"
    if _ends_in(lower, _OLD_SHEETS):
        return f"libreoffice --headless --convert-to xlsx {given}"
    return f"head {given}" if _ends_in(lower, _TEXTS) else f"ls -l {given}"


def _why_foreign(name: str) -> str:
    if suffix := _ends_in(name, _RENAME):
        return f"name it {_RENAME[suffix]}"
    if _ends_in(name, _UNPACK):
        return "unpack it"
    if suffix := _ends_in(name, _OLD_SHEETS):
        return f"{suffix} cannot be read; save it as xlsx or csv"
    if suffix := _ends_in(name, _TEXTS):
        return f"{suffix} is no table; if it is one, name it .tsv or .csv, and JSON lines .jsonl"
    if suffix := _ends_in(name, _DOCUMENTS):
        return f"{suffix} has no rows; write its questions and answers as csv or jsonl"
    if suffix := _ends_in(name, _SCRIPTS):
        return f"{suffix} is a script, and never run"
    if suffix := Path(name).suffix:
        return f"{suffix} cannot be read; convert it to csv, jsonl or parquet"
    return "its name has no ending, such as .csv or .jsonl"


def _ends_in(name: str, suffixes: tuple[str, ...] | dict[str, str]) -> str:
    """Return the first of `suffixes` that `name` ends in; '' for none."""
    return next((suffix for suffix in suffixes if name.endswith(suffix)), "")
