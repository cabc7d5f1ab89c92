"""A model is only exported if it answers like the adapter that it was merged from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.trained_adapter import Trained
from typer.main import get_command

from flows.cli import app
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.disk.files import read_json_lines, write_json_atomic
from qwen3ft.disk.manifests import find_damage, write_manifest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import (
    DataLoadingError,
    EnvironmentNotReadyError,
    ExportDriftError,
    InsufficientMemoryError,
    RequestError,
    SaveError,
    WorkerCrashedError,
)
from qwen3ft.jobs.folders import JobDir
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.model.source_folder import check_model_folder
from qwen3ft.records.requests import ADAPTER, MERGED, REQUANTISED, ExportRequest, ParityReport
from qwen3ft.serving import export, gguf_files
from qwen3ft.serving.export import export_adapter, find_held_out
from qwen3ft.serving.gguf_files import BASE_GGUF
from qwen3ft.serving.merge import merge_adapter
from qwen3ft.serving.parity import measure_parity


@pytest.fixture(scope="module")
def merged(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model in several shards."""
    folder = tmp_path_factory.mktemp("merged")
    merge_adapter(trained.base, trained.adapter, folder, shard_bytes=400_000)
    return folder


@pytest.fixture
def adapter(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the adapter, which a test may change."""
    return Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def exported(
    trained: Trained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ParityReport]:
    """An export by the whole command, with its worker."""
    folder = tmp_path_factory.mktemp("export")
    rows = trained.rows_file(folder)
    report = export_adapter(trained.config, trained.adapter, folder / "model", rows, "cpu")
    return folder / "model", report


def measure(trained: Trained, merged: Path, rows: Path, **changes: Any) -> ParityReport:
    request = ExportRequest(
        config=trained.config,
        base=str(trained.base),
        adapter=str(trained.adapter),
        quantization="nf4-double",
        shape=check_model_folder(MODEL_DIR).model_copy(update=changes),
        merged=str(merged),
        rows_path=str(rows),
        device="cpu",
    )
    memory = MemoryOptimizer(trained.config.max_memory_gb, "cpu")
    return measure_parity(request, memory, lambda *_: None)


# --- merging ---


def test_merging_by_shards_is_what_peft_makes_of_the_whole_model(
    trained: Trained, merged: Path
) -> None:
    """Every weight equals PEFT's merge in fp32, rounded once; others are copied."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(trained.adapter)).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert ours.dtype == torch.bfloat16
    theirs = expected.state_dict()
    assert set(theirs) == set(ours.state_dict())
    for name, weight in ours.state_dict().items():
        exact = theirs[name].to(torch.bfloat16)
        # Sums of fp32 in another order may round to the next number of bf16.
        assert torch.allclose(weight.float(), exact.float(), rtol=2**-7, atol=1e-9), name
        assert (weight == exact).float().mean() > 0.99, name


def test_shards_are_of_the_size_asked_for_and_all_in_the_index(merged: Path) -> None:
    """No file is larger than the limit, and the index names each tensor once."""
    files = sorted(merged.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 420_000 for file in files)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    shape = check_model_folder(MODEL_DIR)
    assert index["metadata"]["total_size"] == 2 * shape.total_parameters


def test_a_merged_base_model_declares_the_trained_end(trained: Trained, tmp_path: Path) -> None:
    """Its own settings name the end of texts, with which no trained answer ends."""
    base, target = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(trained.base, base)
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**settings, "eos_token_id": 0}))
    merge_adapter(base, trained.adapter, target)
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((target / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_what_is_more_than_plain_lora_is_refused(
    trained: Trained, adapter: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Merging would silently leave out the rest."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    write_json_atomic(adapter / "adapter_config.json", {**settings, **change})
    write_manifest(adapter)
    with pytest.raises(SaveError, match=next(iter(change))):
        merge_adapter(trained.base, adapter, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_an_adapter_that_does_not_fit_the_base_is_refused(trained: Trained, tmp_path: Path) -> None:
    """No matrix is skipped silently."""
    base = Path(shutil.copytree(trained.base, tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text())
    write_json_atomic(base / "config.json", {**settings, "num_hidden_layers": 4})
    with pytest.raises(SaveError, match="does not fit its base model"):
        merge_adapter(base, trained.adapter, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []


# --- the gate ---


def test_the_three_forms_answer_alike_within_the_default_limits(
    exported: tuple[Path, ParityReport],
) -> None:
    """Drift is measured from the adapter: it has none, and all its answers are the same."""
    report = exported[1]
    adapter, in_bf16, in_4_bits = report.scores
    assert [score.form for score in report.scores] == [ADAPTER, MERGED, REQUANTISED]
    assert (adapter.loss_drift, adapter.lost_answers, adapter.same_answers) == (0, 0, 1)
    assert adapter.exact_match >= 0.9
    assert report.objections == ()
    assert 0 < abs(in_bf16.loss_drift) < 0.05
    assert in_4_bits.answer_loss != in_bf16.answer_loss


@pytest.fixture
def changed_base(trained: Trained) -> Iterator[Path]:
    """Plant drift: change a layer of the unquantised base after the training."""
    from safetensors.torch import load_file, save_file

    weights = trained.base / "model.safetensors"
    original, tensors = weights.read_bytes(), load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] * 0.25}, weights, metadata={"format": "pt"})
    yield trained.base
    weights.write_bytes(original)


def test_planted_drift_is_found(trained: Trained, changed_base: Path, tmp_path: Path) -> None:
    """Both the merged form and its 4 bits are past the default limits; the adapter is not."""
    (tmp_path / "merged").mkdir()
    merge_adapter(changed_base, trained.adapter, tmp_path / "merged")
    report = measure(trained, tmp_path / "merged", trained.rows_file(tmp_path, 4))
    assert any(line.startswith("merged: answer loss") for line in report.objections)
    assert any(line.startswith("merged in 4 bits: answer loss") for line in report.objections)
    assert not any(line.startswith("adapter") for line in report.objections)


def test_what_drifts_past_either_limit_is_named_with_its_numbers() -> None:
    """A loss that is NaN exceeds every limit."""
    good = {"exact_match": 1.0, "same_answers": 1.0, "lost_answers": 0.0, "seconds": 0.0}
    scores = (
        {**good, "form": "a", "answer_loss": 0.4, "loss_drift": 0.3},
        {**good, "form": "b", "answer_loss": float("nan"), "loss_drift": float("nan")},
        {**good, "form": "c", "answer_loss": 0.1, "loss_drift": 0.0, "lost_answers": 0.5},
        {**good, "form": "d", "answer_loss": 0.0, "loss_drift": -1.0, "lost_answers": 0.1},
    )
    limits = {"max_loss_drift": 0.2, "max_lost_answers": 0.1}
    report = {"rows": 10, "thinking": False, **limits, "scores": scores}
    first, second, third = ParityReport.model_validate(report).objections
    assert first == "a: answer loss 0.4, +0.3 (limit +0.2)"
    assert second.startswith("b: answer loss nan")
    assert third == "c: 50.0% of 10 rows are no longer answered correctly (limit 10.0%)"


def test_without_room_for_the_merged_model_a_cpu_says_so(
    trained: Trained, merged: Path, tmp_path: Path
) -> None:
    """The error says what is needed and what is left, and memory stays within the budget."""
    needs = r"takes 238\.4 GB; of the budget of 4\.0 GB,"
    with pytest.raises(InsufficientMemoryError, match=needs):
        measure(trained, merged, trained.rows_file(tmp_path, 1), vocab_size=10**9)


# --- the whole command, with its worker ---


def test_an_export_is_a_complete_folder(exported: tuple[Path, ParityReport]) -> None:
    """It has model, adapter, commands and the comparison, and every file is in the manifest."""
    folder, report = exported
    assert find_damage(folder) is None
    assert find_damage(folder / "adapter") is None
    assert json.loads((folder / "parity.json").read_text()) == report.model_dump(mode="json")
    assert {path.name for path in folder.iterdir()} == {
        *("merged", "adapter", "parity.json", "manifest.json", "SERVING.md"),
    }
    serving = (folder / "SERVING.md").read_text()
    assert "--max-lora-rank 8 --lora-modules base-night-1=./adapter" in serving
    assert all(score.form in serving for score in report.scores)


def test_the_exported_model_answers_with_nothing_of_ours(
    trained: Trained, exported: tuple[Path, ParityReport]
) -> None:
    """Plain transformers load the folder; a request that sets nothing is asked as in training."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported[0] / "merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = trained.rows[0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["question"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**asked)
    text = tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == row["answer"]


def test_the_code_of_the_model_card_answers(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain PEFT, as README.md says, prompts as in training and decodes as in the test."""
    card = (trained.adapter / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    row = trained.rows[0]
    monkeypatch.chdir(trained.adapter)
    exec(code.replace('"..."', repr(row["question"])), {})
    assert capsys.readouterr().out.strip() == row["answer"]


@pytest.mark.slow
def test_a_base_that_is_another_one_now_is_refused_and_nothing_is_left(
    trained: Trained,
    changed_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cold_workers: None,
) -> None:
    """The worker finds the drift, and no target folder appears."""
    rows = trained.rows_file(tmp_path)
    with pytest.raises(ExportDriftError, match="The export is refused: merged: answer loss"):
        export_adapter(trained.config, trained.adapter, tmp_path / "model", rows, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == [rows.name]
    assert f"{changed_base} has changed since the adapter was trained" in caplog.text


def test_a_full_disk_is_found_before_a_model_is_loaded(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error gives both numbers, and nothing is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**21))
    with pytest.raises(EnvironmentNotReadyError, match=r"needs 0\.06 GB at .*, 0\.00 GB are free"):
        export_adapter(trained.config, trained.adapter, tmp_path / "m", trained.base, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_leaves_its_log_and_no_base_model(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp runs in it, and a crash there ends it."""
    config = trained.config.model_copy(update={"cache_dir": str(tmp_path / "cache")})

    def crash(_: str, job: JobDir, *__: Any, **___: Any) -> None:
        job.log.write_text("Segmentation fault")
        (job.path / BASE_GGUF).write_bytes(bytes(2**20))
        raise WorkerCrashedError("It was killed.", why="a crash", next_command="qwen3ft doctor")

    monkeypatch.setattr(export, "run_worker", crash)
    with pytest.raises(WorkerCrashedError):
        export_adapter(config, trained.adapter, tmp_path / "m", trained.base, "cpu")
    left = [path for path in (tmp_path / "cache/export").rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"plan.json", "worker.log"}
    assert not (tmp_path / "m").exists()


def test_the_base_model_as_gguf_needs_room_in_the_cache(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target may be on another disk."""
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: True)  # the packages are optional
    config = trained.config.model_copy(update={"cache_dir": str(tmp_path / "cache")})

    def usage(path: Any) -> SimpleNamespace:
        return SimpleNamespace(free=2**16 if "cache" in str(path) else 2**40)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(EnvironmentNotReadyError, match="The base model as GGUF needs"):
        export_adapter(config, trained.adapter, tmp_path / "m", trained.base, "cpu", gguf="bf16")


def test_only_an_export_is_replaced(trained: Trained, tmp_path: Path) -> None:
    """A folder with anything else in it is left alone."""
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(RequestError, match="neither an empty folder nor an earlier export"):
        export_adapter(trained.config, trained.adapter, tmp_path, trained.base, "cpu")
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


# --- the rows ---


def test_the_held_out_rows_are_those_of_the_adapter_s_own_data(
    trained: Trained, tmp_path: Path
) -> None:
    """They are found by the digest in the provenance; damaged data sets do not count."""
    config = trained.config.model_copy(update={"cache_dir": str(tmp_path)})
    digest = json.loads((trained.adapter / "provenance.json").read_text())["data"]["digest"]
    for name, its_digest in (("a", "f" * 64), ("b", digest)):
        folder = tmp_path / "datasets" / name
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text('{"question": "q", "answer": "a"}\n')
        write_manifest(folder, {"digest": its_digest})
    found = find_held_out(config, trained.adapter)
    assert found == tmp_path / "datasets" / "b" / "test.jsonl"
    assert len(read_json_lines(found)) == 1
    found.write_text("{}\n")
    with pytest.raises(DataLoadingError, match="held-out rows of run night-1"):
        find_held_out(config, trained.adapter)


def test_former_settings_name_the_options_that_replace_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A configuration of the version before still starts a run."""
    old = {"export_rows": 50, "export_max_loss_drift": 0.1, "export_max_lost_answers": 0.1}
    assert parse_config(old) == TrainingConfig()
    command: Any = get_command(app)
    parameters = command.commands["export"].params
    options = {option for parameter in parameters for option in parameter.opts}
    for option in ("--max-rows", "--max-loss-drift", "--max-lost-answers"):
        assert option in caplog.text
        assert option in options
