"""The parity benchmark measures what it says, and its verdicts follow from the numbers."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import ROOT
from benchmarks.parity import campaign as parity
from benchmarks.parity.report import (
    CONTROL,
    PATHS,
    compare_gradients,
    compare_training,
    report,
    verdicts,
)
from benchmarks.speed.cases import Case

STEPS, SEQUENCES = 6, 4


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Results and output of both parts with the tiny model on the CPU."""
    work = tmp_path_factory.mktemp("parity")
    out = work / "results.json"
    where = ["--work", str(work), "--out", str(out), "--shape", "tiny", "--learning-rate", "1e-3"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.parity.campaign",
            *where,
            "--steps",
            str(STEPS),
            "--sequences",
            str(SEQUENCES),
            "--batch",
            "4",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text(encoding="utf-8")), run.stdout


@pytest.mark.slow
def test_results_record_machine_and_arguments(done: tuple[dict[str, Any], str]) -> None:
    results, _ = done
    assert results["complete"]
    assert results["failed"] == {}
    assert results["machine"]["date"]
    assert results["machine"]["gpu"] is None
    for name in ("torch", "transformers", "peft", "bitsandbytes", "qwen3ft"):
        assert results["machine"]["versions"][name]
    assert results["arguments"]["steps"] == STEPS
    assert results["arguments"]["rows"] == STEPS * SEQUENCES


@pytest.mark.slow
def test_both_paths_train_the_same(done: tuple[dict[str, Any], str]) -> None:
    """On the CPU both compute in fp32, so they differ by the order of sums alone."""
    training = done[0]["training"]
    for path in PATHS:
        assert training[path]["levers"]["kernels"] == path
        assert len(training[path]["losses"]) == len(training[path]["grad_norms"]) == STEPS
    fused, plain = (training[path] for path in PATHS)
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert fused["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-4)
    assert CONTROL not in training  # on a CPU it would be the plain path once more
    found = done[0]["training_compared"]
    assert found == compare_training(training)
    assert found["steps"] == STEPS
    assert found["final_loss"]["fused"] == fused["losses"][-1]
    assert found["loss_fell_by"] == pytest.approx(fused["losses"][0] - fused["losses"][-1])
    assert found["loss_fell_share"] > 0.05


@pytest.mark.slow
def test_gradients_are_near_the_reference_but_not_it(done: tuple[dict[str, Any], str]) -> None:
    (measured,) = done[0]["gradients"].values()
    assert len(measured["tensors"]) == 14 * measured["layers"]
    errors = measured["errors"]
    assert errors == compare_gradients(measured["tensors"])
    assert len(errors["kinds"]) == 14
    for path in PATHS:
        of_path = errors[path]
        assert 1e-5 < of_path["median"] < of_path["max"] < 0.05  # bf16 rounds, and does no more
        assert 1e-5 < of_path["whole"] < of_path["max"]
        assert max(kind[path] for kind in errors["kinds"].values()) == of_path["max"]
        assert measured["losses"][path] == pytest.approx(measured["losses"]["reference"], rel=1e-2)


@pytest.mark.slow
def test_the_table_has_every_verdict(done: tuple[dict[str, Any], str]) -> None:
    results, printed = done
    assert results["verdicts"] == verdicts(results)
    assert len(results["verdicts"]) == 5
    for name, is_so in results["verdicts"].items():
        assert f"\n{name}: {'yes' if is_so else 'no'}" in printed
    assert results["verdicts"]["loss within 1 % at every step"]
    assert report(results).strip() in printed


@pytest.mark.parametrize("planted", [1.011, 0.989, math.nan, math.inf])
@pytest.mark.parametrize("step", [1, STEPS])
@pytest.mark.slow
def test_one_step_apart_flips_the_verdict(
    done: tuple[dict[str, Any], str], planted: float, step: int
) -> None:
    results = copy.deepcopy(done[0])
    results["training"]["fused"]["losses"][step - 1] *= planted
    assert not verdicts(results)["loss within 1 % at every step"]
    assert compare_training(results["training"])["loss_difference"]["step"] == step


@pytest.mark.slow
def test_what_fp32_does_stands_beside_both(done: tuple[dict[str, Any], str]) -> None:
    """The fp32 control, a third training on a GPU, must have done the same steps."""
    results = copy.deepcopy(done[0])
    training = results["training"]
    training[CONTROL] = copy.deepcopy(training["plain"])
    training[CONTROL]["losses"][2] *= 1.02
    found = compare_training(training)["from_control"]
    assert {path: found[path]["step"] for path in PATHS} == dict.fromkeys(PATHS, 3)
    assert found["plain"]["relative"] == pytest.approx(1 - 1 / 1.02)
    assert "against fp32" in report(results)
    assert "against fp32" not in report(done[0])
    training[CONTROL]["grad_norms"].pop()
    with pytest.raises(ValueError, match="same number"):
        compare_training(training)


@pytest.mark.slow
def test_a_loss_that_stays_is_no_proof(done: tuple[dict[str, Any], str]) -> None:
    results = copy.deepcopy(done[0])
    for path in PATHS:
        results["training"][path]["losses"] = [5.0] * STEPS
    assert verdicts(results)["loss within 1 % at every step"]
    assert not verdicts(results)["loss fell by 5 % or more"]


@pytest.mark.slow
def test_other_steps_are_not_compared(done: tuple[dict[str, Any], str]) -> None:
    training = copy.deepcopy(done[0]["training"])
    training["plain"]["losses"].pop()
    with pytest.raises(ValueError, match="same number"):
        compare_training(training)
    training = copy.deepcopy(done[0]["training"])
    training["plain"]["levers"]["seed"] += 1
    with pytest.raises(ValueError, match="plans differ"):
        compare_training(training)


@pytest.mark.slow
def test_a_wrong_gradient_flips_the_verdicts(done: tuple[dict[str, Any], str]) -> None:
    """A wrong small tensor shows in the worst error, a wrong large one in the total."""
    results = copy.deepcopy(done[0])
    tensors = results["gradients"]["tiny"]["tensors"]
    smallest = min(tensors, key=lambda name: tensors[name]["reference"])
    for norms in tensors.values():
        norms["fused"] = 1e-3 * norms["reference"]
    assert verdicts(results)["tiny: fused error within 1e-2, worst tensor"]
    tensors[smallest]["fused"] = 0.1 * tensors[smallest]["reference"]
    found = verdicts(results)
    assert not found["tiny: fused error within 1e-2, worst tensor"]
    assert found["tiny: fused error within 1e-2, all together"]
    assert not found["tiny: no worse than plain"]
    assert compare_gradients(tensors)["fused"]["worst"] == smallest
    for norms in tensors.values():
        norms["fused"] = 0.02 * norms["reference"]
    assert not verdicts(results)["tiny: fused error within 1e-2, all together"]
    tensors[smallest]["fused"] = math.nan
    assert not verdicts(results)["tiny: fused error within 1e-2, worst tensor"]


def test_errors_are_those_of_the_norms() -> None:
    """Worked out by hand."""
    tensors = {
        "layers.0.self_attn.q_proj.lora_A": {"reference": 3.0, "fused": 0.3, "plain": 0.6},
        "layers.1.self_attn.q_proj.lora_A": {"reference": 4.0, "fused": 0.4, "plain": 0.0},
        "layers.0.mlp.up_proj.lora_B": {"reference": 12.0, "fused": 1.2, "plain": 0.6},
    }
    found = compare_gradients(tensors)
    assert found["fused"]["whole"] == pytest.approx(0.1)
    assert found["plain"]["whole"] == pytest.approx(math.sqrt(0.72) / 13)
    assert found["plain"]["median"] == pytest.approx(0.05)
    assert found["kinds"]["q_proj A"]["plain"] == pytest.approx(0.2)
    assert set(found["kinds"]) == {"q_proj A", "up_proj B"}
    with pytest.raises(ValueError, match="no gradient"):
        compare_gradients({"x": {"reference": 0.0, "fused": 0.0, "plain": 0.0}})


@pytest.mark.slow
def test_a_shape_is_measured_by_its_first_layers(tmp_path: Path) -> None:
    """A small shape goes the way of the large ones: 4-bit files in bf16, two micro-batches."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from benchmarks.parity.gradients import measure
    from qwen3ft.config import TrainingConfig
    from qwen3ft.model.manager import ModelManager

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1536,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "16")
    settings = ModelManager(TrainingConfig()).configure_quantization("nf4-double", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "16", dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(tmp_path / "4")
    case = {"shape": "small", "sequence_tokens": 64, "cap_gb": 4.0, "sequences_per_step": 18}
    values = {"case": case, "seed": 0, "layers": 2, "model": str(tmp_path / "4"), "text": False}
    found = measure(values)
    assert found["layers"] == 2
    assert len(found["tensors"]) == 28
    assert found["trained_tokens"] == found["tokens"] - 18
    errors = compare_gradients(found["tensors"])
    for path in PATHS:
        assert errors[path]["max"] < 0.05
    assert Case(**case).shape == "small"


def test_a_job_that_fails_is_named_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--shape", "tiny", "--timeout", "0.1"]
    arguments = parity.parse(["--work", str(tmp_path), "--out", str(tmp_path / "r.json"), *more])
    bench = parity.ParityBench(arguments)
    bench._measure("tiny", {"case": {}, "text": True})
    (why,) = bench.results["failed"].values()
    assert "timeout after 0.1 s" in why
    assert "gradients tiny" in report(bench.results)


def test_a_shape_without_a_gpu_says_so(tmp_path: Path) -> None:
    where = ["--work", str(tmp_path), "--out", str(tmp_path / "r.json"), "--shape", "0.6b"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.parity.campaign", *where],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 2
    assert "needs a GPU" in run.stderr
