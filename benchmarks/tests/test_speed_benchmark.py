"""The speed benchmark is honest: same rows, real tokens, and a row for whatever fails."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.jobs import failure_of
from benchmarks.speed import cases as speed_cases
from benchmarks.speed.cases import Case, Entry, Settings

STEPS, WARMUP, PER_STEP, LONGEST = 6, 2, 8, 64
without_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is not None, reason="the peer is installed here"
)


def command(work: Path, out: Path, *more: str) -> list[str]:
    steps = ("--steps", str(STEPS), "--warmup", str(WARMUP))
    return [
        sys.executable,
        "-m",
        "benchmarks.speed.campaign",
        "--work",
        str(work),
        "--out",
        str(out),
        *steps,
        *more,
    ]


def run(work: Path, *more: str) -> tuple[dict[str, Any], str]:
    out = work / "results.json"
    done = subprocess.run(
        command(work, out, *more),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def tiny(work: Path) -> tuple[dict[str, Any], str]:
    """Results and output of the tiny suite with ours and a peer that is not installed."""
    return run(work, "--suite", "tiny", "--contestants", "ours,unsloth")


@pytest.fixture(scope="module")
def peer(work: Path) -> dict[str, Any]:
    """Row of a peer in the tiny suite."""
    return row_of(run(work, "--suite", "tiny", "--contestants", "hf")[0], "hf")


def row_of(results: dict[str, Any], contestant: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["contestant"] == contestant)


def expected_lengths() -> list[int]:
    """Derive the workload's lengths from its description."""
    generator = random.Random(0)
    lengths = []
    for _ in range(STEPS * PER_STEP):
        drawn = generator.lognormvariate(math.log(0.375 * LONGEST), 0.6)
        lengths.append(int(min(LONGEST, max(16, drawn))))
        for _ in range(lengths[-1]):
            generator.randrange(10, 500)
    return lengths


def test_results_record_machine_and_arguments(tiny: tuple[dict[str, Any], str]) -> None:
    results, _ = tiny
    assert results["complete"]
    assert results["machine"]["date"]
    assert results["machine"]["gpu"] is None
    for name in ("torch", "transformers", "peft", "bitsandbytes", "qwen3ft"):
        assert results["machine"]["versions"][name]
    assert results["arguments"]["steps"] == STEPS
    (case,) = results["cases"].values()
    assert case["floor"] is None


def test_tokens_are_those_of_the_workload(tiny: tuple[dict[str, Any], str]) -> None:
    check_tokens(row_of(tiny[0], "ours"))


def check_tokens(row: dict[str, Any]) -> None:
    assert row["status"] == "ok"
    assert len(row["step_tokens"]) == STEPS
    assert sum(row["step_tokens"]) == sum(expected_lengths())
    assert row["timed_tokens"] == sum(row["step_tokens"][WARMUP:])
    assert row["tokens_per_second"] == pytest.approx(row["timed_tokens"] / row["timed_seconds"])
    seconds = row["seconds_per_step"] * (STEPS - WARMUP)
    assert seconds == pytest.approx(row["timed_seconds"])
    assert row["micro_batches"] == [2] * STEPS
    for name in ("peak_allocated_gb", "peak_reserved_gb", "nvml_peak_gb"):
        assert row[name] is None  # there is no GPU to have them


def test_ours_runs_the_plan_of_the_product(tiny: tuple[dict[str, Any], str]) -> None:
    from qwen3ft.planning.packing import epoch_order

    row = row_of(tiny[0], "ours")
    lengths = expected_lengths()
    steps = epoch_order(lengths, PER_STEP, 0, 0)
    assert row["step_tokens"] == [sum(lengths[i] for i in step.tolist()) for step in steps]
    assert row["levers"]["micro_batch_size"] == 4
    assert row["levers"]["gradient_accumulation_steps"] == 2
    assert row["levers"]["total_steps"] == STEPS
    assert row["reasons"]["micro_batch_size"]
    assert row["first_step_seconds"] > 0


@pytest.mark.slow
def test_all_train_the_same_model_on_the_same_rows(
    tiny: tuple[dict[str, Any], str], peer: dict[str, Any]
) -> None:
    check_tokens(peer)
    ours = row_of(tiny[0], "ours")
    assert len(ours["losses"]) == len(peer["losses"]) == STEPS
    assert all(map(math.isfinite, ours["losses"] + peer["losses"]))
    assert ours["trainable_parameters"] == peer["trainable_parameters"]
    # each has seen every row once, and the rate is too small to change much in so few steps
    assert ours["mean_loss"] == pytest.approx(peer["mean_loss"], rel=2e-3)


@without_unsloth
def test_a_peer_that_is_not_installed_is_a_row_that_says_so(
    tiny: tuple[dict[str, Any], str],
) -> None:
    row = row_of(tiny[0], "unsloth")
    assert row["status"] == "not installed"
    assert "unsloth" in row["detail"]


def test_the_table_has_a_line_for_everyone(tiny: tuple[dict[str, Any], str]) -> None:
    results, printed = tiny
    table = printed.partition("x best peer")[2]
    for row in results["rows"]:
        (line,) = (line for line in table.splitlines() if line.startswith(row["contestant"] + " "))
        if row["status"] == "ok":
            assert f"{row['tokens_per_second']:,.0f}" in line
            assert " – " in line
        else:
            assert row["status"] in line


def test_a_case_that_does_not_fit_is_a_row_appended_to_an_earlier_run(
    work: Path, tiny: tuple[dict[str, Any], str]
) -> None:
    (work / "results.json").write_text(json.dumps(tiny[0]), encoding="utf-8")
    case = ("--case", "tiny:64:0.5:4x2", "--contestants", "ours")
    results, printed = run(work, "--append", *case)
    *earlier, row = results["rows"]
    assert earlier == tiny[0]["rows"]
    assert row["status"] == "out of memory"
    assert "InsufficientMemoryError" in row["detail"]
    assert "out of memory" in printed.partition("x best peer")[2]
    other = subprocess.run(
        command(work, work / "results.json", "--append", *case, "--seed", "1"),
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "another seed" in other.stderr


def test_a_job_that_takes_too_long_is_killed(work: Path, tiny: tuple[dict[str, Any], str]) -> None:
    results, _ = run(work, "--suite", "tiny", "--contestants", "hf", "--timeout", "0.5")
    (row,) = results["rows"]
    assert (row["status"], row["detail"]) == ("failed", "timeout after 0.5 s")


@without_unsloth
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "results.json"
    more = ("--suite", "tiny", "--contestants", "unsloth,hf")
    with subprocess.Popen(command(tmp_path, out, *more), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (out.exists() and json.loads(out.read_text(encoding="utf-8"))["rows"]):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert [row["contestant"] for row in results["rows"]] == ["unsloth"]
    assert not results.get("complete", False)
    assert process.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)


@pytest.mark.slow
def test_random_weights_are_quantised_by_the_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small shape is made the same way as the large ones."""
    from benchmarks.speed.model import prepare

    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shape = {**speed_cases.SHAPES["0.6b"], **small, "num_hidden_layers": 2}
    monkeypatch.setitem(speed_cases.SHAPES, "small", shape)
    first = prepare("small", tmp_path, 0)
    assert first["made"]
    assert first["snapshot"]["quantization"] == "nf4-double"
    assert first["snapshot"]["shape"]["hidden_size"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["models"]  # nothing in 16 bits is left
    again = prepare("small", tmp_path, 0)
    assert not again["made"]
    assert again["snapshot"] == first["snapshot"]


def test_a_contestant_that_needs_more_rows_gets_the_same_first_ones() -> None:
    case = Case("4b", 256, 13)
    few = speed_cases.workload(case, 64, 0)
    assert speed_cases.workload(case, 200, 0)[:64] == few
    assert speed_cases.workload(case, 64, 1) != few
    assert {len(row) for row in speed_cases.workload(Case("4b", 512, 13, "full"), 3, 0)} == {512}
    packed = Entry(case, "trl-pack", Settings(4, 16))
    rows = speed_cases.workload(case, speed_cases.rows_needed(packed, 8), 0)
    assert sum(map(len, rows)) >= 8 * 64 * 256


def test_every_suite_is_made_of_what_there_is() -> None:
    for name in speed_cases.SUITES:
        entries = list(speed_cases.select([name], [], None))
        assert len(set(entries)) == len(entries) > 0
        for entry in entries:
            settings = entry.settings
            assert entry.contestant in speed_cases.NEEDS
            assert entry.case.shape in {*speed_cases.SHAPES, speed_cases.TINY}
            if entry.contestant not in speed_cases.PACKING:
                assert settings.micro * settings.accumulate == entry.case.sequences_per_step


def test_a_case_can_be_typed() -> None:
    case, settings = speed_cases.parse_case("8b:8192:24:full")
    assert (case.shape, case.sequence_tokens, case.cap_gb) == ("8b", 8192, 24.0)
    assert (case.lengths, case.sequences_per_step, settings) == ("full", 1, Settings(1))
    assert speed_cases.parse_case("4b:256:13") == (Case("4b", 256, 13.0), None)
    with pytest.raises(ValueError, match="SHAPE:SEQ:CAP"):
        speed_cases.parse_case("9b:256:13")


@pytest.mark.parametrize(
    ("status", "line", "expected"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        (1, "RuntimeError: CUDA error: out of memory", "out of memory"),
        (1, "ValueError: no such thing", "failed: ValueError: no such thing"),
        (-9, "step 3", "failed: ended by signal 9; step 3"),
    ],
)
def test_a_failure_is_named_by_the_end_of_its_log(status: int, line: str, expected: str) -> None:
    failure = failure_of(status, ["loading", line, ""])
    assert str(failure).startswith(expected)


def test_the_published_settings_pack_the_sequences_of_the_design() -> None:
    """Eight rows of 2,048 tokens hold about what a step of the contestants without packing does."""
    suites = speed_cases.SUITES
    for case, table in (*suites["published"], *suites["published-no-cap"]):
        assert {"unsloth-pack", "trl-pack", "ours"} <= table.keys()
        rows = speed_cases.workload(case, case.sequences_per_step, seed=0)
        assert max(map(len, rows)) <= 256
        assert sum(map(len, rows)) == pytest.approx(8 * 2048, rel=0.08)
        for settings in table["unsloth-pack"]:
            entry = Entry(case, "unsloth-pack", settings)
            assert settings.micro * settings.accumulate == 8
            enough = speed_cases.workload(case, speed_cases.rows_needed(entry, 8), seed=0)
            assert sum(map(len, enough)) > 8 * 8 * 2048
