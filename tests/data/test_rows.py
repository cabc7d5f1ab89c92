"""Rows of files: every row comes out once, and a bad one costs nothing but itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.rows import GOOD, read, read_line, read_values

from deployments.deploy import CPU_CONFIG, GPU_CONFIG, shipped_file
from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.data.layouts import split_reasoning
from qwen3ft.data.rows import (
    UNREADABLE_FILE,
    RowCounts,
    RowRules,
    excerpt,
    messages_of,
    read_file,
)
from qwen3ft.data.sources import EMBEDDED_SPLITS, SAMPLE_DATA, resolve_sources, resolved
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import BadRow, SourceFile

BAD_LINES = {
    b'{"question": "a", "answer": "b"': "broken_json",
    b"not json at all": "broken_json",
    b"[" * 100_000: "too_deep",
    b'["question", "answer"]': "not_an_object",
    b"null": "not_an_object",
    b'{"question": "a"}': "missing_answer",
    b'{"answer": "a"}': "missing_question",
    b'{"question": null, "answer": "a"}': "missing_question",
    b'{"question": "  ", "answer": "a"}': "empty_question",
    b'{"question": "a", "answer": "\\n"}': "empty_answer",
    b'{"question": {"a": 1}, "answer": "b"}': "question_not_text",
    b'{"question": "a", "answer": 4}': "answer_not_text",
    b'{"question": "a", "answer": "b", "reasoning": {}}': "reasoning_not_text",
    b'{"question": "a\\u0000b", "answer": "c"}': "nul",
    b'{"question": "a\0b", "answer": "c"}': "nul",
    b'{"question": "\\ud800", "answer": "c"}': "lone_surrogate",
    b'{"question": "\xff", "answer": "c"}': "invalid_utf8",
    b'{"question": "a", "answer": "b", "score": NaN}': "nan_literal",
    b'{"question": "a", "answer": "b", "score": -Infinity}': "nan_literal",
    b'{"question": "a<|im_end|>b", "answer": "c"}': "control_token",
    b'{"question": "a", "answer": "<think>never closed"}': "unclosed_think",
    b'{"question": "a", "answer": "<think>b</think>"}': "empty_answer",
    b'{"question": "a", "answer": "<think>b</think>c</think>d"}': "broken_think",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=lambda value: str(value)[:40])
def test_a_bad_line_has_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    """Each kind of damage has its own code; the place is the file's name and the line."""
    row = read_line(tmp_path, line)
    assert isinstance(row, BadRow)
    assert (row.reason, row.line, row.file) == (reason, 1, str(tmp_path / "one.jsonl"))


def test_a_bad_line_does_not_touch_its_neighbours(tmp_path: Path) -> None:
    """Lines before and after are read, blank ones are none, and numbers count every line."""
    good = json.dumps(GOOD).encode()
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, b"", b"{oops", b"  ", good]))
    rows = read(path)
    assert [row.line if isinstance(row, BadRow) else row["line"] for row in rows] == [1, 3, 5]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]


def test_a_line_too_large_is_left_out_without_being_held(tmp_path: Path) -> None:
    """Reading goes on behind an oversized line; a line of just the limit is still read."""
    good = json.dumps(GOOD).encode()
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"\n".join([good, b"x" * 1000, good, b"y" * 1000]))
    rows = read_file(SourceFile(str(path), path, "train"), RowRules(), RowCounts(), len(good) + 1)
    outcome = [row.reason if isinstance(row, BadRow) else "good" for row in rows]
    assert outcome == ["good", "row_too_large", "good", "row_too_large"]


def test_an_excerpt_is_short_and_shows_no_secret(tmp_path: Path) -> None:
    """The quarantine never holds a credential, nor more than 200 characters of a row."""
    token = "hf_" + "a1B2" * 8
    row = read_line(tmp_path, f'{{"question": "use {token} {"long " * 200}"}}'.encode())
    assert isinstance(row, BadRow)
    assert token not in row.excerpt
    assert "***" in row.excerpt
    assert len(row.excerpt) <= 200
    assert excerpt("\ud800").encode()
    key = "sk-" + "a1B2" * 8
    call = {"function": {"name": "set", "arguments": json.dumps({"text": f"use\n{key}"})}}
    lines = [
        json.dumps({"question": f"use\n{key}"}),
        json.dumps({"messages": [{"content": f"use\n{key}"}]}),
        json.dumps({"messages": [{"tool_calls": [call]}]}),
        json.dumps({"question": f"use\n{key}"})[:-1],
        json.dumps({"question": f"用{key}"})[:-1],
    ]
    for line in lines:
        row = read_line(tmp_path, line.encode())
        assert isinstance(row, BadRow)
        assert "***" in row.excerpt
        assert key not in row.excerpt


def test_the_excerpt_of_a_large_row_costs_what_its_beginning_does(tmp_path: Path) -> None:
    """Four times the texts, in lists of a few, are not many more calls."""

    def calls(lists: int) -> int:
        counted = 0

        def count(_frame: object, event: str, _: object) -> None:
            nonlocal counted
            counted += event == "call"  # of a function in Python

        values = {"question": {"a": [[[""] * 50] * 50] * lists}, "answer": "b"}
        line = json.dumps(values).encode()
        sys.setprofile(count)
        try:
            row = read_line(tmp_path, line)
        finally:
            sys.setprofile(None)
        assert isinstance(row, BadRow)
        assert row.reason == "question_not_text"
        return counted

    calls(1)  # the first one also imports
    assert calls(20) < 2 * calls(5)


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_no_bytes_make_the_reader_raise(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    """Whatever a text file holds, reading it gives rows, and those can be written as UTF-8."""
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    for row in read(path):
        text = row.excerpt if isinstance(row, BadRow) else json.dumps(row, ensure_ascii=False)
        assert text.encode().decode() == text


@pytest.mark.parametrize(
    ("values", "question"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
        ({"prompt": "Add.", "completion": "3"}, "Add."),
        ({"query": "Add.", "response": "3", "id": 7}, "Add."),
        ({"问题": "Add.", "答案": "3"}, "Add."),
        ({" Question": "Add.", "ANSWER": "3"}, "Add."),
        ({"input": "Add.", "target": "3"}, "Add."),
    ],
)
def test_the_usual_column_names_are_found(
    tmp_path: Path, values: dict[str, Any], question: str
) -> None:
    """Common data sets are read without any setting."""
    row = read_line(tmp_path, json.dumps(values).encode())
    assert not isinstance(row, BadRow)
    assert (row["question"], row["answer"]) == (question, "3")


def test_columns_named_in_the_config_are_the_only_ones_used(tmp_path: Path) -> None:
    """A named column that is missing is not replaced by a guess."""
    path = tmp_path / "named.jsonl"
    path.write_text(json.dumps({"q": "Add.", "a": "3", "question": "no", "answer": "no"}))
    [row] = read(path, question="q", answer="a")
    assert not isinstance(row, BadRow)
    assert (row["question"], row["answer"]) == ("Add.", "3")
    [bad] = read(path, question="other")
    assert isinstance(bad, BadRow)
    assert bad.reason == "missing_question"


@pytest.mark.parametrize(
    ("answer", "separator", "expected"),
    [
        ("1+1=2\n#### 2", "####", ("1+1=2", "2")),
        ("a #### b\n#### 2", "####", ("a #### b", "2")),
        ("#### 2", "####", ("", "2")),
        ("just 2", "####", ("", "just 2")),
        ("1+1=2\n#### 2", None, ("", "1+1=2\n#### 2")),
        ("<think>\nhm\n</think>\n\n2", None, ("hm", "2")),
        ("hm\n</think>\n\n2", None, ("hm", "2")),
        ("<think>\n\n</think>\n\n2", "####", ("", "2")),
    ],
)
def test_reasoning_is_found_inside_the_answer(
    answer: str, separator: str | None, expected: tuple[str, str]
) -> None:
    """A think block, or the text before the last separator, is the reasoning."""
    assert split_reasoning(answer, separator) == expected


def test_a_reasoning_column_may_repeat_the_block_in_the_answer(tmp_path: Path) -> None:
    """The answer is freed of its block; a column that says something else would be lost."""
    values = {**GOOD, "answer": "<think>calendar</think>Friday", "思考": "calendar"}
    row = read_values(tmp_path, {**values, "kind": "dates"})
    assert (row["reasoning"], row["answer"], row["kind"]) == ("calendar", "Friday", "dates")
    other = read_line(tmp_path, json.dumps({**values, "思考": "a guess"}).encode())
    assert isinstance(other, BadRow)
    assert other.reason == "two_reasonings"


def test_parquet_text_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    """Arrow keeps any bytes as text; a null is a missing value; categories are text."""
    raw = pa.array([b"ok", b"\xff\xfe", None, b"fine"], pa.binary())
    table = pa.table(
        {
            "question": pa.Array.from_buffers(pa.string(), 4, raw.buffers()),
            "answer": pa.array(["a", "b", "c", "d"]).dictionary_encode(),
            "noise": [[1.0]] * 4,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    outcome = [row.reason if isinstance(row, BadRow) else row["answer"] for row in rows]
    assert outcome == ["a", "invalid_utf8", "missing_question", "d"]


def test_parquet_without_known_columns_still_counts_its_rows(tmp_path: Path) -> None:
    """Nothing to read is not the same as no rows."""
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [getattr(row, "reason", "") for row in rows] == ["missing_question"] * 3


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json"])
def test_a_file_that_is_broken_as_a_whole_is_one_entry(tmp_path: Path, name: str) -> None:
    """A corrupt parquet or array is listed with line 0 instead of raising."""
    (tmp_path / name).write_bytes(b"[PAR1 is not enough")
    [row] = read(tmp_path / name)
    assert isinstance(row, BadRow)
    assert (row.line, row.reason) == (0, UNREADABLE_FILE)


# --- layouts ---

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning": "greet"},
    {"role": "user", "content": "Day?"},
    {"role": "assistant", "content": "Friday", "reasoning": "calendar"},
]
"""One conversation, as every layout below says it."""


@pytest.mark.parametrize(
    "values",
    [
        {
            "messages": [
                CHAT[0],
                CHAT[1],
                {"role": "assistant", "content": "<think>greet</think>Hello"},
                {"role": "user", "content": [{"type": "text", "text": "Day?"}]},
                {"role": "assistant", "content": "Friday", "reasoning_content": "calendar"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "<think>greet</think>Hello"},
                {"from": "human", "value": "Day?"},
                {"from": "gpt", "value": "<think>calendar</think>Friday"},
            ]
        },
        {
            "system": "Be short.",
            "history": [["Hi", "<think>greet</think>Hello"]],
            "instruction": "Day?",
            "input": "",
            "output": "Friday",
            "reasoning": "calendar",
        },
        {
            "prompt": [*CHAT[:2], {**CHAT[2], "reasoning_content": "greet"}, CHAT[3]],
            "completion": [{"role": "assistant", "content": "<think>calendar</think>Friday"}],
        },
        {"对话": json.dumps([*CHAT[:2], {**CHAT[2], "thinking": "greet"}, *CHAT[3:]])},
    ],
    ids=["openai", "sharegpt", "alpaca", "prompt/completion", "json text"],
)
def test_every_layout_gives_the_same_conversation(tmp_path: Path, values: dict[str, Any]) -> None:
    """OpenAI, ShareGPT, Alpaca with history, message lists and JSON text differ in nothing."""
    row = read_values(tmp_path, values)
    assert messages_of(row) == CHAT
    assert (row["question"], row["answer"], row["reasoning"]) == ("Day?", "Friday", "calendar")


def test_a_conversation_of_one_question_equals_the_columns(tmp_path: Path) -> None:
    """A message list of a question and its answer is the same row as two columns."""
    messages = [
        {"role": "user", "content": GOOD["question"]},
        {"role": "assistant", "content": GOOD["answer"]},
    ]
    assert read_values(tmp_path, {"messages": messages}) == read_values(tmp_path, GOOD) | {
        "messages": []
    }


def test_tool_calls_and_results_are_kept_in_order(tmp_path: Path) -> None:
    """OpenAI's wrapped calls with JSON text become names and arguments; results follow them."""
    call = {"type": "function", "function": {"name": "day", "arguments": '{"zone": "CET"}'}}
    row = read_values(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": "Day?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "Friday"},
                {"role": "assistant", "content": "It is Friday."},
            ],
            "tools": [{"type": "function", "function": {"name": "day", "parameters": {}}}],
        },
    )
    [_, called, result, _] = row["messages"]
    assert called["tool_calls"] == [{"name": "day", "arguments": {"zone": "CET"}}]
    assert (result["role"], result["content"]) == ("tool", "Friday")
    assert [tool["function"]["name"] for tool in row["tools"]] == ["day"]
    assert (row["question"], row["answer"]) == ("Day?", "It is Friday.")


def _chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (_chat(), "empty_messages"),
        ({"messages": "hello"}, "messages_not_a_list"),
        ({"messages": 4}, "messages_not_a_list"),
        ({"messages": ["hello"]}, "message_not_an_object"),
        (_chat(("narrator", "x")), "unknown_role"),
        (_chat(("user", "")), "empty_message"),
        (_chat(("user", {"a": 1})), "message_not_text"),
        (_chat(("user", [{"type": "image_url"}])), "has_media"),
        (_chat(("user", [{"type": "poem", "text": "a"}])), "message_not_text"),
        (_chat(("user", "a")), "ends_without_answer"),
        (_chat(("user", "a"), ("assistant", "b"), ("user", "c")), "ends_without_answer"),
        (_chat(("assistant", "a")), "bad_turn_order"),
        (_chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "bad_turn_order"),
        (_chat(("user", "a"), ("assistant", "b"), ("tool", "c")), "bad_turn_order"),
        (_chat(("user", "a"), ("assistant", "<think>b")), "unclosed_think"),
        (_chat(("user", "a"), ("assistant", "<think>b</think>")), "empty_answer"),
        (_chat(("user", "a<|im_start|>"), ("assistant", "b")), "control_token"),
        (_chat(("user", "<tool_response>"), ("assistant", "b")), "control_token"),
        ({**GOOD, "history": [["a"]]}, "history_not_pairs"),
        ({**GOOD, "tools": 3}, "tools_not_a_list"),
        ({**GOOD, "answer": []}, "empty_answer"),
    ],
)
def test_a_broken_conversation_has_its_reason(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    """Wrong turns cost the conversation alone, and each kind has its own code."""
    row = read_line(tmp_path, json.dumps(values).encode())
    assert isinstance(row, BadRow)
    assert row.reason == reason


def test_squad_rows_give_context_question_and_first_answer(tmp_path: Path) -> None:
    """The passage comes before the question; the first of several accepted answers is trained."""
    values = {
        "context": "It rained on Friday.",
        "question": "When?",
        "answers": {"text": ["Friday", "on Friday"], "answer_start": [13, 10]},
    }
    row = read_values(tmp_path, values)
    assert row["question"] == "It rained on Friday.\n\nWhen?"
    assert row["answer"] == "Friday"
    assert read_values(tmp_path, {**values, "answers": [{"text": "Friday"}]}) == row
    without = RowRules(ColumnNames(context=""))
    assert read_values(tmp_path, values, without)["question"] == "When?"


def test_control_tokens_are_text_where_the_config_says_so(tmp_path: Path) -> None:
    """With 'escape' the row is used, and the tokenizer takes the marker for text."""
    values = {"question": "What is <|im_end|>?", "answer": "A marker."}
    row = read_values(tmp_path, values, RowRules(escape_special_tokens=True))
    assert row["question"] == values["question"]


def test_names_that_differ_in_every_row_are_counted_together(tmp_path: Path) -> None:
    """What is held, shown and written down of a file does not grow with its rows' own keys."""
    path, counts = tmp_path / "rows.jsonl", RowCounts()
    good = [{"question": "q", "answer": "a", f"id {n}": "x"} for n in range(2000)]
    bad = [{"question": "q", f"id {n}": "x"} for n in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*good, *bad)))
    rows = list(read_file(SourceFile("x", path, "train"), RowRules(), counts))
    assert len(rows) == 4000
    assert [each.total() for each in (counts.columns, counts.unused, counts.incomplete)] == [
        *(2000, 2000, 2000)
    ]
    assert len(counts.columns) == 1
    assert max(len(counts.unused), len(counts.incomplete)) <= 1001
    assert counts.unused["(further names)"] == 1000


def test_a_source_key_may_be_a_number(tmp_path: Path) -> None:
    """Source keys are texts or numbers."""
    assert read_values(tmp_path, {**GOOD, "group_id": 7})["group"] == "7"
    assert read_values(tmp_path, {**GOOD, "分组": " a "})["group"] == "a"


# --- which files ---


def config(**values: Any) -> TrainingConfig:
    """Return a config of the real model, which has no rows of its own."""
    return TrainingConfig(**values)


def test_a_folder_gives_its_files_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    """Folders are searched recursively; a file named twice is read once."""
    for name in ("b.csv", "a/z.JSONL", "a/.hidden.jsonl", ".git/x.json", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    paths = (str(tmp_path), str(tmp_path / "b.csv"))
    files, degraded, _ = resolve_sources(config(data_paths=paths))
    assert [file.path.relative_to(tmp_path).as_posix() for file in files] == ["a/z.JSONL", "b.csv"]
    assert degraded == ()


def test_a_missing_path_is_reported(tmp_path: Path) -> None:
    """The error names path and role, and gives a command."""
    missing = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataLoadingError, match=r"dev data path .*nowhere\.jsonl") as caught:
        resolved(config(data_paths=("embedded:train",), dev_paths=(missing,)))
    assert caught.value.next_command
    assert caught.value.facts["path"] == missing


@pytest.mark.parametrize("path", ["embedded:nothing", "{folder}", "{folder}/notes.txt"])
def test_a_path_that_gives_no_rows_is_an_error(tmp_path: Path, path: str) -> None:
    """Unknown bundled names, folders without data and foreign files are never skipped silently."""
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataLoadingError):
        resolve_sources(config(data_paths=(path.format(folder=tmp_path),)))


def test_no_data_is_an_error_for_a_real_model() -> None:
    """Only the embedded model brings its own rows."""
    with pytest.raises(DataLoadingError, match="data_paths is empty"):
        resolved(config())
    files, degraded, _ = resolve_sources(config(model_name="embedded"))
    assert [file.label for file in files] == [f"embedded:{name}" for name in EMBEDDED_SPLITS]
    assert degraded == ()


@pytest.mark.parametrize("data_paths", [(), ("/nowhere/at/all.jsonl",)])
def test_sample_data_stands_in_only_where_allowed_and_is_marked(
    data_paths: tuple[str, ...],
) -> None:
    """With consent the bundled rows replace missing ones, and the run is degraded."""
    files, degraded, _ = resolve_sources(config(data_paths=data_paths, allow_sample_data=True))
    assert [file.role for file in files] == ["train", "dev", "test", "test"]
    assert degraded == (SAMPLE_DATA,)


@pytest.mark.parametrize("shipped", [CPU_CONFIG, GPU_CONFIG])
def test_the_shipped_settings_bring_rows(shipped: Path) -> None:
    """So the first run of a clone needs none, with a GPU or without, and is not degraded."""
    settings = yaml.safe_load(shipped_file(shipped).read_text(encoding="utf-8"))
    files, degraded, _ = resolve_sources(TrainingConfig(**settings))
    # its own test: a tenth of its rows would be too few to promote an adapter
    assert [file.label for file in files] == [f"embedded:{name}" for name in EMBEDDED_SPLITS]
    assert degraded == ()


def test_a_fingerprint_changes_only_with_the_content(tmp_path: Path) -> None:
    """Touching a file changes nothing; one more row does."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    asked = config(data_paths=(str(path),))
    before = resolved(asked).fingerprints
    path.touch()
    assert resolved(asked).fingerprints == before
    path.write_text(json.dumps(GOOD) * 2)
    [(name, digest, role)] = resolved(asked).fingerprints
    assert (name, role) == (str(path), "train")
    assert digest != before[0][1]
