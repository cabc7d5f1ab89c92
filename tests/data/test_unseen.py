"""Nothing of a row is lost unseen: it is trained, or refused, or named as not used."""

from __future__ import annotations

import csv
import json
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.data_stage import SNAPSHOT, prepare, read_lines, write_jsonl
from support.rows import GOOD, read, read_counted, read_line, read_values

from qwen3ft.chat.functions import CALLS_FROM_JSON, WRAPPED_TOOLS
from qwen3ft.chat.messages import JOINED_CALLS, JOINED_USER_TURNS
from qwen3ft.chat.rendering import render_row
from qwen3ft.chat.templates import apply_template
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.data.layouts import NOT_AN_EXAMPLE
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.rows import CONTROL_TOKENS
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import BadRow, QaRow

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


def reason_of(folder: Path, values: dict[str, Any]) -> str:
    row = read_line(folder, json.dumps(values).encode())
    assert isinstance(row, BadRow), row
    return row.reason


def trained(tokenizer: Any, row: QaRow) -> str:
    return "".join(segment.text for segment in render_row(tokenizer, row) if segment.trained)


# --- columns beside messages ---


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"prompt": "q", "chosen": [USER, ANSWER]},
    ],
    ids=lambda values: "+".join(values),
)
def test_columns_beside_messages_belong_to_the_row(tmp_path: Path, values: dict[str, Any]) -> None:
    """As beside a question and an answer."""
    beside = {"system": "s", "context": "c", "reasoning": "r", "history": [["h", "i"]]}
    row = read_values(tmp_path, {**values, **beside})
    assert row["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "i"},
        {"role": "user", "content": "c\n\nq"},
        {"role": "assistant", "content": "a", "reasoning": "r"},
    ]
    assert row["reasoning"] == "r"


def test_a_system_prompt_stated_twice_is_one_and_two_are_refused(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s"}
    chat = {"messages": [system, USER, ANSWER]}
    assert read_values(tmp_path, {**chat, "system": "s"})["messages"] == [system, USER, ANSWER]
    assert reason_of(tmp_path, {**chat, "system": "other"}) == "two_systems"


@pytest.mark.parametrize(
    "values",
    [
        {"question": "q", "answer": "<think>x</think>a", "reasoning": "y"},
        {"messages": [USER, {**ANSWER, "reasoning_content": "x"}], "reasoning": "y"},
        {"messages": [USER, {**ANSWER, "content": "<think>x</think>a", "thought": "y"}]},
        {"messages": [USER, {**ANSWER, "thinking": "x", "reasoning": "y"}]},
    ],
)
def test_two_different_reasonings_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    """One of them would be lost."""
    assert reason_of(tmp_path, values) == "two_reasonings"


# --- flags and marks ---


@pytest.mark.parametrize("flag", ["weight", "loss_weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_an_answer_flagged_as_bad_carries_no_loss(
    tmp_path: Path, tokenizer: Any, flag: str, off: Any
) -> None:
    """It is still read before the one that does."""
    bad = {"role": "assistant", "content": "bad", flag: off}
    chat = [USER, bad, {"role": "user", "content": "no"}, {**ANSWER, "content": "good", flag: 1}]
    row = read_values(tmp_path, {"messages": chat})
    assert trained(tokenizer, row) == "good<|im_end|>"
    assert "bad" in "".join(segment.text for segment in render_row(tokenizer, row))


def test_turns_after_the_last_answer_with_loss_are_left_out(tmp_path: Path) -> None:
    """A held-out row would otherwise be compared with an answer that the data calls bad."""
    bad = {"role": "assistant", "content": "bad", "weight": 0}
    row, counts = read_counted(tmp_path, {"messages": [USER, ANSWER, USER, bad]})
    assert (row["question"], row["answer"], row["messages"]) == ("q", "a", [])
    assert counts.changed == {"turns after the last answer with loss left out": 1}
    assert reason_of(tmp_path, {"messages": [USER, bad]}) == NOT_AN_EXAMPLE


@pytest.mark.parametrize("weight", [0.5, 2, "0", [0]])
def test_a_weight_between_the_two_is_refused(tmp_path: Path, weight: Any) -> None:
    values = {"messages": [USER, {**ANSWER, "weight": weight}]}
    assert reason_of(tmp_path, values) == "loss_weight_not_0_or_1"


def test_rows_labelled_as_bad_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    """They are no fault of the data: half of KTO's rows are such."""
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(40)]
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert (manifest.rows_read, manifest.quarantined, manifest.not_used) == (40, 0, 20)
    assert manifest.reasons[NOT_AN_EXAMPLE] == 20
    numbers = {**GOOD, "label": 0}  # a class, as far as anybody can know
    _, counts = read_counted(tmp_path, numbers)
    assert counts.unused == {"label": 1}


def test_a_row_of_the_data_sets_own_split_stays_there(tmp_path: Path) -> None:
    rows = [
        {"question": f"Question {n}?", "answer": f"{n}", "split": split}
        for n, split in enumerate(["train"] * 20 + ["validation"] * 3 + ["test"] * 4)
    ]
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert (manifest.train.rows, manifest.dev.rows, manifest.test_rows) == (20, 3, 4)
    _, counts = read_counted(tmp_path, {**GOOD, "split": "geography"})
    assert counts.unused == {"split": 1}


@pytest.mark.parametrize(
    ("dev", "test"),
    [
        ("validation-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("dev.jsonl", "test.jsonl"),
        ("faq_val.jsonl", "faq.test.jsonl"),
        ("validation/0.jsonl", "test/0.jsonl"),
    ],
)
def test_files_of_a_folder_keep_the_split_in_their_names(
    tmp_path: Path, dev: str, test: str
) -> None:
    """And files without rows are named, not read."""
    folder = tmp_path / "set"
    for name, count in (("train.jsonl", 20), ("contest.jsonl", 5), (dev, 3), (test, 4)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [{"question": f"{name} {n}?", "answer": f"{n}"} for n in range(count)])
    for name in ("dataset_infos.json", "notes.md", "rows.docx"):
        (folder / name).write_text("{}", encoding="utf-8")
    manifest = prepare(tmp_path, str(folder))
    assert (manifest.train.rows, manifest.dev.rows, manifest.test_rows) == (25, 3, 4)
    assert [Path(line.split(": ")[0]).name for line in manifest.skipped] == [
        *("dataset_infos.json", "notes.md", "rows.docx")
    ]


# --- conversations beside held-out questions ---


def _chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def _placed(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[int]:
    """Return the lines of training rows that are left out because they give answers away."""
    paths = (write_jsonl(folder / "train.jsonl", train),)
    held_out = (write_jsonl(folder / "test.jsonl", test),)
    manifest = prepare(folder, *paths, test_paths=held_out, held_out_fraction=0.1)
    left_out = read_lines(Path(manifest.path) / "left_out.jsonl")
    return sorted(row["line"] for row in left_out if row["reason"] == "leakage")


def test_a_held_out_question_is_not_trained_as_an_earlier_turn(tmp_path: Path) -> None:
    """Wherever it stands; nor is a held-out conversation that a longer one begins with."""
    filler = [{"question": f"How far is {n} from {n * n}?", "answer": f"{n}"} for n in range(30)]
    train = [
        _chat("Who saw Vela?", "Ann.", "Please continue.", "At night."),
        _chat("Hello!", "Hi.", "who saw vela", "Ann.", "Thank you.", "Welcome."),
        _chat("Tell me of Orion.", "Big.", "Please continue.", "Very.", "And?", "Bright."),
        _chat("Tell me of Rigel.", "Blue.", "Please continue.", "Hot."),
        *filler,
    ]
    test = [
        {"question": "Who saw Vela?", "answer": "Ann."},
        _chat("Tell me of Orion.", "Big.", "Please continue.", "Very."),
    ]
    assert _placed(tmp_path, train, test) == [1, 2, 3]


def test_conversations_that_end_alike_are_different(tmp_path: Path) -> None:
    """A last turn such as "Thank you" is no question to hold out."""
    names = [f"comet {n} of the {n * 7} which {'abcdefgh'[n % 8]} saw" for n in range(40)]
    train = [_chat(f"Tell me of {name}.", f"{name}!", "Thank you", "Welcome.") for name in names]
    test = [_chat("Tell me of the Sun.", "Hot.", "Thank you", "Welcome.")]
    assert _placed(tmp_path, train, test) == []


# --- keys inside messages, parts and calls ---


@pytest.mark.parametrize(
    "message",
    [
        {**ANSWER, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {**ANSWER, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
        {**ANSWER, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": [{"type": "text", "text": "a"},
         {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
        {"role": "assistant", "content": [{"type": "text", "value": "a"},
         {"type": "tool_call", "value": json.dumps(CALL)}]},
    ],
)  # fmt: skip
def test_a_call_beside_text_is_kept(tmp_path: Path, message: dict[str, Any]) -> None:
    """In each of the usual forms; a row may end with it, and the answer is what is written."""
    row = read_values(tmp_path, {"messages": [USER, message], "tools": [TOOL]})
    assert row["messages"][1] == {**ANSWER, "tool_calls": [CALL]}
    assert row["answer"] == 'a\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_of_a_message_is_kept_under_each_name(tmp_path: Path, key: str) -> None:
    row = read_values(tmp_path, {"messages": [USER, {**ANSWER, key: "r"}]})
    assert row["reasoning"] == "r"


def test_parts_of_thinking_and_results_are_kept(tmp_path: Path) -> None:
    """Anthropic's: results come in the user's message."""
    chat = [
        USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "x"},
         {"type": "tool_use", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text",
         "text": "3"}]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]  # fmt: skip
    row = read_values(tmp_path, {"messages": chat, "tools": [TOOL]})
    assert [message["role"] for message in row["messages"]] == [
        *("user", "assistant", "tool", "assistant")
    ]
    assert row["messages"][1].get("reasoning") == "t"
    assert row["messages"][2]["content"] == "3"


@pytest.mark.parametrize(
    "values",
    [
        {**GOOD, "images": ["a.png"]},
        {**GOOD, "audio": {"path": "a.wav"}},
        {"messages": [{**USER, "images": ["a.png"]}, ANSWER]},
        {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, ANSWER]},
        {"messages": [{**USER, "content": [{"type": "input_audio", "data": "x"}]}, ANSWER]},
    ],
)
def test_rows_with_media_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    """The model sees text alone, and the placeholder of an image would be trained as such."""
    assert reason_of(tmp_path, values) == "has_media"
    empty = {**GOOD, "images": [], "videos": None}
    assert read_values(tmp_path, empty)["answer"] == "Friday"


def _planted(place: str, name: str, value: Any) -> dict[str, Any]:
    """Return a row with `value` under `name` somewhere."""
    call = {"type": "function", "function": dict(CALL)}
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            dict(ANSWER),
        ],
        "tools": [TOOL],
    }
    targets = {
        "column": row,
        "user": row["messages"][0],
        "part": row["messages"][0]["content"][0],
        "call": call,
        "function": call["function"],
        "result": row["messages"][2],
        "answer": row["messages"][3],
    }
    targets[place][name] = value
    return row


@pytest.mark.parametrize(
    "place", ["column", "user", "part", "call", "function", "result", "answer"]
)
def test_a_planted_key_is_named(tmp_path: Path, place: str) -> None:
    """Random names and values, at every level; empty values say nothing and are not listed."""
    draw = random.Random(place)
    for value in ("text", 3, False, 0.5, ["x"], {"y": 1}):
        name = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz_", k=9))
        _, counts = read_counted(tmp_path, _planted(place, name, value))
        assert [key for key in counts.unused if key.split(".")[-1] == name], counts.unused
    for empty in (None, "", [], {}):
        _, counts = read_counted(tmp_path, _planted(place, "note", empty))
        assert not counts.unused


def test_what_is_not_used_reaches_the_manifest_and_a_warning(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}", "note": "x"} for n in range(20)]
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert manifest.unused == {"note": 20}
    assert any("note (20)" in warning for warning in manifest.warnings)


# --- columns and keys of one name, or none ---


def test_the_numbers_of_rows_in_a_column_without_a_name_are_not_read(tmp_path: Path) -> None:
    """Pandas and R write such a column; it is no second question."""
    path = tmp_path / "faq.csv"
    path.write_text(",question,answer\n0,Which day?,Friday\n1,When?,Now\n", encoding="utf-8")
    rows = read(path)
    assert [row["question"] for row in rows if not isinstance(row, BadRow)] == [
        *("Which day?", "When?")
    ]
    _, counts = read_counted(tmp_path, {"": 0, **GOOD})
    assert counts.unused == {"(a column without a name)": 1}


@pytest.mark.parametrize("other", ["Question", " question", "ANSWER", "answer "])
def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path, other: str) -> None:
    """Either may be meant; the config can say which."""
    values = {**GOOD, other: "x"}
    assert reason_of(tmp_path, values) == "two_columns_of_one_name"


def test_a_repeated_name_is_refused_in_every_format(tmp_path: Path) -> None:
    """A row could hold one of the two values only."""
    table = tmp_path / "a.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "answer"], ["q", "a", "b"]])
    [row] = read(table)
    assert isinstance(row, BadRow)
    assert "'answer'" in row.excerpt
    arrow = pa.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    pq.write_table(arrow, tmp_path / "a.parquet")
    [row] = read(tmp_path / "a.parquet")
    assert isinstance(row, BadRow)
    for line in (
        b'{"question": "q", "answer": "a", "answer": "b"}',
        b'{"messages": [{"role": "user", "content": "q", "content": "r"}]}',
    ):
        row = read_line(tmp_path, line)
        assert isinstance(row, BadRow)
        assert row.reason == "duplicate_key"


@pytest.mark.parametrize(
    "values",
    [
        {**GOOD, "tools": '[{"name": "f", "name": "g"}]'},
        {"messages": f'[{json.dumps(USER)}, {{"role": "assistant", "content": 1, "content": 2}}]'},
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f",
         "arguments": '{"x": 1, "x": 2}'}}]},
    ],
)  # fmt: skip
def test_a_repeated_key_is_refused_in_json_within_a_row(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """An answer that is such JSON is a text, and all of it is trained."""
    assert reason_of(tmp_path, values) == "duplicate_key"
    text = '[{"name": "f", "arguments": {"x": 1, "x": 2}}]'
    row = read_values(tmp_path, {**GOOD, "answer": text, "tools": [TOOL]})
    assert row["answer"] == text


# --- texts ---


@pytest.mark.parametrize("text", ["    return x\n", "\n\n\tx = 1\n\ty = 2", "  - a\n    - b\n "])
def test_indentation_is_kept_as_the_template_keeps_it(
    tmp_path: Path, tokenizer: Any, text: str
) -> None:
    """Of questions, answers and results; blank lines around go."""
    wanted = text.strip("\n").rstrip()
    row = read_values(tmp_path, {"prompt": text, "completion": text})
    assert (row["question"], row["answer"]) == (wanted, wanted)
    assert trained(tokenizer, row) == f"{wanted}<|im_end|>"
    chat = [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": text},
        {"role": "assistant", "content": f"<think>\nt\n</think>\n\n{text}"},
    ]
    row = read_values(tmp_path, {"messages": chat, "tools": [TOOL]})
    assert [row["messages"][2]["content"], row["answer"]] == [wanted, wanted]
    rendered = "".join(segment.text for segment in render_row(tokenizer, row))
    own = apply_template(tokenizer, row["messages"], row["tools"])
    assert rendered == own.rstrip("\n")


def test_an_answer_about_the_closing_tag_is_not_cut_there(tmp_path: Path) -> None:
    """It is refused, for the model would take the tag for its own."""
    text = "Write </think> to end the block."
    assert reason_of(tmp_path, {**GOOD, "answer": text}) == "broken_think"
    row = read_values(tmp_path, {**GOOD, "answer": "it follows\n</think>\nFriday"})
    assert (row["reasoning"], row["answer"]) == ("it follows", "Friday")


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_every_special_token_in_a_text_is_found(tmp_path: Path, token: str) -> None:
    assert reason_of(tmp_path, {**GOOD, "answer": f"see {token}"}) == "control_token"


def test_fields_that_arrow_filled_with_nulls_are_not_trained(tmp_path: Path) -> None:
    """A structure has the fields of all rows: of calls, schemas and messages."""
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"b": 1}}]
    tools = [{"name": "f", "parameters": {"city": {"type": "string"}}}, {"name": "g"}]
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
        for call, tool in zip(calls, tools, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for row, call, tool in zip(read(tmp_path / "a.parquet"), calls, tools, strict=True):
        assert not isinstance(row, BadRow)
        assert row["messages"][1]["tool_calls"] == [call]
        assert row["tools"] == [{"type": "function", "function": tool}]


# --- functions ---


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "parameters": {}},
        {"type": "function", "name": "f", "parameters": {}},
        {"name": "f", "input_schema": {}},
        {"function": {"name": "f", "parameters": {}}},
    ],
)
def test_tools_are_rendered_as_a_server_sends_them(tmp_path: Path, tool: dict[str, Any]) -> None:
    row, counts = read_counted(tmp_path, {**GOOD, "tools": [tool]})
    assert row["tools"] == [TOOL]
    assert counts.changed == {WRAPPED_TOOLS: 1}


@pytest.mark.parametrize(
    "values",
    [
        {"query": "q", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])},
        {"query": "q", "answers": [CALL], "tools": [TOOL]},
        {"messages": [USER, {"role": "assistant", "content": json.dumps(CALL)}], "tools": [TOOL]},
    ],
)
def test_calls_stated_as_json_are_trained_as_the_template_writes_them(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """XLAM's layout; JSON without such a function on offer is a text."""
    row, counts = read_counted(tmp_path, values)
    assert row["messages"] == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert counts.changed[CALLS_FROM_JSON] == 1
    plain = read_values(tmp_path, {"question": "q", "answer": json.dumps([CALL])})
    assert plain["answer"] == json.dumps([CALL])


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_calls_in_messages_of_their_own_become_one_turn(tmp_path: Path, role: str) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "Let me see."},
        {"from": role, "value": json.dumps(CALL)},
        {"from": role, "value": json.dumps([CALL, {"name": "f", "arguments": ""}])},
        {"from": "observation", "value": ""},
        {"from": "tool_response", "value": "4"},
        {"from": "gpt", "value": "a"},
    ]
    row, counts = read_counted(tmp_path, {"conversations": turns, "tools": [TOOL]})
    assert row["messages"][1] == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [CALL, CALL, {"name": "f", "arguments": {}}],
    }
    assert [message["content"] for message in row["messages"][2:]] == ["", "4", "a"]
    assert counts.changed == {JOINED_CALLS: 1}


# --- layouts that were refused ---


def test_more_layouts_are_understood(tmp_path: Path) -> None:
    """Pairs of Firefly, an empty instruction, a later system prompt, a union with nulls."""
    pairs = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]
    row = read_values(tmp_path, {"conversation": pairs})
    assert [message["content"] for message in row["messages"]] == ["q", "a", "r", "b"]
    row = read_values(tmp_path, {"instruction": "", "input": "q", "output": "a"})
    assert row["question"] == "q"
    later = [USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER]
    assert read_values(tmp_path, {"messages": later})["messages"] == later
    empty = [{"role": "system", "content": ""}, USER, ANSWER]
    assert read_values(tmp_path, {"messages": empty})["messages"] == empty
    row = read_values(tmp_path, {"messages": None, "prompt": "q", "completion": "a"})
    assert (row["question"], row["answer"]) == ("q", "a")
    row, counts = read_counted(tmp_path, {"messages": [USER, USER, ANSWER]})
    assert row["question"] == "q\n\nq"
    assert counts.changed == {JOINED_USER_TURNS: 1}


def test_a_column_that_is_not_known_is_asked_for_by_a_command_that_works(tmp_path: Path) -> None:
    """It lists the columns there are, and names the most similar one."""
    rows = [{"class": "x", "question": f"q{n}", "std_answer": f"a{n}"} for n in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataLoadingError) as caught:
        prepare(tmp_path, path)
    assert "'class', 'question', 'std_answer'" in caught.value.why
    setting = shlex.split(caught.value.next_command)[-1]
    columns = yaml.safe_load(setting.removeprefix("columns="))
    assert columns == {"answer": "std_answer"}
    assert prepare(tmp_path, path, columns=columns).usable_rows == 20


def test_rows_left_out_by_a_setting_are_the_reason_that_is_given(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "question": "When?"}])
    with pytest.raises(DataLoadingError) as caught:
        prepare(tmp_path, path, rows_without_reasoning="leave_out")
    assert "2 good rows have no reasoning" in caught.value.why


def test_one_warning_does_not_hide_another(tmp_path: Path) -> None:
    """A conversation with reasoning, beside rows without any for a model that always thinks."""
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    template = model / "chat_template.jinja"
    always = template.read_text(encoding="utf-8").replace(
        "    {{- '<|im_start|>assistant\\n' }}\n",
        "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n",
    )
    template.write_text(always.replace("enable_thinking is defined and", "false and"))
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(20)]
    thought = {**ANSWER, "reasoning": "r"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"messages": [USER, thought] * 2}])
    config = TrainingConfig(model_name="embedded", data_paths=(path,))
    snapshot = SNAPSHOT.model_copy(update={"path": str(model)})
    warnings = " ".join(DataPipeline(config).prepare(snapshot, tmp_path / "data").warnings)
    assert "20 of 21 rows have no reasoning, and this model always thinks" in warnings
    assert "1 rows are conversations with reasoning before the last" in warnings


# --- marks and answers beside a conversation ---


@pytest.mark.parametrize("chosen", ["a", ANSWER, [ANSWER], {"from": "gpt", "value": "a"}])
def test_the_chosen_answer_ends_a_conversation_that_lacks_one(tmp_path: Path, chosen: Any) -> None:
    """Preference data with a prompt of messages; beside a whole conversation it is named."""
    values = {"conversations": [USER], "chosen": chosen, "rejected": "b"}
    row, counts = read_counted(tmp_path, values)
    assert (row["question"], row["answer"]) == ("q", "a")
    assert counts.unused == {"rejected": 1}
    row, counts = read_counted(tmp_path, {"messages": [USER, ANSWER], "chosen": chosen})
    assert counts.unused == {"chosen": 1}
    for other in ("solution", "output", "response"):  # what a reward looks at, perhaps
        assert reason_of(tmp_path, {"messages": [USER], other: "a"}) == "ends_without_answer"


@pytest.mark.parametrize("mark", ["label", "kto_tag", "KTO_tag"])
def test_a_false_mark_leaves_a_row_out_under_each_name(tmp_path: Path, mark: str) -> None:
    for false in (False, "False", "false "):  # a table has texts
        assert reason_of(tmp_path, {**GOOD, mark: false}) == NOT_AN_EXAMPLE
    for true in (True, "True"):
        _, counts = read_counted(tmp_path, {**GOOD, mark: true})
        assert not counts.unused


def test_loss_on_pieces_of_an_answer_is_refused(tmp_path: Path) -> None:
    """Axolotl's train_detail: the whole answer would be trained."""
    pieces = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    values = {"messages": [USER, {**ANSWER, "train_detail": pieces}]}
    assert reason_of(tmp_path, values) == "loss_of_parts"


@pytest.mark.parametrize("switch", ["on", "off", True, False])
def test_a_switch_of_reasoning_is_no_reasoning(tmp_path: Path, switch: Any) -> None:
    row, counts = read_counted(tmp_path, {**GOOD, "answer": "x", "reasoning": switch})
    assert (row["reasoning"], counts.unused) == ("", {"reasoning": 1})


def test_what_is_left_of_several_answers_is_named(tmp_path: Path) -> None:
    for answers in (["a", "b"], {"text": ["a", "b"], "answer_start": [1, 2]}, [{"text": "a"}, "b"]):
        row, counts = read_counted(tmp_path, {"question": "q", "answers": answers})
        assert row["answer"] == "a"
        assert any(name.endswith("[1:]") for name in counts.unused)
        assert ("answers.answer_start" in counts.unused) == (type(answers) is dict)


def test_a_prompt_of_the_system_may_be_parts_of_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}, {"text": "t"}]
    row, counts = read_counted(tmp_path, {"messages": [USER, ANSWER], "system": parts})
    assert row["messages"][0] == {"role": "system", "content": "st"}
    assert counts.unused == {"system.content[].cache_control": 1}
    image = [{"type": "image", "source": "x"}]
    assert reason_of(tmp_path, {**GOOD, "system": image}) == "has_media"
