"""Counts how often the gate promotes bad adapters or keeps good ones out, on the embedded model.

    python -m benchmarks.gate.campaign [--quick] [--jobs 2] [--work DIR] [--out FILE]

Trains a champion, 20 good candidates and 50 planted bad ones (see nights.py) for real, on the CPU,
by the worker's own code. Each is evaluated beside base and champion and goes through the gate
twice: as on a first night, with only the base to beat, and with the champion too. A bad candidate
counts as promoted if either verdict promotes it, a good one as kept out if either keeps it. Exits
with 1 if any of 50 bad ones was promoted, or more than one of 20 good ones was kept out.

`--jobs` processes with one thread each run several candidates, which saves the 10 s start of a
worker. With `--work` an interrupted benchmark continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gate.nights import (
    Night,
    all_nights,
    champion_night,
    clean_rows,
    write_rows,
)
from benchmarks.machine import ROOT, machine, write_json
from qwen3ft.config import TrainingConfig, load_config
from qwen3ft.evaluation.gate import decide_promotion, gate_policy
from qwen3ft.jobs.folders import RunDir, read_record, write_record
from qwen3ft.operations.preview import preview_plan
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion, InferenceReport, Verdict
from qwen3ft.records.model import ModelSnapshot, SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest

GOOD, BAD = 20, 50
MOST_BAD_PROMOTED, MOST_GOOD_KEPT = 0, 1
QUESTIONS = 120
MAX_ABILITY_LOSS_RISE = 0.8
"""Nats; set beforehand as about twice the cost of good nights of two other seeds (0.31, 0.46)."""

SHOWN = (
    *("exact_match", "token_f1", "chrf", "answer_loss", "ability_loss"),
    *("form", "sampled_form"),
)
NIGHTS_PER_POOL = 24
"""Nights until fresh processes start; max_tasks_per_child hangs (python/cpython#115634)."""


class Judged(Record):
    """One candidate, its evaluation and the gate's verdicts."""

    night: str
    good: bool
    first_night: Verdict
    beside_champion: Verdict | None
    report: InferenceReport
    train_cpu_seconds: float | None
    evaluate_cpu_seconds: float

    @property
    def asked(self) -> int:
        """Questions until the verdict was clear."""
        return max(score.rows for score in self.report.scores)

    @property
    def promoted(self) -> list[bool]:
        """Decision of each verdict: True if it promotes."""
        verdicts = (self.first_night, self.beside_champion)
        return [v.decision == "promoted" for v in verdicts if v is not None]


def make_config(work: Path, night: Night) -> TrainingConfig:
    """Return the settings of the embedded model with this night's rows."""
    folder = work / "nights" / night.name
    folder.mkdir(parents=True, exist_ok=True)
    return load_config(
        ROOT / "deployments/configs/embedded.yaml",
        {
            "cache_dir": str(work / "cache"),
            "output_dir": str(work / "out"),
            "data_paths": [write_rows(folder / "train.jsonl", night.rows)],
            "dev_paths": [write_rows(folder / "dev.jsonl", night.dev)],
            "test_paths": [write_rows(folder / "test.jsonl", clean_rows("test"))],
            "max_memory_gb": 4.0,
            "num_epochs": 5,
            "evaluate_every_steps": 33,
            "inference_rows": QUESTIONS,
            "max_ability_loss_rise": MAX_ABILITY_LOSS_RISE,
            **night.settings,
        },
    )


def judge(work: Path, model: ModelSnapshot, night: Night, champion: Champion | None) -> Judged:
    """Train the night's candidate, evaluate it and ask the gate; reuse an earlier record."""
    record = work / "nights" / night.name / "judged.json"
    if record.exists():
        return read_record(record, Judged)
    config = make_config(work, night)
    started = time.process_time()
    plan, saved = train(work, model, night, config)
    trained = time.process_time()
    report = evaluate(plan, config, saved, champion)
    policy = gate_policy(config)
    alone = report.model_copy(
        update={"scores": tuple(s for s in report.scores if s.label != "champion")}
    )
    judged = Judged(
        night=night.name,
        good=night.good,
        first_night=decide_promotion(alone, saved, champion=None, policy=policy),
        beside_champion=decide_promotion(report, saved, champion=champion, policy=policy)
        if champion
        else None,
        report=report,
        train_cpu_seconds=trained - started,
        evaluate_cpu_seconds=time.process_time() - trained,
    )
    write_record(record, judged)
    return judged


def train(
    work: Path, model: ModelSnapshot, night: Night, config: TrainingConfig
) -> tuple[TrainPlan, SavedAdapter]:
    """Prepare rows, plan, train and save, as a run does."""
    from qwen3ft.data.pipeline import DataPipeline, dataset_target
    from qwen3ft.data.sources import resolved
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.model.adapter import plan_adapter
    from qwen3ft.model.save_adapter import save_adapter
    from qwen3ft.planning.plan import build_plan
    from qwen3ft.worker import jobs as worker

    folder = dataset_target(resolved(config), model)
    dataset = DataPipeline(config).prepare(model, folder)
    environment = EnvironmentManager().report().model_copy(update={"gpus": ()})
    plan = build_plan(config, environment, model, plan_adapter(config, model.shape), dataset)
    run = RunDir(work / "runs" / night.name)
    plan = plan.for_run(run.path.name, str(run.path), attempt=1, resume_from=None)
    outcome = worker.train_job(worker.Job(run.attempt(1).create(plan).path))
    return plan, save_adapter(outcome, plan, config)


def evaluate(
    plan: TrainPlan, config: TrainingConfig, saved: SavedAdapter, champion: Champion | None
) -> InferenceReport:
    """Return the report of the inference test."""
    from qwen3ft.worker import jobs as worker

    job = RunDir(Path(plan.run_dir)).job("inference")
    request = InferenceRequest(
        config=config,
        model=plan.model,
        adapter=saved,
        champion=champion,
        questions_path=str(Path(plan.dataset.path) / "test.jsonl"),
        answers_path=str(job.path / "answers.jsonl"),
        device="cpu",
        batch_size=plan.memory.eval_batch_size,
    )
    return worker.inference_job(worker.Job(job.create(request).path))


def judge_all(work: Path, nights: Sequence[Night], jobs: int) -> list[Judged]:
    """Judge the champion first, so that its answers are cached, then all others in parallel."""
    # Quantised once, for all candidates.
    model = preview_plan(make_config(work, champion_night())).model
    first = judge(work, model, champion_night(), None)
    champion = Champion(
        registered_model="qwen3ft-embedded",
        version="1",
        source_uri="",
        adapter_path=first.report.adapter_path,
    )
    print(line_of(first), flush=True)
    judged = []
    for start in range(0, len(nights), NIGHTS_PER_POOL):
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            some = nights[start : start + NIGHTS_PER_POOL]
            futures = [pool.submit(judge, work, model, night, champion) for night in some]
            for future in futures:
                judged.append(future.result())
                print(line_of(judged[-1]), flush=True)
    return [first, *judged]


def line_of(judged: Judged) -> str:
    """Return a candidate as one line of text."""
    candidate, base = judged.report.score("candidate"), judged.report.score("base")
    assert candidate is not None
    assert base is not None
    ability = (candidate.ability_loss or 0) - (base.ability_loss or 0)
    verdict = judged.beside_champion or judged.first_night
    flags = "".join("+" if promoted else "-" for promoted in judged.promoted)
    return (
        f"{judged.night:24} {flags:2}  {judged.asked:3} asked  exact {candidate.exact_match:6.1%}  "
        f"loss {candidate.answer_loss or 0:6.3f}  ability {ability:+6.2f}  {verdict.sentence[:110]}"
    )


def summarise(judged: Sequence[Judged], seconds: float, jobs: int) -> dict[str, Any]:
    """Return counts, costs and the facts of every candidate."""
    champion, *others = judged
    good, bad = ([j for j in others if j.good is wanted] for wanted in (True, False))
    return {
        "machine": machine(),
        "seconds_of_this_call": round(seconds, 1),
        "processes": jobs,
        "questions": QUESTIONS,
        "asked_share": round(fmean(j.asked / QUESTIONS for j in others), 3),
        "asked_share_good": round(fmean(j.asked / QUESTIONS for j in good), 3),
        "bad": len(bad),
        "bad_promoted": [j.night for j in bad if any(j.promoted)],
        "good": len(good),
        "good_kept_out": [j.night for j in good if not all(j.promoted)],
        "train_cpu_seconds": _mean(j.train_cpu_seconds for j in others),
        "evaluate_cpu_seconds": _mean(j.evaluate_cpu_seconds for j in others),
        "champion_generated": champion.report.generated,
        "generated_later": sum(
            count
            for j in others
            for label, count in j.report.generated.items()
            if label != "candidate"
        ),
        "candidates": [_facts_of(j) for j in judged],
    }


def _mean(seconds: Iterable[float | None]) -> float:
    return round(fmean(value for value in seconds if value is not None), 1)


def _facts_of(judged: Judged) -> dict[str, Any]:
    verdicts = {"first_night": judged.first_night, "beside_champion": judged.beside_champion}
    scores = {
        score.label: {name: getattr(score, name) for name in SHOWN}
        for score in judged.report.scores
    }
    decisions = {name: [v.decision, *v.reasons] for name, v in verdicts.items() if v is not None}
    return {
        "night": judged.night,
        **decisions,
        "asked": judged.asked,
        "candidate": scores["candidate"],
        "base": scores["base"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every candidate and the counts; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 bad candidates and 2 good ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    nights = all_nights(2, 8) if asked.quick else all_nights(GOOD, BAD)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qwen3ft-gate-") as folder:
        judged = judge_all(asked.work or Path(folder), nights, asked.jobs)
    results = summarise(judged, time.monotonic() - started, asked.jobs)
    promoted, kept = results["bad_promoted"], results["good_kept_out"]
    print(
        f"bad promoted: {len(promoted)} of {results['bad']} {promoted or ''}\n"
        f"good kept out: {len(kept)} of {results['good']} {kept or ''}\n"
        f"questions asked: {results['asked_share']:.0%} of all, of good candidates "
        f"{results['asked_share_good']:.0%}\n"
        f"{results['seconds_of_this_call']:.0f} s in {asked.jobs} processes; a candidate takes "
        f"{results['train_cpu_seconds']} s of CPU to train and {results['evaluate_cpu_seconds']} s "
        f"to evaluate; "
        f"answers of base and champion generated again: {results['generated_later']}"
    )
    if asked.out:
        write_json(asked.out, json.loads(json.dumps(results)))
    return int(len(promoted) > MOST_BAD_PROMOTED or len(kept) > MOST_GOOD_KEPT)


if __name__ == "__main__":
    sys.exit(main())
