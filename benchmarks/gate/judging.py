"""One candidate of the gate's benchmark: trained for real, asked, and judged by the gate."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from benchmarks.gate.candidates import questions
from benchmarks.gate.nights import Night, write_rows
from benchmarks.gate.thinking import THINKING_TOKENS
from benchmarks.machine import ROOT
from qwen3ft.config import TrainingConfig, load_config
from qwen3ft.evaluation.gate import decide_promotion, gate_policy
from qwen3ft.evaluation.sequential import LOOKS
from qwen3ft.jobs.folders import RunDir, read_record, write_record
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion, InferenceReport, Verdict
from qwen3ft.records.model import ModelSnapshot, SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest

QUESTIONS = 600
MAX_ABILITY_LOSS_RISE = 0.8
"""Nats; set beforehand as about twice the cost of good nights of two other seeds (0.31, 0.46)."""

FIRST_NIGHT, BESIDE_CHAMPION = "first_night", "beside_champion"


class Judgement(Record):
    """One verdict of the gate."""

    asked: int
    """Questions until it was clear."""
    looks: int
    """Looks at the verdict until then."""
    stopped_early: str
    """Why no more were asked; '' if all were."""
    verdict: Verdict
    with_all: Verdict
    """The verdict on the answers to all questions."""

    @property
    def changed(self) -> bool:
        """True if all questions would have led to another decision."""
        return self.verdict.decision != self.with_all.decision


class Judged(Record):
    """One candidate, its verdicts by the kind of night, and its answers to all questions."""

    night: str
    good: bool
    thinking: bool
    judgements: dict[str, Judgement]
    report: InferenceReport
    generated_again: int
    """Answers of base and champion that were generated although they were known."""
    train_cpu_seconds: float
    evaluate_cpu_seconds: float

    @property
    def promoted(self) -> list[bool]:
        """Decision of each verdict: True if it promotes."""
        return [each.verdict.decision == "promoted" for each in self.judgements.values()]


def make_config(work: Path, night: Night) -> TrainingConfig:
    """Return the settings of the embedded model with this night's rows."""
    folder = work / "nights" / night.name
    folder.mkdir(parents=True, exist_ok=True)
    return load_config(
        ROOT / "deployments/configs/embedded.yaml",
        {
            # Of its own: an answer cache keeps the newest 16 models only.
            "cache_dir": str(folder / "cache"),
            "output_dir": str(work / "out"),
            "data_paths": [write_rows(folder / "train.jsonl", night.rows)],
            "dev_paths": [write_rows(folder / "dev.jsonl", night.dev)],
            "test_paths": [write_rows(folder / "test.jsonl", questions(thinking=night.thinking))],
            "max_memory_gb": 4.0,
            "num_epochs": 5,
            "evaluate_every_steps": 33,
            "inference_rows": QUESTIONS,
            "max_thinking_tokens": THINKING_TOKENS,
            "max_ability_loss_rise": MAX_ABILITY_LOSS_RISE,
            **night.settings,
        },
    )


def judge(work: Path, model: ModelSnapshot, night: Night, first: Judged | None) -> Judged:
    """Train the night's candidate, ask it and the gate; reuse an earlier record.

    Args:
        work: Folder of the benchmark.
        model: The quantised model.
        night: Rows and settings.
        first: The champion's own night; None if this is it.
    """
    record = work / "nights" / night.name / "judged.json"
    if record.exists():
        return read_record(record, Judged)
    config = make_config(work, night)
    started = time.process_time()
    plan, saved = train(work, model, night, config)
    trained = time.process_time()
    champion = None
    if first is not None:
        path = first.report.adapter_path
        champion = Champion(
            registered_model="qwen3ft-embedded", version="1", source_uri="", adapter_path=path
        )
        known = work / "nights" / first.night / "cache/answers"
        shutil.copytree(known, Path(config.cache_dir) / "answers", dirs_exist_ok=True)
    rivals: dict[str, Champion | None] = {FIRST_NIGHT: None} if night.bad_alone else {}
    if champion is not None:
        rivals[BESIDE_CHAMPION] = champion
    reports = {name: evaluate(plan, config, saved, rival, name) for name, rival in rivals.items()}
    exact = config.model_copy(update={"stop_asking_early": False})
    report = evaluate(plan, exact, saved, champion, "all")
    policy = gate_policy(config)
    judged = Judged(
        night=night.name,
        good=night.good,
        thinking=night.thinking,
        judgements={
            name: Judgement(
                asked=asked_of(reports[name]),
                looks=looks_of(reports[name]),
                stopped_early=reports[name].stopped_early,
                verdict=decide_promotion(reports[name], saved, champion=rival, policy=policy),
                with_all=decide_promotion(
                    report if rival else _alone(report), saved, champion=rival, policy=policy
                ),
            )
            for name, rival in rivals.items()
        },
        report=report,
        generated_again=sum(
            count
            for each in (*reports.values(), report)
            for label, count in each.generated.items()
            if label != "candidate"
        ),
        train_cpu_seconds=trained - started,
        evaluate_cpu_seconds=time.process_time() - trained,
    )
    write_record(record, judged)
    return judged


def asked_of(report: InferenceReport) -> int:
    """Return the number of questions that each model was asked."""
    return max(score.rows for score in report.scores)


def looks_of(report: InferenceReport) -> int:
    """Return the number of looks at the verdict."""
    parts = [round(share * report.questions_planned) for share in LOOKS]
    return 1 + parts.index(asked_of(report))


def _alone(report: InferenceReport) -> InferenceReport:
    """Return the report as of a first night."""
    scores = tuple(score for score in report.scores if score.label != "champion")
    return report.model_copy(update={"scores": scores})


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
    plan: TrainPlan,
    config: TrainingConfig,
    saved: SavedAdapter,
    champion: Champion | None,
    name: str,
) -> InferenceReport:
    """Return the report of the inference test; `name` is that of its folder."""
    from qwen3ft.worker import jobs as worker

    job = RunDir(Path(plan.run_dir)).job(name)
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
