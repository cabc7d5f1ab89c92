"""The data stage as a whole: nothing lost, nothing cut, nothing both held out and trained on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.data_stage import (
    GSM8K,
    ROOT,
    SNAPSHOT,
    accounted,
    prepare,
    questions,
    read_lines,
    synthetic,
    trained_ids,
    write_jsonl,
)

from qwen3ft.chat.rendering import prompt_ids
from qwen3ft.chat.templates import END_TOKEN
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig, load_config
from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.data.folder import read_manifest
from qwen3ft.data.pipeline import DataPipeline, dataset_target
from qwen3ft.data.sources import SAMPLE_DATA, resolved
from qwen3ft.data.token_table import load_split
from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.planning.fit import choose
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.records.model import ModelSnapshot

# --- the four kinds of test data ---


def test_synthetic_rows_are_all_used_and_split(tmp_path: Path) -> None:
    """Clean rows are trained on or held out, about a tenth of them, and nothing else happens."""
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", synthetic(300)))
    assert manifest.rows_read == accounted(manifest) == 300
    assert manifest.train.rows + manifest.dev.rows + manifest.test_rows == 300
    assert 15 <= manifest.dev.rows + manifest.test_rows <= 45
    everywhere = [
        question for split in ("train", "dev", "test") for question in questions(manifest, split)
    ]
    assert sorted(everywhere) == sorted(row["question"] for row in synthetic(300))
    assert manifest.degraded == ()
    assert manifest.reasons == {}


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K sample is not on this machine")
def test_real_rows_of_gsm8k_are_accounted_for(tmp_path: Path) -> None:
    """Real rows: the reasoning before '####' is trained inside the think block."""
    rows = read_lines(GSM8K)[:400]
    data = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    manifest = prepare(
        tmp_path, data, reasoning_separator="####", max_sequence_length=512, max_rows=250
    )
    assert manifest.rows_read == accounted(manifest) == 400
    assert (manifest.train.rows, manifest.quarantined) == (250, 0)
    assert 0 < manifest.too_long < 80
    assert manifest.train.longest_tokens <= 512
    [first] = load_split(tmp_path / "data", "train").select([0])
    text = load_tokenizer(MODEL_DIR).decode(trained_ids(first))
    assert text.startswith("<think>\n")
    assert text.endswith(END_TOKEN)
    assert "####" not in text


def edge_cases() -> list[bytes]:
    """Lines that break a naive reader, among 40 good ones."""
    good = [json.dumps(row).encode() for row in synthetic(40)]
    bad = [
        *(b"{oops", b"[1]", b"", b"   ", b'{"question": "", "answer": "b"}'),
        *(b'{"question": 1, "answer": "b"}', b'{"question": "\xff", "answer": "b"}'),
        *(b'{"question": "a\\u0000", "answer": "b"}', b'{"question": "\\udc00", "answer": "b"}'),
        b'{"question": "a", "answer": "b", "score": NaN}',
    ]
    long = json.dumps({"question": "long " * 5000, "answer": "x"}).encode()
    endless = json.dumps({"question": "Write a book.", "answer": "word " * 50_000}).encode()
    repeated = good[:3]
    return [*good[:20], *bad, long, *good[20:], endless, *repeated]


def test_edge_cases_cost_themselves_alone(tmp_path: Path) -> None:
    """Malformed, empty and extremely long rows are listed; the 40 good ones are all used."""
    path = tmp_path / "edge.jsonl"
    path.write_bytes(b"\n".join(edge_cases()) + b"\n")
    manifest = prepare(tmp_path, str(path))
    assert manifest.rows_read == accounted(manifest) == 40 + 8 + 2 + 3
    assert (manifest.quarantined, manifest.too_long, manifest.duplicates) == (8, 2, 3)
    assert manifest.train.rows + manifest.dev.rows + manifest.test_rows == 40
    assert manifest.reasons == {
        "broken_json": 1,
        "not_an_object": 1,
        "empty_question": 1,
        "question_not_text": 1,
        "invalid_utf8": 1,
        "nul": 1,
        "lone_surrogate": 1,
        "nan_literal": 1,
    }
    left_out = read_lines(Path(manifest.path) / "left_out.jsonl")
    assert sorted(row["reason"] for row in left_out) == ["duplicate"] * 3 + ["too_long"] * 2
    assert max(row.get("tokens", 0) for row in left_out) > 50_000


MEMORY_PROBE = """
import sys, threading
from pathlib import Path
import datasets, psutil
from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.records.model import ModelSnapshot
datasets.disable_progress_bars()
def prepare(path):
    config = TrainingConfig(model_name="embedded", data_paths=(path,))
    snapshot = ModelSnapshot.model_validate_json(sys.argv[1])
    return DataPipeline(config).prepare(snapshot, Path(path).with_suffix(".out"))
def watch():
    while not done.wait(0.005):
        resident.append(process.memory_info().rss)
prepare(sys.argv[2])  # imports, tokenizer, thread pools: what any run costs
process, done = psutil.Process(), threading.Event()
resident = [process.memory_info().rss]
watcher = threading.Thread(target=watch)
watcher.start()
manifest = prepare(sys.argv[3])
done.set()
watcher.join()
print(manifest.rows_read, manifest.train.tokens, max(resident) - resident[0])
"""


@pytest.mark.parametrize("count", [4000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_large_file_takes_memory_in_proportion_to_its_rows(tmp_path: Path, count: int) -> None:
    """The peak grows by less than 32 MB and 2.5 kB a row of 120 bytes; every row is read."""
    words = random.Random(0)
    small = write_jsonl(tmp_path / "small.jsonl", synthetic(50))
    large = write_jsonl(
        tmp_path / "large.jsonl",
        (
            {"question": f"{n}: {words.getrandbits(64):x} {'which? ' * 9}", "answer": f"{n} ok"}
            for n in range(count)
        ),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, SNAPSHOT.model_dump_json(), small, large],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, tokens, growth_bytes = map(int, done.stdout.split())
    assert rows == count
    assert tokens > 50 * count
    assert growth_bytes < 32 * 2**20 + 2500 * count, f"{growth_bytes / 2**20:.0f} MiB"


# --- what is trained ---


def test_the_prompt_carries_no_loss_and_the_end_token_does(tmp_path: Path) -> None:
    """Labels repeat the ids after the prompt; only a think block with reasoning is trained."""
    tokenizer = load_tokenizer(MODEL_DIR)
    rows = synthetic(60)
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", rows))
    reasoning = {row["question"]: row["reasoning"] for row in rows}
    asked, trained = questions(manifest, "train"), 0
    for row, question in zip(load_split(tmp_path / "data", "train"), asked, strict=True):
        prompt = prompt_ids(tokenizer, question, bool(reasoning[question]))
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["trained"] == [len(prompt), row["length"]]
        assert tokenizer.decode(trained_ids(row)[-1:]) == END_TOKEN
        assert row["length"] == len(row["input_ids"])
        trained += len(trained_ids(row))
        whole = tokenizer.decode(row["input_ids"])
        assert whole.count("<think>") == 1
        thinks = "think>" in tokenizer.decode(trained_ids(row))
        assert thinks == bool(reasoning[question]) == ("<think>\n\n</think>" not in whole)
    assert trained == manifest.train.trained_tokens


def test_a_row_is_never_cut(tmp_path: Path) -> None:
    """Whatever the limit, rows are whole or absent, and their number says so."""
    data = write_jsonl(
        tmp_path / "qa.jsonl",
        ({"question": f"Q{n}", "answer": "word " * (n % 20 + 1)} for n in range(300)),
    )
    manifest = prepare(tmp_path, data, max_sequence_length=40)
    assert 0 < manifest.too_long < 300
    assert manifest.rows_read == accounted(manifest)
    for row in load_split(tmp_path / "data", "train"):
        assert row["length"] <= 40
        assert row["input_ids"][-1] == load_tokenizer(MODEL_DIR).convert_tokens_to_ids(END_TOKEN)


def test_a_question_leaked_on_purpose_is_found(tmp_path: Path) -> None:
    """Held-out questions planted in training, verbatim and slightly reworded, are removed."""
    asked = read_lines(DATA_DIR / "train.jsonl")[:50]
    test = write_jsonl(tmp_path / "test.jsonl", asked)
    words = random.Random(0)
    near = [
        " ".join(words.choices(["red", "boat", "river", "noon", "bridge", "cold", "wide"], k=60))
        + " old clock?"
        for _ in range(10)
    ]
    held_out = [{"question": question, "answer": "the red one"} for question in near]
    test_near = write_jsonl(tmp_path / "near.jsonl", held_out)
    planted = [
        *({**row, "question": f" {row['question'].upper()} "} for row in asked),
        *(
            {"question": q.replace("old clock", "tower clock"), "answer": "the red one"}
            for q in near
        ),
    ]
    clean = synthetic(200)
    train = write_jsonl(tmp_path / "train.jsonl", [*clean, *planted])
    manifest = prepare(tmp_path, train, test_paths=(test, test_near), max_sequence_length=512)
    assert manifest.rows_read == accounted(manifest)
    assert manifest.reasons == {"leakage": 50, "near_leakage": 10}
    trained = set(questions(manifest, "train")) | set(questions(manifest, "dev"))
    assert trained == {row["question"] for row in clean}


# --- what is held out ---


def test_a_training_row_asked_in_dev_or_test_is_removed(tmp_path: Path) -> None:
    """Leaks are found across white space and are counted, and test wins over dev."""
    rows = synthetic(30)
    test = write_jsonl(tmp_path / "test.jsonl", rows[:5])
    dev = write_jsonl(tmp_path / "dev.jsonl", rows[4:10])
    leak = {"question": f"  {rows[0]['question']}\t", "answer": "another answer"}
    data = write_jsonl(tmp_path / "train.jsonl", [*rows[3:], leak])
    manifest = prepare(tmp_path, data, dev_paths=(dev,), test_paths=(test,))
    assert manifest.rows_read == accounted(manifest) == 5 + 6 + 28
    assert (manifest.test_rows, manifest.dev.rows, manifest.train.rows) == (5, 5, 20)
    assert manifest.reasons == {"leakage": 9}
    assert manifest.duplicates == 9
    held_out = {*questions(manifest, "dev"), *questions(manifest, "test")}
    assert not held_out & set(questions(manifest, "train"))


def test_rows_that_share_a_question_share_a_split(tmp_path: Path) -> None:
    """Two answers to one question are both kept, on the same side of the border."""
    rows = [{"question": f"Q{n}", "answer": answer} for n in range(100) for answer in "ab"]
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", rows))
    assert manifest.duplicates == 0
    splits = [set(questions(manifest, split)) for split in ("train", "dev", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 100


def test_max_rows_limits_training_rows_alone_and_takes_the_first(tmp_path: Path) -> None:
    """Held-out rows stay the same; the training rows are the first ones in order."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(100))
    every = prepare(tmp_path, data)
    first, held_out = questions(every, "train")[:20], questions(every, "test")
    limited = prepare(tmp_path, data, max_rows=20)
    assert questions(limited, "train") == first
    assert questions(limited, "test") == held_out
    assert limited.not_used == every.train.rows - 20
    assert limited.rows_read == accounted(limited) == 100


def test_the_kind_of_a_test_row_is_kept_for_reporting(tmp_path: Path) -> None:
    """Groups of the bundled test rows, and 'test' where a row names none."""
    manifest = prepare(tmp_path)
    kinds = {row["split"] for row in read_lines(tmp_path / "data" / "test.jsonl")}
    assert {"fact", "fact_zh", "date", "novel"} <= kinds
    assert manifest.rows_read == accounted(manifest)
    plain = prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", synthetic(50)))
    assert {row["split"] for row in read_lines(Path(plain.path) / "test.jsonl")} == {"test"}


# --- when things go wrong ---


def test_the_circuit_breaker_reports_numbers_and_keeps_the_quarantine(tmp_path: Path) -> None:
    """Too many bad rows stop the stage; their list lies beside the folder that was not made."""
    path = tmp_path / "half.jsonl"
    good = [json.dumps(row).encode() for row in synthetic(30)]
    path.write_bytes(b"\n".join([*good, *[b"{oops"] * 20]))
    with pytest.raises(DataLoadingError, match=r"20 of 50 rows are bad \(broken_json 20\)") as bad:
        prepare(tmp_path, str(path))
    quarantine = Path(bad.value.facts["quarantine_path"])
    assert str(quarantine) in str(bad.value)
    assert not (tmp_path / "data").exists()
    listed = read_lines(quarantine)
    assert [row["line"] for row in listed] == list(range(31, 51))
    assert {row["file"] for row in listed} == {str(path)}
    manifest = prepare(tmp_path, str(path), max_bad_fraction=0.5)
    assert manifest.rows_read == accounted(manifest) == 50
    assert not quarantine.exists()
    assert read_lines(Path(str(manifest.quarantine_path))) == listed


def test_an_unreadable_file_is_listed_and_counts_no_rows(tmp_path: Path) -> None:
    """A corrupt parquet among good files is one reason; alone it stops the stage."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", synthetic(20, start=20 * number))
    (folder / "torn.parquet").write_bytes(b"PAR1 torn")
    manifest = prepare(tmp_path, str(folder))
    assert manifest.reasons == {"unreadable_file": 1}
    assert manifest.quarantined == 0
    assert manifest.rows_read == accounted(manifest) == 100
    assert [source.rows for source in manifest.sources] == [20] * 5 + [0]
    with pytest.raises(DataLoadingError, match="unreadable"):
        prepare(tmp_path, str(folder / "torn.parquet"))


@pytest.mark.parametrize("rows", [[], synthetic(2)])
def test_too_few_rows_for_the_splits_are_an_error(
    tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    """Nothing to train on, to stop by or to test with ends the stage before any training."""
    with pytest.raises(DataLoadingError, match=r"No usable row|No rows are left for"):
        prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", rows))


def test_all_rows_too_long_is_an_error_with_the_longest(tmp_path: Path) -> None:
    """The message says how long the rows are, so that the limit can be set."""
    data = write_jsonl(
        tmp_path / "qa.jsonl", ({"question": f"{n} " * 50, "answer": "x"} for n in range(20))
    )
    with pytest.raises(DataLoadingError, match=r"20 of 20 rows are longer than .*, 32 tokens"):
        prepare(tmp_path, data, max_sequence_length=32)


def test_a_missing_path_uses_sample_data_only_with_consent(tmp_path: Path) -> None:
    """With allow_sample_data the run is marked degraded; without it, it stops."""
    missing = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataLoadingError, match=r"nowhere\.jsonl"):
        prepare(tmp_path, missing)
    manifest = prepare(tmp_path, missing, allow_sample_data=True)
    assert manifest.degraded == (SAMPLE_DATA,)
    assert manifest.sources[0].path == "embedded:train"


# --- the folder and its key ---


def test_a_manifest_is_read_back_only_while_every_file_is_whole(tmp_path: Path) -> None:
    """A prepared folder is reused as long as it is whole, and nothing is left beside it."""
    manifest = prepare(tmp_path, write_jsonl(tmp_path / "qa.jsonl", synthetic(50)))
    target = Path(manifest.path)
    assert read_manifest(target) == manifest
    shown = [path.name for path in tmp_path.iterdir() if path.name != ".data.lock"]
    assert sorted(shown) == ["data", "qa.jsonl"]
    test = target / "test.jsonl"
    test.write_text(test.read_text()[:-2])
    assert read_manifest(target) is None
    assert read_manifest(tmp_path / "never") is None


def test_a_file_that_changes_between_fingerprinting_and_reading_is_noticed(tmp_path: Path) -> None:
    """Rows read are those whose digest decided on the folder; a file that is gone counts too."""
    data = Path(write_jsonl(tmp_path / "qa.jsonl", synthetic(50)))
    config = TrainingConfig(
        model_name="embedded", data_paths=(str(data),), cache_dir=str(tmp_path / "cache")
    )
    sources = resolved(config)
    pipeline, target = DataPipeline(config), tmp_path / "data"
    manifest = pipeline.prepare(SNAPSHOT, target, sources=sources)
    assert manifest.sources[0].sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    changes = (
        lambda: data.write_text(data.read_text() + "\n"),
        lambda: os.utime(data, ns=(0, sources.files[0].modified_ns + 1)),
        data.unlink,
    )
    for change in changes:
        change()
        with pytest.raises(DataLoadingError, match=r"qa\.jsonl changed while"):
            pipeline.prepare(SNAPSHOT, target, sources=sources)
        assert read_manifest(target) == manifest


def test_the_same_input_gives_the_same_digest_and_another_one_another(tmp_path: Path) -> None:
    """The digest follows the rows used and the settings, not the place or the time."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(50))
    first = prepare(tmp_path, data).digest
    (tmp_path / "elsewhere").mkdir()
    assert prepare(tmp_path / "elsewhere", data).digest == first
    assert prepare(tmp_path, data, max_rows=10).digest != first
    assert prepare(tmp_path, data, learning_rate=0.5).digest == first


def test_the_folder_is_keyed_by_what_matters_alone(tmp_path: Path) -> None:
    """Data, tokenizer and data settings change the folder; a learning rate does not."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(20))

    def target(snapshot: ModelSnapshot = SNAPSHOT, **values: Any) -> Path:
        config = TrainingConfig(model_name="embedded", data_paths=(data,), **values)
        return dataset_target(resolved(config), snapshot)

    first = target()
    assert first.parent == Path(".qwen3ft/cache/datasets")
    assert len(first.name) == 16
    assert target(learning_rate=0.5) == first
    assert target(max_sequence_length=64) != first
    assert target(SNAPSHOT.model_copy(update={"manifest_sha256": "9" * 64})) == first
    other = SNAPSHOT.source.model_copy(update={"revision": "9" * 40})
    assert target(SNAPSHOT.model_copy(update={"source": other})) != first
    assert target(SNAPSHOT.model_copy(update={"chat_template_sha256": "9" * 64})) != first
    write_jsonl(tmp_path / "qa.jsonl", synthetic(21))
    assert target() != first


def test_the_steps_of_the_pipeline_work_one_after_the_other(tmp_path: Path) -> None:
    """load, format, tokenize and collate, by hand, give padded batches that a model can take."""
    data = write_jsonl(tmp_path / "qa.jsonl", synthetic(12))
    config = TrainingConfig(model_name="embedded", data_paths=(data,), cache_dir=str(tmp_path))
    pipeline, tokenizer = DataPipeline(config), load_tokenizer(MODEL_DIR)
    rows = pipeline.load_qa_data_from_files()
    assert [row["question"] for row in rows] == [row["question"] for row in synthetic(12)]
    formatted = pipeline.format_for_qwen(rows)
    assert isinstance(formatted, Dataset)
    assert set(formatted.column_names) == {"segments", "trained"}
    tokenized = pipeline.tokenize_dataset(formatted, tokenizer)
    batch = pipeline.create_data_collator(tokenizer)(tokenized.to_list())
    widest = max(tokenized["length"])
    assert {name: tuple(part.shape) for name, part in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (12, widest)
    )
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED_LABEL).all()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert batch["attention_mask"].sum(1).tolist() == list(tokenized["length"])


GSM8K_CONFIGS = sorted((ROOT / "deployments" / "configs" / "gsm8k").glob("*.yaml"))


@pytest.mark.parametrize("path", GSM8K_CONFIGS, ids=lambda path: path.stem)
def test_the_gsm8k_configs_work_from_a_clone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are in the repository; the smallest and the largest model fit their budgets."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert len(read_lines(Path(config.data_paths[0]))) == 400
    assert config.reasoning_separator == "####"
    if path.stem in ("0.6b", "14b"):
        size = path.stem.removesuffix("b")
        assert config.model_name == f"Qwen/Qwen3-{size}B"
        machine = described_machine(require_gpu_spec("RTX 4090"))
        assert choose(shape_request(config, machine)).budget_gb == config.max_memory_gb
