"""Whatever is planted is used, refused, or named: columns, keys, files, settings, parameters."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prefect.exceptions import SignatureMismatchError

from benchmarks.layouts.check import LAYOUTS, write_rows
from benchmarks.layouts.talks import Talk
from flows.cli.options import read_overrides
from flows.finetune import qwen3_finetune
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import ColumnNames, TrainingConfig, load_config
from qwen3ft.data.columns import PARTS
from qwen3ft.data.rows import RowCounts, RowRules, read_file
from qwen3ft.data.sources import resolve_sources
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import ConfigError
from qwen3ft.records.data import BadRow, SourceFile

MARK = "xyzzy plugh 7"
"""Text that stands in no row."""
NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789_- é问", min_size=1, max_size=10)
# Reports are by kind and group: these are shown, though not trained.
KNOWN = [name for part, names in PARTS.items() if part not in ("kind", "group") for name in names]
KEYS = [
    *("content", "value", "text", "reasoning_content", "thought", "thinking", "reasoning"),
    *("function_call", "tool_calls", "arguments", "parameters", "input", "name", "id", "from"),
    *("role", "weight", "train", "loss", "train_detail", "images", "audio", "refusal"),
    *("signature", "cache_control", "citations", "human", "output", "function", "value"),
]
PLANTED = st.sampled_from(
    [MARK, [MARK], {"k": MARK}, [[MARK, MARK]], [{"type": "text", "x": MARK}], [{"text": MARK}]]
)
GOOD_LAYOUTS = [
    layout for layout in LAYOUTS if isinstance(layout.read(layout.write(layout.talks(0), 0)), Talk)
]


@cache
def tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


def objects(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every object of a row, with the keys that lead to it."""
    if isinstance(value, dict):
        yield keys, value
    pairs = value.items() if isinstance(value, dict) else [("", item) for item in value]
    for key, item in pairs:
        if isinstance(item, (dict, list)):
            yield from objects(item, (*keys, key))


@settings(max_examples=4 * settings().max_examples)
@given(
    layout=st.sampled_from(GOOD_LAYOUTS),
    n=st.integers(0, 11),
    place=st.integers(0, 1000),
    name=NAMES | st.sampled_from(KNOWN) | st.sampled_from(KEYS),
    value=PLANTED,
)
def test_a_planted_column_or_key_is_trained_refused_or_named(
    layout: Any, n: int, place: int, name: str, value: Any
) -> None:
    """In any object of a row in any layout: the row, a message, a part, a call, a function."""
    row = copy.deepcopy(layout.write(layout.talks(n), n))
    places = list(objects(row))
    keys, target = places[place % len(places)]
    assume(name not in target)
    target[name] = value
    with tempfile.TemporaryDirectory() as folder:
        path, counts = write_rows(Path(folder) / "row.jsonl", [row]), RowCounts()
        rules = RowRules(ColumnNames(**layout.columns), layout.separator)
        [read] = read_file(SourceFile("row", path, "train"), rules, counts)
    if isinstance(read, BadRow):
        return
    if any(MARK in message.get("reasoning", "") for message in read["messages"][:-1]):
        return  # the template omits it, and a warning has the number of such rows
    [tokenized] = tokenize_rows(tokenizer(), [read])
    shown = {path.split(".")[-1].split("[")[0] for path in counts.unused}
    nameless = {"(a column without a name)", "(a key without a name)"}
    is_named = bool(shown & ({*filter(None, keys), name.strip()} if name.strip() else nameless))
    assert is_named or MARK in tokenizer().decode(tokenized.input_ids), (row, counts.unused)


@given(
    name=NAMES.filter(lambda name: "." not in name),
    suffix=st.sampled_from(
        ["", ".txt", ".md", ".docx", ".pdf", ".yaml", ".zip", ".arrow", ".JSON", ".jsonl", ".csv"]
    )
    | st.text("abcdefxyz0123456789", min_size=1, max_size=5).map(lambda text: f".{text}"),
    is_hidden=st.booleans(),
    below=st.sampled_from(["", "more", ".cache"]),
)
def test_a_planted_file_is_read_or_named(
    name: str, suffix: str, is_hidden: bool, below: str
) -> None:
    """Of any type and at any depth of a folder; of hidden ones those that could be read."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "rows"
        planted = folder / below / f"{'.' * is_hidden}{name}{suffix}"
        planted.parent.mkdir(parents=True)
        (folder / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
        planted.write_text(MARK)
        files, _, skipped = resolve_sources(TrainingConfig(data_paths=(str(folder),)))
    is_read = planted in [file.path for file in files]
    is_named = any(line.startswith(f"{planted}: ") for line in skipped)
    if is_hidden or below.startswith("."):
        assert not is_read
        assert is_named == (planted.suffix.lower() in (".json", ".jsonl", ".csv"))
    else:
        assert is_read != is_named


@given(name=NAMES.map(str.strip).filter(lambda name: name and "=" not in name), value=PLANTED)
def test_a_planted_setting_is_refused_by_its_name(name: str, value: Any) -> None:
    """In a file, by --set, and as the name of a column's part."""
    # Hypothesis also draws words of the code, which may be names of settings and of parts.
    assume(name not in TrainingConfig.model_fields.keys() | ColumnNames.model_fields.keys())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        for planted in ({name: value}, {"columns": {name: "x"}}):
            path.write_text(yaml.safe_dump(planted, allow_unicode=True), encoding="utf-8")
            with pytest.raises(ConfigError) as caught:
                load_config(path)
            assert name in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(None, read_overrides([f"{name}={yaml.safe_dump(value)}"]))
    assert name in str(caught.value)


@given(name=NAMES.filter(str.isidentifier))
def test_a_planted_parameter_of_the_flow_is_refused_by_its_name(name: str) -> None:
    """Before any of its code runs."""
    known = {"config": {}}
    assume(name not in qwen3_finetune.parameters.properties)
    with pytest.raises(SignatureMismatchError, match=name):
        qwen3_finetune.validate_parameters({**known, name: 1})
