"""Rows that the data stage leaves out, shortens or mixes by the config, and new rows."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.data_stage import (
    SNAPSHOT,
    accounted,
    prepare,
    questions,
    read_lines,
    synthetic,
    trained_ids,
    write_jsonl,
)

from qwen3ft.chat.templates import END_TOKEN
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.data import reading
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.token_table import load_split
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.operations.new_data import compare_data
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.evaluation import Champion


def test_rows_without_reasoning_are_left_out_where_asked(tmp_path: Path) -> None:
    """They are counted as not used, and every row that is trained has its think block."""
    rows = synthetic(90)
    data = write_jsonl(tmp_path / "qa.jsonl", rows)
    manifest = prepare(tmp_path, data, rows_without_reasoning="leave_out")
    bare = sum(not row["reasoning"] for row in rows)
    assert (manifest.not_used, manifest.reasons) == (bare, {"no_reasoning": bare})
    assert manifest.rows_read == accounted(manifest) == 90
    assert manifest.usable_rows == manifest.reasoning_rows == 90 - bare
    tokenizer = load_tokenizer(MODEL_DIR)
    for row in load_split(tmp_path / "data", "train"):
        assert tokenizer.decode(trained_ids(row)).startswith("<think>\n")


def test_personal_data_is_reported_or_quarantined_and_never_shown(tmp_path: Path) -> None:
    """Places and kinds are written down; with 'quarantine' such rows are not trained on."""
    mail = "some.one" + "@" + "posthof-haus.net"
    rows = [*synthetic(60), {"question": "Whom do I ask?", "answer": f"Write to {mail}."}]
    data = write_jsonl(tmp_path / "qa.jsonl", rows)
    reported = prepare(tmp_path, data)
    assert (reported.personal_data, reported.quarantined) == ({"email": 1}, 0)
    assert any("personal_data: quarantine" in warning for warning in reported.warnings)
    [place] = read_lines(Path(reported.path) / "personal_data.jsonl")
    assert place == {"file": data, "line": 61, "kinds": ["email"]}
    left_out = prepare(tmp_path, data, personal_data="quarantine")
    assert left_out.reasons == {"personal_data": 1}
    assert left_out.rows_read == accounted(left_out) == 61
    assert mail not in (Path(left_out.path) / "quarantine.jsonl").read_text()
    assert prepare(tmp_path, data, personal_data="off").personal_data == {}


def test_personal_data_is_found_wherever_it_is_trained_on_or_read(tmp_path: Path) -> None:
    """In earlier turns and their reasoning, in functions' calls and schemas, behind line breaks."""
    mail = "some.one" + "@" + "posthof-haus.net"
    call = {"name": "send", "arguments": {"to": mail}}
    phone = "138" + "12345678"
    behind_a_break = {"name": "send", "arguments": {"texts": [f"Call\n{phone}"]}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]
    rows: list[dict[str, Any]] = [
        {"messages": [turns[0], {**turns[1], "reasoning_content": f"ask {mail}"}, *turns]},
        {"messages": [turns[0], {"role": "assistant", "tool_calls": [call]}]},
        {"messages": turns, "tools": [{"name": "send", "description": f"mail to {mail}"}]},
        {"messages": [{"role": "system", "content": f"You are {mail}"}, *turns]},
        {"question": "Whom?", "answer": "Me.", "reasoning": f"it is {mail}"},
        {"messages": [turns[0], {"role": "assistant", "tool_calls": [behind_a_break]}]},
        {"messages": turns, "tools": [{"name": "send", "description": f"Call\n{phone}"}]},
    ]
    data = write_jsonl(tmp_path / "qa.jsonl", [*synthetic(60), *rows])
    manifest = prepare(tmp_path, data, personal_data="quarantine")
    assert manifest.reasons == {"personal_data": len(rows)}


def test_a_name_or_text_says_nothing_of_the_text_behind_it(tmp_path: Path) -> None:
    """It is no label as in `order 5` or `id: 5`; a number is labelled by its name."""
    phone = "138" + "12345678"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]

    def called(arguments: dict[str, Any], answer: str = "Done.") -> dict[str, Any]:
        call = {"role": "assistant", "tool_calls": [{"name": "send", "arguments": arguments}]}
        return {"messages": [turns[0], call, {"role": "tool", "content": answer}, turns[1]]}

    rows = [
        called({"contact_id": phone}),
        called({"texts": ["paid", phone]}),
        called({"kind": "order"}, answer=phone),
        {"messages": turns, "tools": [{"name": "send", "parameters": {"batch": [phone]}}]},
    ]
    order = called({"order_id": int(phone)})
    data = write_jsonl(tmp_path / "qa.jsonl", [*synthetic(60), *rows, order])
    manifest = prepare(tmp_path, data, personal_data="quarantine")
    assert manifest.reasons == {"personal_data": len(rows)}


def test_a_long_reasoning_loses_its_middle_where_asked_and_the_answer_stays(tmp_path: Path) -> None:
    """'drop' leaves the row out, 'shorten_reasoning' keeps it whole at both ends, 'fail' stops."""
    rows = [
        {"question": f"Q{n}", "answer": f"answer {n}", "reasoning": f"first {'word ' * 99}last {n}"}
        for n in range(40)
    ]
    data = write_jsonl(tmp_path / "qa.jsonl", [*rows, *synthetic(60)])
    limit = {"max_sequence_length": 96}
    assert prepare(tmp_path, data, **limit).too_long == 40
    with pytest.raises(DataLoadingError, match="40 rows are longer than 96 tokens"):
        prepare(tmp_path, data, too_long="fail", **limit)
    manifest = prepare(tmp_path, data, too_long="shorten_reasoning", **limit)
    assert (manifest.too_long, manifest.shortened) == (0, 40)
    assert manifest.rows_read == accounted(manifest) == 100
    tokenizer, seen = load_tokenizer(MODEL_DIR), 0
    for row in load_split(tmp_path / "data", "train"):
        assert row["length"] <= 96
        text = tokenizer.decode(trained_ids(row))
        if "first" in text:
            seen += 1
            number = text.rpartition("answer ")[2].removesuffix(END_TOKEN)
            assert text.startswith("<think>\nfirst")
            assert f"last {number}\n</think>" in text
    assert seen > 20


def test_no_source_gives_more_rows_than_its_cap(tmp_path: Path) -> None:
    """A large file is sampled, a small one stays whole, and the rest is counted as not used."""
    large = write_jsonl(tmp_path / "large.jsonl", synthetic(200))
    small = write_jsonl(tmp_path / "small.jsonl", synthetic(20, start=1000))
    manifest = prepare(tmp_path, large, small, max_rows_per_source=50)
    assert manifest.rows_read == accounted(manifest) == 220
    assert 50 < manifest.train.rows <= 70
    assert manifest.not_used > 100


def test_a_marker_in_a_text_is_trained_as_text_where_escaped(tmp_path: Path) -> None:
    """By default the row is quarantined; escaped, the marker's token occurs where it belongs."""
    rows = [*synthetic(60), {"question": f"What does {END_TOKEN} mean?", "answer": "The end."}]
    data = write_jsonl(tmp_path / "qa.jsonl", rows)
    assert prepare(tmp_path, data).reasons == {"control_token": 1}
    manifest = prepare(tmp_path, data, special_tokens_in_text="escape", held_out_fraction=0.05)
    assert (manifest.quarantined, manifest.rows_read) == (0, 61)
    end = load_tokenizer(MODEL_DIR).convert_tokens_to_ids(END_TOKEN)
    for split in ("train", "dev"):
        for row in load_split(tmp_path / "data", split):
            assert row["input_ids"].count(end) == 2


def test_near_duplicates_in_training_are_counted_and_dropped_where_asked(tmp_path: Path) -> None:
    """Rows that differ in a word are counted, and the first of them stays."""
    chance = random.Random(1)
    words = [f"w{chr(97 + n)}{chr(97 + m)}" for n in range(12) for m in range(12)]
    texts = [" ".join(chance.sample(words, k=60)) for _ in range(60)]
    rows = [{"question": text, "answer": "yes"} for text in texts]
    copies = [{"question": f"{text} indeed", "answer": "yes"} for text in texts]
    data = write_jsonl(tmp_path / "qa.jsonl", [*rows, *copies])
    kept = prepare(tmp_path, data, max_sequence_length=1024)
    assert kept.near_duplicates > 40
    dropped = prepare(tmp_path, data, max_sequence_length=1024, near_duplicates="drop")
    assert dropped.reasons["near_duplicate"] == dropped.near_duplicates == kept.near_duplicates
    assert dropped.train.rows == kept.train.rows - kept.near_duplicates
    assert dropped.rows_read == accounted(dropped) == 120


def champion_of(folder: Path, manifest: DatasetManifest) -> Champion:
    """Return a version in use that was trained on the rows of `manifest`."""
    adapter = folder / "champion"
    adapter.mkdir()
    shutil.copyfile(Path(manifest.path) / "known_rows.npy", adapter / "known_rows.npy")
    card = {"data": manifest.model_dump(mode="json", include={"digest", "sources"})}
    (adapter / "provenance.json").write_text(json.dumps(card))
    return Champion(registered_model="m", version="3", source_uri="", adapter_path=str(adapter))


def test_new_rows_are_mixed_with_a_sample_of_those_seen_before(tmp_path: Path) -> None:
    """With `mix`, every new row is trained, and old ones up to the share asked for."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(300))
    first = prepare(tmp_path, data)
    known = str(tmp_path / "known.npy")
    shutil.copyfile(Path(first.path) / "known_rows.npy", known)
    old = set(questions(first, "train"))
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(340))
    config = TrainingConfig(
        model_name="embedded", data_paths=(data,), new_data="mix", replay_fraction=0.5
    )
    mixed = DataPipeline(config).prepare(SNAPSHOT, tmp_path / "data", known_rows=known)
    trained = set(questions(mixed, "train"))
    assert mixed.rows_read == accounted(mixed) == 340
    assert mixed.new_rows == len(trained - old) > 30
    assert len(trained & old) == mixed.new_rows
    again = DataPipeline(config).prepare(SNAPSHOT, tmp_path / "data", known_rows=known)
    assert again.digest == mixed.digest


def test_nothing_new_to_mix_is_no_error(tmp_path: Path) -> None:
    """Unchanged data gives a folder without training rows, at which the flow stops."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(100))
    known = str(tmp_path / "known.npy")
    shutil.copyfile(Path(prepare(tmp_path, data).path) / "known_rows.npy", known)
    config = TrainingConfig(model_name="embedded", data_paths=(data,), new_data="mix")
    manifest = DataPipeline(config).prepare(SNAPSHOT, tmp_path / "data", known_rows=known)
    assert (manifest.new_rows, manifest.train.rows) == (0, 0)
    assert manifest.rows_read == accounted(manifest)


def test_changes_since_the_champion_are_found_by_file_and_row(tmp_path: Path) -> None:
    """New, changed and gone files and unseen rows; renaming a file makes no row new."""
    (tmp_path / "in").mkdir()
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", synthetic(100, start))
    before = prepare(tmp_path, str(tmp_path / "in"))
    champion = champion_of(tmp_path, before)
    same = compare_data(before, champion)
    assert same.unchanged
    assert (same.since, same.new_rows, same.new_files) == ("m v3", 0, ())
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "d.jsonl")
    write_jsonl(tmp_path / "in" / "b.jsonl", synthetic(150, 100))
    after = compare_data(prepare(tmp_path, str(tmp_path / "in")), champion)
    folder = f"{tmp_path}/in"
    assert not after.unchanged
    assert after.new_files == (f"{folder}/d.jsonl",)
    assert after.changed_files == (f"{folder}/b.jsonl",)
    assert after.gone_files == (f"{folder}/a.jsonl",)
    assert after.new_rows == 0
    assert compare_data(before, None).since is None


def test_new_rows_are_counted_by_file_with_questions_of_a_few(tmp_path: Path) -> None:
    """A few rows more in one file and a new file: exactly those, and questions of both."""
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", synthetic(100))
    before = prepare(tmp_path, str(tmp_path / "in"))
    first = compare_data(before, None)
    assert sum(first.new_rows_by_file.values()) == before.train.rows
    champion = champion_of(tmp_path, before)
    write_jsonl(tmp_path / "in" / "a.jsonl", [*synthetic(100), *synthetic(40, 500)])
    write_jsonl(tmp_path / "in" / "b.jsonl", synthetic(60, 900))
    manifest = prepare(tmp_path, str(tmp_path / "in"))
    after = compare_data(manifest, champion)
    assert set(after.new_rows_by_file) == {f"{tmp_path}/in/{name}.jsonl" for name in "ab"}
    assert sum(after.new_rows_by_file.values()) == after.new_rows > 60
    numbers = [int(re.search(r"\d+", question)[0]) for question in after.examples]  # type: ignore[index]
    assert len(numbers) == len(set(numbers)) == 5
    assert {number // 400 for number in numbers} == {1, 2}
    assert compare_data(prepare(tmp_path, str(tmp_path / "in")), champion) == after


def test_a_folder_of_an_earlier_version_has_new_rows_and_no_examples(tmp_path: Path) -> None:
    """Its rows have no origins, and its questions lie in a file of their own."""
    write_jsonl(tmp_path / "a.jsonl", synthetic(60))
    manifest = prepare(tmp_path, str(tmp_path / "a.jsonl"))
    path = Path(manifest.path) / "train.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    table = table.select(["input_ids", "trained", "length"])
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    (path.parent / "questions.parquet").touch()
    sources = tuple(one.model_copy(update={"for_training": 0}) for one in manifest.sources)
    change = compare_data(manifest.model_copy(update={"sources": sources}), None)
    assert (change.new_rows, change.new_rows_by_file) == (manifest.train.rows, {})
    assert change.examples == ()
    assert load_split(path.parent, "train").column_names == table.column_names


def test_a_quarantine_ends_at_its_limit_and_says_how_many_rows_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts stay exact, and unreadable files are listed all the same."""
    monkeypatch.setattr(reading, "MOST_LISTED_BYTES", 2000)
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(60))
    with Path(data).open("a", encoding="utf-8") as stream:
        stream.write("broken\n" * 500)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(b"\x1f\x8b\x08")
    manifest = prepare(tmp_path, data, str(cut), max_bad_fraction=1.0)
    assert manifest.rows_read == accounted(manifest) == 560
    assert manifest.reasons == {"broken_json": 500, "unreadable_file": 1}
    *listed, unreadable, last = read_lines(Path(str(manifest.quarantine_path)))
    assert 10 < len(listed) < 30
    assert manifest.not_listed == 500 - len(listed)
    assert unreadable["reason"] == "unreadable_file"
    assert (last["reason"], last["excerpt"]) == ("not_listed", f"{manifest.not_listed} more rows")
    assert any(f"{manifest.not_listed} bad rows are counted" in text for text in manifest.warnings)
