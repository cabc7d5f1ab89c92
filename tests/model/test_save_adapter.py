"""A saved adapter is whole, finite, portable and read back, or it is not called saved."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.finished_run import (
    attach_lora,
    local_source,
    make_outcome,
    make_plan,
    make_snapshot,
    write_checkpoint,
)

from qwen3ft.chat.templates import EMPTY_BLOCK
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_file
from qwen3ft.disk.manifests import MANIFEST_NAME, find_damage, write_manifest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import CheckpointCorruptError, DivergedError, ModelNotFoundError, SaveError
from qwen3ft.jobs.folders import write_record
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.model.saved_adapter import (
    has_provenance,
    open_adapter,
    read_provenance,
    was_trained_to_think,
)
from qwen3ft.records.model import ModelSource, SavedAdapter


@pytest.fixture(scope="module")
def trained() -> Any:
    """The embedded model, unquantised, with an adapter that changes its answers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = attach_lora(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture
def checkpoint(trained: Any, tmp_path: Path) -> Path:
    return write_checkpoint(trained, tmp_path / "checkpoints" / "step-000010")


def config_for(folder: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(model_name="embedded", output_dir=str(folder), **changes)


def save(checkpoint: Path, out: Path, **changes: Any) -> SavedAdapter:
    """Save the checkpoint of a plan whose model is changed by `changes`."""
    plan = make_plan(make_snapshot(**changes))
    return save_adapter(make_outcome(checkpoint), plan, config_for(out))


def replace_tensors(checkpoint: Path, change: Any) -> None:
    """Rewrite the adapter with `change` applied to its tensors, and a manifest that holds."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, checkpoint / ADAPTER_FILE)
    write_manifest(checkpoint)


def test_the_saved_folder_holds_and_says_where_it_is_from(checkpoint: Path, tmp_path: Path) -> None:
    """The manifest verifies; provenance.json names base, data, numbers and degradations."""
    plan = make_plan(make_snapshot(degraded=("quantization nf4",)), degraded=("lower rank",))
    saved = save_adapter(make_outcome(checkpoint), plan, config_for(tmp_path / "out"))
    folder = Path(saved.path)
    assert folder == tmp_path / "out" / "bright-otter"
    assert find_damage(folder) is None
    assert saved.sha256 == sha256_file(checkpoint / ADAPTER_FILE)
    assert saved.degraded == ("quantization nf4", "lower rank")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["base"]["snapshot_path"] == plan.model.path
    assert provenance["base"]["revision"] == plan.model.source.revision
    assert provenance["data"]["digest"] == plan.dataset.digest
    assert provenance["metrics"]["best_held_out_loss"] == 0.5
    assert TrainingConfig.model_validate(provenance["config"]) == config_for(tmp_path / "out")
    readme = (folder / "README.md").read_text()
    assert plan.dataset.digest in readme
    assert "lower rank" in readme


def test_an_adapter_with_the_old_name_of_its_provenance_is_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Registered versions have run_card.json."""
    saved = save(checkpoint, tmp_path / "out", degraded=("quantization nf4",))
    old = Path(shutil.copytree(saved.path, tmp_path / "old"))
    (old / "provenance.json").rename(old / "run_card.json")
    write_manifest(old)
    assert open_adapter(old).provenance["degraded"] == ["quantization nf4"]
    assert has_provenance(old)
    assert read_provenance(old) == read_provenance(Path(saved.path))
    (old / "run_card.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"provenance\.json missing"):
        open_adapter(old)


@pytest.mark.parametrize(("with_reasoning", "thinks"), [(0, False), (50, False), (51, True)])
def test_it_is_asked_to_think_if_most_of_its_rows_did(
    checkpoint: Path, tmp_path: Path, with_reasoning: int, thinks: bool
) -> None:
    """Whether the reasoning came in a column, in tags or before a separator."""
    plan = make_plan(make_snapshot())
    counts = {"usable_rows": 100, "reasoning_rows": with_reasoning}
    plan = plan.model_copy(update={"dataset": plan.dataset.model_copy(update=counts)})
    saved = save_adapter(make_outcome(checkpoint), plan, config_for(tmp_path / "out"))
    assert was_trained_to_think(read_provenance(Path(saved.path))) == thinks
    written = prompt_by_others(Path(saved.path))
    assert written.endswith("<|im_start|>assistant\n" + ("" if thinks else EMPTY_BLOCK))


def prompt_by_others(folder: Path, **asked: bool) -> str:
    """Return the prompt that a server makes of a request with one question."""
    from transformers import AutoTokenizer

    question = [{"role": "user", "content": "Tell me the price."}]
    return str(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            question, tokenize=False, add_generation_prompt=True, **asked
        )
    )


def test_a_request_that_sets_nothing_gets_the_decoding_of_the_test(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Greedy, up to the length that was tested, ended by the tokens that end the base's answers."""
    from transformers import GenerationConfig

    saved = save(checkpoint, tmp_path / "out")
    asked = GenerationConfig.from_pretrained(saved.path)
    assert (asked.do_sample, asked.temperature) == (False, 0.0)
    assert asked.max_new_tokens == config_for(tmp_path).max_new_tokens
    base = GenerationConfig.from_pretrained(MODEL_DIR)
    assert (asked.eos_token_id, asked.pad_token_id) == (base.eos_token_id, base.pad_token_id)


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        (local_source(), str(MODEL_DIR), None),
        (ModelSource(model_name="Qwen/Qwen3-4B", revision="a" * 40), "Qwen/Qwen3-4B", "a" * 40),
    ],
)
def test_the_adapter_names_the_original_model(
    checkpoint: Path, tmp_path: Path, source: ModelSource, name: str, revision: str | None
) -> None:
    """Other tools load it without our 4-bit copy; only a hub model has a revision."""
    saved = save(checkpoint, tmp_path / "out", source=source)
    adapter_config = json.loads((Path(saved.path) / "adapter_config.json").read_text())
    assert (adapter_config["base_model_name_or_path"], adapter_config["revision"]) == (
        name,
        revision,
    )
    code = (
        (Path(saved.path) / "README.md").read_text().partition("```python")[2].partition("```")[0]
    )
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    [loading] = [call for call in calls if "AutoModel" in ast.unparse(call.func)]
    given = {word.arg: ast.literal_eval(word.value) for word in loading.keywords}
    assert ast.literal_eval(loading.args[0]) == name
    assert given == ({} if revision is None else {"revision": revision})


def test_plain_peft_loads_it_and_answers_the_same(
    trained: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """The folder needs nothing of this project: PEFT and transformers load it."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    saved = save(checkpoint, tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(saved.path)("Tell me the price.", return_tensors="pt")
    with torch.no_grad(), trained.disable_adapter():
        base = trained(**tokens).logits
    with torch.no_grad():
        expected, found = trained(**tokens).logits, loaded(**tokens).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_saving_again_gives_the_same_adapter(checkpoint: Path, tmp_path: Path) -> None:
    """A repeated task replaces the folder and leaves nothing else behind."""
    first = save(checkpoint, tmp_path / "out")
    assert save(checkpoint, tmp_path / "out") == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bright-otter"]


def test_an_unwritable_path_falls_to_the_next(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The path that failed is logged with its reason."""
    (tmp_path / "file").write_text("not a folder")
    config = config_for(tmp_path / "file" / "out", fallback_output_dirs=(str(tmp_path / "b"),))
    saved = save_adapter(make_outcome(checkpoint), make_plan(make_snapshot()), config)
    assert Path(saved.path) == tmp_path / "b" / "bright-otter"
    assert find_damage(Path(saved.path)) is None
    assert "NotADirectoryError" in caplog.text


def test_when_every_path_fails_each_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """The error lists all paths with their reasons, and where the adapter still is."""
    (tmp_path / "file").write_text("not a folder")
    config = config_for(
        tmp_path / "file" / "a", fallback_output_dirs=(str(tmp_path / "file" / "b"),)
    )
    with pytest.raises(SaveError) as raised:
        save_adapter(make_outcome(checkpoint), make_plan(make_snapshot()), config)
    assert len(raised.value.facts["problems"]) == 2
    assert all("NotADirectory" in reason for reason in raised.value.facts["problems"].values())
    assert str(checkpoint) in raised.value.why


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found_before_writing(checkpoint: Path, tiny_disk: Path) -> None:
    """If the files and the reserve do not fit, the error has both numbers."""
    with pytest.raises(SaveError, match=r"needs 1,\d{3},\d{3} bytes, 1,048,576 are free"):
        save(checkpoint, tiny_disk)
    assert list(tiny_disk.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from qwen3ft.jobs.folders import read_record
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import SaveError
from qwen3ft.records.plan import TrainPlan; from qwen3ft.records.training import AttemptOutcome
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.model.save_adapter import save_adapter

work = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_adapter(
        read_record(work / "outcome.json", AttemptOutcome),
        read_record(work / "plan.json", TrainPlan),
        TrainingConfig(model_name="embedded", output_dir=str(work / "out")),
    )
except SaveError as error:
    print(error)
print("torch" in sys.modules)
"""


def test_a_write_that_breaks_off_leaves_nothing_that_looks_saved(
    checkpoint: Path, tmp_path: Path
) -> None:
    """If a write is cut short, SaveError is raised and the target does not appear."""
    write_record(tmp_path / "outcome.json", make_outcome(checkpoint))
    write_record(tmp_path / "plan.json", make_plan(make_snapshot()))
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "File too large" in result.stdout
    assert result.stdout.splitlines()[-1] == "False", "saving needs no torch"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tampered_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """One changed byte, or a missing file, and nothing is written."""
    adapter = checkpoint / ADAPTER_FILE
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="sha256"):
        save(checkpoint, tmp_path / "out")
    adapter.unlink()
    write_manifest(checkpoint)
    with pytest.raises(CheckpointCorruptError, match=ADAPTER_FILE):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e38])
def test_an_adapter_that_is_not_finite_is_refused(
    checkpoint: Path, tmp_path: Path, value: float
) -> None:
    """A single value is enough, and the tensor is named."""
    import torch

    broken: list[str] = []

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        broken.append(sorted(tensors)[3])
        tensors[broken[0]][1, 1] = value

    replace_tensors(checkpoint, spoil)
    with pytest.raises(DivergedError) as raised:
        save(checkpoint, tmp_path / "out")
    assert raised.value.facts["tensors"] == broken


def test_an_adapter_with_missing_layers_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Fewer parameters than were trained are not the adapter that was trained."""

    def drop_one(tensors: dict[str, Any]) -> None:
        del tensors[min(tensors)]

    replace_tensors(checkpoint, drop_one)
    with pytest.raises(CheckpointCorruptError, match="its 41 tensors are not"):
        save(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x04" + b"\0" * 9]
)
def test_a_file_that_is_no_safetensors_file_is_refused(
    checkpoint: Path, tmp_path: Path, content: bytes
) -> None:
    """Even when the checkpoint's manifest vouches for it."""
    (checkpoint / ADAPTER_FILE).write_bytes(content)
    write_manifest(checkpoint)
    with pytest.raises(CheckpointCorruptError):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
