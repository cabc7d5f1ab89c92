"""The base model: its sources, refusals, and the guarantees of quantising."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.disk.files import sha256_file
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import (
    ConfigError,
    DownloadError,
    ModelAccessError,
    ModelNotFoundError,
    ModelUnavailableError,
    QuantizationError,
)
from qwen3ft.model import hub
from qwen3ft.model.adapter import LoRAAdapter, plan_adapter
from qwen3ft.model.manager import ModelManager, read_snapshot, snapshot_target
from qwen3ft.records.model import ModelSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """A server that answers like the hub for a few repositories."""

    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        """Answer with the headers of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with model info, or a file of the embedded model."""
        if "/resolve/" in self.path:
            content = (MODEL_DIR / self.path.rpartition("/")[2]).read_bytes()
            self.fetched.append(self.path.rpartition("/")[2])
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        answers: dict[str, tuple[int, str]] = {
            "Qwen/Qwen3-4B": (200, ""),
            "owner/gated": (403, "GatedRepo"),
            "owner/broken": (503, ""),
        }
        status, code = answers.get(name, (404, "RepoNotFound"))
        answer: Any = {"id": name, "sha": COMMIT, "siblings": []} if status == 200 else {}
        if "/tree/" in self.path:
            status, code = 200, ""
            files = [path for path in MODEL_DIR.iterdir() if path.is_file()]
            answer = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
                for path in files
            ]
        body = json.dumps(answer)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing."""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Start a hub on loopback, with an empty cache."""
    from huggingface_hub import constants

    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield url
    server.shutdown()
    server.server_close()


def test_data_is_looked_at_with_the_tokenizer_alone(
    fake_hub: str, make_config: Any, tmp_path: Path
) -> None:
    """Checking data for a hub model fetches its tokenizer and none of its weights."""
    data = tmp_path / "qa.jsonl"
    lines = [json.dumps({"question": f"What {n}?", "answer": "x"}) for n in range(60)]
    data.write_text("\n".join(lines))
    FakeHub.fetched.clear()
    config = make_config(
        model_name="Qwen/Qwen3-4B", data_paths=(str(data),), cache_dir=str(tmp_path / "cache")
    )
    manifest = DataPipeline(config).check()
    assert manifest.rows_read == 60
    assert "tokenizer.json" in FakeHub.fetched
    assert not any(name.endswith(".safetensors") for name in FakeHub.fetched)
    assert "config.json" not in FakeHub.fetched


def test_a_hub_name_is_pinned_to_its_commit(fake_hub: str, make_config: Any) -> None:
    """What is recorded is the commit, not a branch that moves."""
    source = hub.resolve_model(make_config(model_name="Qwen/Qwen3-4B"))
    assert source.revision == COMMIT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-4B-Thinkin-2507", ModelNotFoundError),
        ("owner/gated", ModelAccessError),
        ("owner/broken", DownloadError),
        ("no-such-folder", ModelNotFoundError),
    ],
)
def test_each_reason_for_having_no_model_is_its_own_error(
    fake_hub: str, make_config: Any, name: str, expected: type[Exception]
) -> None:
    """Unknown, gated and broken are distinguished."""
    with pytest.raises(expected) as caught:
        hub.resolve_model(make_config(model_name=name))
    assert type(caught.value) is expected
    assert caught.value.next_command  # type: ignore[attr-defined]


def test_no_network_and_no_copy_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_config: Any
) -> None:
    """A hub that refuses connections gives ModelUnavailableError, with close names."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailableError) as caught:
        hub.resolve_model(make_config(model_name="Qwen/Qwen3-4B-Thinking-2508"))
    assert "Qwen/Qwen3-4B-Thinking-2507" in caught.value.facts["suggestions"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("Qwen/Qwen3-4B-Thinkng-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("Qwen3-14B", "Qwen/Qwen3-14B"),
        ("Qwen/Qwen3-0.6", "Qwen/Qwen3-0.6B"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_one_meant(typo: str, meant: str) -> None:
    """The first of at most three suggestions is right."""
    names = hub.close_names(typo)
    assert names[0] == meant
    assert len(names) <= 3


def copy_of_embedded(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for path in MODEL_DIR.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    settings.update(changes)
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "its own code"),
        ({"_attn_implementation_internal": "evil/kernel"}, "its own code"),
        ({"model_type": "llama"}, "llama"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size: .*integer"),
    ],
)
def test_a_folder_that_is_no_plain_qwen3_is_refused(
    tmp_path: Path, make_config: Any, changes: dict[str, Any], reason: str
) -> None:
    """Code in a config, another architecture, missing fields: refused before anything loads."""
    folder = copy_of_embedded(tmp_path / "model", **changes)
    with pytest.raises(ConfigError, match=reason):
        hub.resolve_model(make_config(model_name=str(folder)))


@pytest.mark.parametrize("content", ["[]", "null", "{", "\xff"])
def test_a_config_that_is_no_settings_is_refused(
    tmp_path: Path, make_config: Any, content: str
) -> None:
    """Whatever config.json holds, the error names the folder and a command."""
    folder = copy_of_embedded(tmp_path / "model")
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        hub.resolve_model(make_config(model_name=str(folder)))
    assert str(folder) in caught.value.what
    assert caught.value.next_command


def test_pickled_weights_are_refused(tmp_path: Path, make_config: Any) -> None:
    """A folder with only pytorch_model.bin is never loaded."""
    folder = copy_of_embedded(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        hub.resolve_model(make_config(model_name=str(folder)))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("model.safetensors", b"\x00", b"\x01"),
        ("chat_template.jinja", b"assistant", b"assistent"),
        ("tokenizer.json", b"0", b"1"),
    ],
)
def test_a_changed_local_model_is_another_model(
    tmp_path: Path, make_config: Any, name: str, old: bytes, new: bytes
) -> None:
    """Also one whose weights or template have the same size and time as before."""
    import os

    folder = copy_of_embedded(tmp_path / "model")
    config = make_config(model_name=str(folder), cache_dir=str(tmp_path / "cache"))
    before = hub.resolve_model(config)
    assert hub.resolve_model(config) == before
    path = folder / name
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = path.read_bytes()
    end = content.rfind(old)  # the header of weights is at their beginning
    path.write_bytes(content[:end] + new + content[end + len(old) :])
    os.utime(path, ns=times)
    after = hub.resolve_model(config)
    assert after.revision != before.revision
    assert snapshot_target(config, after, "cpu") != snapshot_target(config, before, "cpu")


def test_a_copy_of_a_local_model_is_the_same_model(tmp_path: Path, make_config: Any) -> None:
    """A fresh clone has other times, and must not make the champion one of another base."""
    import os
    import shutil

    config = make_config(model_name="embedded", cache_dir=str(tmp_path / "cache"))
    ours = hub.resolve_model(config)
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    copied = hub.resolve_model(config.model_copy(update={"model_name": str(folder)}))
    assert copied.revision == ours.revision


def test_an_unchanged_local_model_is_hashed_once(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes of weights would cost every start of a run minutes."""
    from qwen3ft.disk import digests

    folder = copy_of_embedded(tmp_path / "model")
    monkeypatch.setattr(digests.time, "time_ns", lambda: 2**62)  # long after the copy was made
    hashed: list[str] = []
    real = digests.sha256_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(digests, "sha256_file", counted)
    config = make_config(model_name=str(folder), cache_dir=str(tmp_path / "cache"))
    first = hub.resolve_model(config)
    assert sorted(hashed) == sorted(path.name for path in folder.iterdir())
    hashed.clear()
    assert hub.resolve_model(config) == first
    assert hashed == []


def test_the_base_of_an_older_champion_is_known_by_its_times(tmp_path: Path) -> None:
    """Before, a revision covered names, sizes and times of files; a hub's commit stays as it is."""
    from qwen3ft.disk.files import sha256_json

    folder = copy_of_embedded(tmp_path / "model")
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]
    text = (folder / "config.json").read_text()
    old = {"model_name": "m", "revision": sha256_json({"files": stats, "config": text})}
    source = ModelSource(model_name="m", revision="new", local_path=str(folder))
    assert hub.same_base(old, source)
    assert hub.same_base({**old, "revision": "new"}, source)
    assert not hub.same_base({**old, "revision": "other"}, source)
    assert not hub.same_base({**old, "model_name": "n"}, source)
    assert not hub.same_base(old, ModelSource(model_name="m", revision="new", local_path=None))


def test_a_snapshot_is_whole_or_not_there(snapshot: Any, tmp_path: Path) -> None:
    """One flipped bit in the stored model and the snapshot counts as gone."""
    import shutil

    copy = tmp_path / "snapshot"
    shutil.copytree(snapshot.path, copy)
    again = read_snapshot(copy)
    assert again is not None
    assert again.manifest_sha256 == snapshot.manifest_sha256
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert read_snapshot(copy) is None


def test_loading_gives_four_bit_projections_and_the_same_logits_each_time(
    snapshot: Any, make_config: Any
) -> None:
    """All seven projections are Linear4bit in NF4; two loads agree to the bit."""
    from bitsandbytes.nn import Linear4bit

    manager = ModelManager(make_config())
    model, tokenizer = manager.load_model_with_quantization(snapshot.path)
    quantised = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 7 * snapshot.shape.num_hidden_layers
    assert {m.weight.quant_state.quant_type for m in quantised} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in quantised)
    ids = tokenizer("Hello 你好", return_tensors="pt")["input_ids"]
    again, _ = manager.load_model_with_quantization(snapshot.path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_an_unquantised_folder_is_quantised_in_memory(make_config: Any) -> None:
    """The method takes a plain model too, as the specification has it."""
    from bitsandbytes.nn import Linear4bit

    model, _ = ModelManager(make_config()).load_model_with_quantization(str(MODEL_DIR))
    assert any(isinstance(module, Linear4bit) for module in model.modules())


def test_preparing_freezes_everything_and_upcasts_nothing(snapshot: Any, make_config: Any) -> None:
    """No parameter requires a gradient and no dtype changes."""
    manager = ModelManager(make_config())
    model, _ = manager.load_model_with_quantization(snapshot.path)
    before = {name: p.dtype for name, p in model.named_parameters()}
    model = manager.prepare_for_training(model, gradient_checkpointing=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert model.is_gradient_checkpointing


def test_settings_that_fail_fall_back_and_mark_the_snapshot(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If NF4 with double quantisation fails, plain NF4 is used and reported as degraded."""
    from qwen3ft.records.requests import QuantizeRequest

    config = make_config(cache_dir=str(tmp_path))
    source = hub.resolve_model(config)
    manager = ModelManager(config)
    real = manager.configure_quantization

    def picky(setting: str = "", compute_dtype: str | None = None) -> Any:
        if setting not in allowed:
            raise ValueError("not on this machine")
        return real(setting, compute_dtype)

    monkeypatch.setattr(manager, "configure_quantization", picky)
    request = QuantizeRequest(
        config=config,
        source=source,
        source_path=str(MODEL_DIR),
        target=str(tmp_path / "snapshot"),
        device="cpu",
    )
    allowed = {"nf4"}
    snapshot = manager.quantize(request)
    assert snapshot.quantization == "nf4"
    assert snapshot.degraded == ("quantization nf4",)
    allowed = set()
    with pytest.raises(QuantizationError, match="nf4-double"):
        manager.quantize(request)


def test_the_adapter_is_counted_before_it_exists(snapshot: Any, make_config: Any) -> None:
    """Parameters counted from the shape equal those of the adapter that PEFT attaches."""
    config = make_config(lora_r=5, lora_alpha=10)
    spec = plan_adapter(config, snapshot.shape)
    model, _ = ModelManager(config).load_model_with_quantization(snapshot.path)
    adapter = LoRAAdapter(spec)
    counted = adapter.get_trainable_params_info(adapter.apply_lora(model))
    assert counted["trainable"] == spec.trainable_parameters
    assert counted["total"] == spec.total_parameters + spec.trainable_parameters


def test_a_rank_beyond_the_matrix_is_refused(snapshot: Any, make_config: Any) -> None:
    """A rank above the smaller side of a projection is a mistake."""
    with pytest.raises(ConfigError, match="64 features"):
        plan_adapter(make_config(lora_r=65), snapshot.shape)


def test_the_shipped_model_is_what_the_snapshot_came_from(snapshot: Any) -> None:
    """The snapshot keeps tokenizer and chat template byte for byte."""
    template = sha256_file(MODEL_DIR / "chat_template.jinja")
    assert snapshot.chat_template_sha256 == template


def test_bitsandbytes_does_not_bring_torchs_compiler() -> None:
    """And `torch.compile` is unchanged afterwards."""
    program = (
        "import sys, torch; compile = torch.compile; import qwen3ft.model.lean_bitsandbytes;"
        "assert torch.compile is compile and hasattr(sys.modules['bitsandbytes'], 'nn');"
        "print([name for name in sys.modules if name.startswith('torch._inductor.compile_fx')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
