"""Questions dealt to ranks: the very answers of one, whatever is known or goes wrong."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.asking import three_models, with_settings
from support.finished_run import make_plan
from support.ranks import on_ranks
from support.trained_adapter import Trained

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.disk.files import read_json_lines
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.evaluation.decoded import _share_of
from qwen3ft.evaluation.inference import LeftToRank0Error, run_inference
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import last_sign
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.training.ranks import Ranks
from tasks.inference import answered, asked_again, compare_answers

SECONDS = ("seconds", "answer_seconds")
PLACES = ("answers_path", "scores_path", "answered_by")


def found_by(request: InferenceRequest, ranks: Ranks | None = None) -> Any:
    """Return the report without times and paths, all answers and the scores of each question."""
    report = run_inference(request, lambda *_: None, ranks)
    same = dict.fromkeys(SECONDS, 0.0) | dict.fromkeys(PLACES, "") | {"predicted_bytes": None}
    files = (report.answers_path, report.scores_path)
    return report.model_copy(update=same), [list(read_json_lines(Path(each))) for each in files]


def dealt(
    request: InferenceRequest,
    size: int,
    folder: Path,
    before: Callable[[int], None] = lambda rank: None,
) -> list[Any]:
    """Return what each of the ranks found; of one, without any others."""

    def work(rank: int) -> Any:
        torch.set_num_threads(1)  # those of the test's own process are not in a forked one
        before(rank)
        if size == 1:
            return found_by(request)
        ranks = Ranks(rank, size)
        ranks.meet(request, folder / "meeting-place", gradients=False)
        own = {"answers_path": str(folder / f"{rank}" / "answers.jsonl")}
        (folder / f"{rank}").mkdir()
        try:
            found = found_by(request.model_copy(update=own), ranks)
        except LeftToRank0Error:
            return None
        ranks.leave()
        return found

    folder.mkdir()
    return on_ranks(size, folder, work)


@pytest.mark.parametrize(
    ("size", "early"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_ranks_give_the_very_answers_and_losses_of_one(
    trained: Trained, tmp_path: Path, size: int, early: bool
) -> None:
    """Bit by bit, greedy and drawn, for all three models, also where asking stops early."""
    request = three_models(trained, tmp_path, rows_asked=16)
    settings = {"kernels": "fused", "stop_asking_early": early, "gate_min_rows": 1}
    [one] = dealt(with_settings(request, tmp_path / "a", **settings), 1, tmp_path / "one")
    found = dealt(with_settings(request, tmp_path / "b", **settings), size, tmp_path / "several")
    assert one[0].questions_planned == 16
    assert bool(one[0].stopped_early) == early
    assert found == [one] * size


@pytest.mark.parametrize(("models", "size"), [(2, 2), (2, 4), (3, 2), (3, 3)])
def test_each_rank_has_as_many_answers_of_every_model(models: int, size: int) -> None:
    """Of 12 questions to each model; each answer is one rank's, the longest first."""
    lengths = list(range(12, 0, -1)) * models
    shares = [_share_of(lengths, rank, size) for rank in range(size)]
    assert sorted(index for share in shares for index in share) == list(range(12 * models))
    for share in shares:
        assert [lengths[index] for index in share] == sorted(
            (lengths[index] for index in share), reverse=True
        )
        assert {sum(index // 12 == model for index in share) for model in range(models)} == {
            12 // size
        }


def test_a_gpu_that_is_gone_since_the_training_leaves_the_questions_to_the_others(
    trained: Trained, tmp_path: Path
) -> None:
    """What every rank lacks, or the only one, no other request mends."""
    one = three_models(trained, tmp_path)
    request = one.model_copy(update={"places": (0, 2, 3)})
    gone = EnvironmentNotReadyError("Rank 1 of 3: no GPU is there", rank=1)
    again = asked_again(request, gone)
    assert again == request.model_copy(update={"places": (0, 3)})
    assert asked_again(request, EnvironmentNotReadyError("no driver")) is None
    assert asked_again(one, EnvironmentNotReadyError("no GPU is there", rank=0)) is None


@pytest.mark.slow
def test_what_is_known_is_asked_by_no_rank_and_rank_0_alone_keeps_answers(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it knows counts for all: the files may change while the ranks look at them."""
    monkeypatch.chdir(tmp_path)
    request = with_settings(three_models(trained, tmp_path), Path(), kernels="fused")
    assert not Path(request.config.cache_dir).is_absolute()
    dealt(request.model_copy(update={"champion": None}), 1, tmp_path / "first")

    def before(rank: int) -> None:
        if rank == 1:
            os.chdir(tmp_path / "both")

    both = dealt(request, 2, tmp_path / "both", before)
    assert both[0][0].generated == {"base": 0, "candidate": 0, "champion": 6}
    assert both[0] == both[1]
    assert not (tmp_path / "both" / request.config.cache_dir).exists()


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_makes_all_decoders_smaller(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same sizes again, and no rank waits for one that does not come."""
    request = with_settings(three_models(trained, tmp_path), tmp_path / "a", kernels="fused")
    capture = Decoder.capture

    def before(rank: int) -> None:
        made: list[Decoder] = []

        def counted(decoder: Decoder, **given: Any) -> None:
            made.append(decoder)
            if len(made) == 1 and rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            assert len(made) <= 2
            capture(decoder, **given)

        monkeypatch.setattr(Decoder, "capture", counted)

    both = dealt(request, 2, tmp_path / "both", before)
    assert both[0] == both[1]


@pytest.mark.slow
def test_a_kernel_that_one_rank_cannot_compile_leaves_the_answers_to_transformers(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rank 0, for all looks that follow; the others end."""
    request = with_settings(three_models(trained, tmp_path), tmp_path / "a", kernels="fused")

    def before(rank: int) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA error: no kernel image is available for execution")

        if rank == 1:
            monkeypatch.setattr(Decoder, "capture", fails)

    both = dealt(request, 2, tmp_path / "both", before)
    plain = dealt(with_settings(request, tmp_path / "b", kernels="plain"), 1, tmp_path / "plain")
    assert both == [*plain, None]


@pytest.mark.slow
def test_rank_0_goes_on_in_its_process_when_the_others_have_ended(
    trained: Trained, tmp_path: Path
) -> None:
    """As processes under the agent, which waits for it."""
    request = with_settings(three_models(trained, tmp_path), tmp_path / "x", kernels="fused")
    more = {"without_decoder": "it was tried", "places": (0, 1), "budget_gb": 4.0}
    job = RunDir(tmp_path / "run").job("inference")
    report = answered(job, request.model_copy(update=more))
    assert report.answered_by == "transformers (it was tried)"
    assert job.rank(1).outcome.stat().st_mtime < job.rank(0).outcome.stat().st_mtime


@pytest.mark.slow
def test_a_rank_that_dies_leaves_its_questions_to_the_others(
    trained: Trained, tmp_path: Path
) -> None:
    """In processes as the flow starts them: the same report, and nothing is left running."""
    request = with_settings(three_models(trained, tmp_path), tmp_path / "x", kernels="fused")
    plan = make_plan(trained.snapshot, run_id="night")
    rows = plan.dataset.model_copy(update={"path": str(tmp_path)})
    more = {"run_dir": str(tmp_path / "run"), "max_memory_gb": 4.0, "dataset": rows}
    plan = plan.model_copy(update=more)
    job = RunDir(tmp_path / "run").job("inference")
    over = threading.Event()

    def kill_rank_0() -> None:
        while not over.wait(0.02):
            if last_sign(job.rank(0))[0] == "load":
                for process in psutil.Process().children(recursive=True):
                    if process.environ().get("RANK") == "0":
                        os.kill(process.pid, signal.SIGKILL)
                        return

    def compared(places: tuple[int, ...]) -> InferenceReport:
        config = with_settings(request, tmp_path / f"cache-{len(places)}", kernels="fused").config
        asked = plan.model_copy(update={"places": places})
        return compare_answers.fn(config, asked, trained.saved, request.champion)

    whole = compared((0, 1))
    assert whole.answered_by.endswith("on each of 2 ranks")
    thread = threading.Thread(target=kill_rank_0)
    thread.start()
    found = compared((0, 1, 2))
    over.set()
    thread.join()
    assert found.answered_by.endswith("on each of 2 ranks")
    assert found.scores == whole.scores
    running = psutil.process_iter(["cmdline"])
    assert [each for each in running if str(job.path) in (each.info["cmdline"] or ())] == []
