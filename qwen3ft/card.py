"""The cards of a run, one screen each: its data and its result. Pure functions of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen3ft.config import EMBEDDED_MODEL_NAME, TrainingConfig
from qwen3ft.data_records import DataChange, DatasetManifest
from qwen3ft.records import AttemptOutcome, AttemptSummary, SavedAdapter, TrainPlan
from qwen3ft.result_records import InferenceReport, ModelScore, RunCard, Verdict
from qwen3ft.score_text import METRIC_NAMES, interval_text, show_score

EMBEDDED_NOTE = (
    "The embedded model is for demonstration: 0.8 M weights, pretrained on questions about "
    "invented products. Fine-tuning adds facts and one date format, not language understanding."
)
NOVEL_NOTE = "'novel' is wording that no training ever showed."


def build_card(
    config: TrainingConfig,
    plan: TrainPlan,
    outcome: AttemptOutcome,
    saved: SavedAdapter,
    report: InferenceReport,
    verdict: Verdict,
    attempts: Sequence[AttemptSummary],
    seconds_by_stage: Mapping[str, float],
) -> RunCard:
    """What the records of a run amount to."""
    base, tuned = report.score("base"), report.score("candidate")
    assert base is not None
    assert tuned is not None
    data = plan.dataset
    notes = [EMBEDDED_NOTE] if config.model_name == EMBEDDED_MODEL_NAME else []
    notes += [NOVEL_NOTE] if "novel" in tuned.by_split else []
    notes += [f"Degraded: {reason}." for reason in saved.degraded]
    return RunCard(
        title=f"{config.model_name}: {verdict.decision}",
        trained_on=f"{data.train.rows:,} rows ({data.train.tokens:,} tokens), "
        f"{data.dev.rows:,} held out for stopping, {data.test_rows:,} for the test",
        base_score=base.exact_match,
        tuned_score=tuned.exact_match,
        scores_by_split={
            split: (base.by_split[split].exact_match, score.exact_match, score.rows)
            for split, score in tuned.by_split.items()
            if split in base.by_split
        },
        scores=report.scores,
        main_metric=report.main_metric,
        comparisons=report.comparisons,
        forgetting=_forgetting(base, tuned, config.max_ability_loss_rise),
        held_out_loss_before=outcome.first_held_out_loss,
        held_out_loss_after=outcome.best_held_out_loss,
        peak_memory_gb=outcome.peak_memory_gb,
        budget_gb=plan.max_memory_gb,
        tokens_per_second=outcome.tokens_per_second,
        kernels=f"{plan.kernels}: {plan.reasons.get('kernels', '')}".rstrip(": "),
        seconds_by_stage=dict(seconds_by_stage),
        attempts=tuple(attempts),
        verdict=verdict.sentence,
        reasons=verdict.reasons,
        adapter_path=saved.path,
        notes=tuple(notes),
    )


def _forgetting(base: ModelScore, tuned: ModelScore, limit: float) -> str:
    """What became of the loss on what the base could do."""
    before, after = base.ability_loss, tuned.ability_loss
    if before is None or after is None:
        return "not measured"
    rise = f"{after - before:+.3f} nats per token, limit {limit:+.2f}"
    return f"loss on the ability set {before:.3f} -> {after:.3f} ({rise})"


def to_markdown(card: RunCard) -> str:
    """The card for Prefect's artifact page and for card.md."""
    lines = [
        f"# {card.title}",
        "",
        f"**{card.verdict}**",
        "",
        *(f"- {reason}" for reason in card.reasons if len(card.reasons) > 1),
        *([""] if len(card.reasons) > 1 else []),
        "| | |",
        "|---|---|",
        f"| trained on | {card.trained_on} |",
        f"| exact match | {card.base_score:.1%} → **{card.tuned_score:.1%}** |",
        *([f"| forgetting | {card.forgetting} |"] if card.forgetting else []),
        f"| held-out loss | {card.held_out_loss_before:.3f} → {card.held_out_loss_after:.3f} |",
        f"| peak memory | {card.peak_memory_gb:.2f} of {card.budget_gb:g} GB |",
        f"| adapter | `{card.adapter_path}` |",
    ]
    if card.tokens_per_second is not None:
        lines.append(f"| speed | {card.tokens_per_second:,.0f} tokens/s |")
    if card.kernels:
        lines.append(f"| kernels | {card.kernels} |")
    if card.mlflow_url:
        lines.append(f"| MLflow | [this run]({card.mlflow_url}) |")
    lines += _score_table(card)
    lines += ["", "| questions | rows | base | tuned |", "|---|---|---|---|"]
    lines += [
        f"| {split} | {rows} | {base:.1%} | {tuned:.1%} |"
        for split, (base, tuned, rows) in sorted(card.scores_by_split.items())
    ]
    lines += ["", "| attempt | outcome | batch | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {a.attempt} | {a.outcome}: {a.detail} "
        f"| {a.micro_batch_size} x {a.gradient_accumulation_steps} | {a.seconds:.1f} |"
        for a in card.attempts
    ]
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in card.seconds_by_stage.items()]
    if card.notes:
        lines += ["", *(f"> {note}\n" for note in card.notes)]
    return "\n".join(lines) + "\n"


def _score_table(card: RunCard) -> list[str]:
    """Every model's scores, the candidate's gain over the one to beat, and the forms."""
    models = {score.label: score for score in card.scores}
    if "candidate" not in models:
        return []
    labels = [label for label in ("base", "champion", "candidate") if label in models]
    rival = "champion" if "champion" in models else "base"
    gains = {c.metric: interval_text(c) for c in card.comparisons if c.rival == rival}
    lines = ["", f"| score | {' | '.join(labels)} | gain over the {rival} (interval) |"]
    lines.append("|---" * (len(labels) + 2) + "|")
    for metric, name in METRIC_NAMES.items():
        cells = [show_score(metric, getattr(models[label], metric)) for label in labels]
        lines.append(f"| {name} | {' | '.join(cells)} | {gains.get(metric, '')} |")
    cells = [show_score("loss", models[label].ability_loss) for label in labels]
    lines.append(f"| loss on the ability set | {' | '.join(cells)} | |")
    for check in models["candidate"].form:
        shares = [f"{models[label].form.get(check, 0.0):.1%}" for label in labels]
        lines.append(f"| {check} | {' | '.join(shares)} | |")
    for check in models["candidate"].sampled_form:
        shares = [f"{models[label].sampled_form.get(check, 0.0):.1%}" for label in labels]
        lines.append(f"| {check}, sampled | {' | '.join(shares)} | |")
    return lines


def data_markdown(manifest: DatasetManifest, change: DataChange) -> str:
    """What was read, trained on and new in it, for Prefect's artifact page and MLflow."""
    counts = {
        "train": manifest.train.rows,
        "dev": manifest.dev.rows,
        "test": manifest.test_rows,
        "quarantined": manifest.quarantined,
        "too long": manifest.too_long,
        "duplicates": manifest.duplicates,
        "not used": manifest.not_used,
    }
    sums = " + ".join(f"{count:,} {name}" for name, count in counts.items())
    layouts = ", ".join(f"{name} ({rows:,})" for name, rows in manifest.layouts.items())
    columns = ", ".join(f"{part} = `{name}`" for part, name in manifest.columns.items())
    lines = [
        "# Data",
        "",
        f"**{manifest.rows_read:,} rows read** = {sums}",
        "",
        f"Layout: {layouts}; {columns}.",
        "",
        *_changes(change),
        *(f"> {warning}\n" for warning in manifest.warnings),
        "| file | for | rows |",
        "|---|---|---|",
        *(f"| {file.path} | {file.role} | {file.rows:,} |" for file in manifest.sources),
        "",
        "| split | tokens | trained | median | 95 % | longest |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {split.tokens:,} | {split.trained_tokens:,} | {split.median_tokens} "
        f"| {split.p95_tokens} | {split.longest_tokens} |"
        for name, split in (("train", manifest.train), ("dev", manifest.dev))
    ]
    if manifest.reasons:
        lines += ["", "| left out because | rows |", "|---|---|"]
        lines += [f"| {reason} | {rows:,} |" for reason, rows in manifest.reasons.items()]
    return "\n".join(lines) + "\n"


def _changes(change: DataChange) -> list[str]:
    if change.since is None:
        return []
    files = {
        "new": change.new_files,
        "changed": change.changed_files,
        "gone": change.gone_files,
    }
    told = [f"{kind}: {', '.join(names)}" for kind, names in files.items() if names]
    rows = f"{change.new_rows:,} rows that it has not seen"
    return [f"Since {change.since}: {'; '.join([rows, *told])}.", ""]
