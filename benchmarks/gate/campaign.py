"""Counts how often the gate promotes bad adapters or keeps good ones out, on the embedded model.

    python -m benchmarks.gate.campaign [--quick] [--jobs 2] [--minutes M] [--work DIR] [--out FILE]

Trains two champions, 20 good candidates and 50 planted bad ones for real, on the CPU, by the
worker's own code (`candidates.py`). Half of the good and most of the bad ones learn from rows with
reasoning, beside a champion that thinks. Each is judged as a night judges it, asking stops early:
on a first night, with only the base to beat, and again beside the champion. Then it is asked all
600 questions, which shows what stopping early changed. A bad candidate counts as promoted if either
verdict promotes it, a good one as kept out if either keeps it. Exits with 1 if any of 50 bad ones
was promoted, more than one of 20 good ones was kept out, less than 30 % of the questions were
saved, or a candidate has no verdict.

`--jobs` processes with one thread each run several candidates, which saves the 10 s start of a
worker. `--out` is written anew after each; none is begun after `--minutes`. With `--work` an
interrupted benchmark continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gate.candidates import all_nights, champion_night
from benchmarks.gate.judging import (
    BESIDE_CHAMPION,
    FIRST_NIGHT,
    QUESTIONS,
    Judged,
    judge,
    make_config,
)
from benchmarks.gate.nights import Night
from benchmarks.machine import machine, write_json
from qwen3ft.operations.preview import preview_plan
from qwen3ft.records.model import ModelSnapshot

GOOD, BAD = 20, 50
QUICK_GOOD, QUICK_BAD = 2, 10
MOST_BAD_PROMOTED, MOST_GOOD_KEPT = 0, 1
LEAST_SAVED = 0.3
"""Share of the questions that stopping early has to save to be worth having."""

SHOWN = (
    *("exact_match", "token_f1", "chrf", "answer_loss", "ability_loss"),
    *("form", "sampled_form"),
)
NIGHTS_PER_PROCESS = 8
"""Nights until fresh processes start; max_tasks_per_child hangs (python/cpython#115634)."""


@dataclass
class Campaign:
    """Candidates that are to be judged in `work` by so many processes, and those that are."""

    work: Path
    jobs: int
    end: float
    """Time, as of `time.time`, after which none is begun."""
    champions: list[Judged] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Errors by night."""
    not_begun: list[str] = field(default_factory=list)

    def run(self, nights: Sequence[Night]) -> Iterator[Judged]:
        """Judge the champions first, so that their answers are known, then all nights."""
        champions = [champion_night(thinking=thinking) for thinking in (False, True)]
        # Quantised once, for all candidates.
        model = preview_plan(make_config(self.work, champions[0])).model
        for judged in self._judge(model, [(night, None) for night in champions]):
            self.champions.append(judged)
            yield judged
        by_thinking = {judged.thinking: judged for judged in self.champions}
        # Without their champion there is nothing to judge them beside.
        self.not_begun += [night.name for night in nights if night.thinking not in by_thinking]
        pairs = [
            (night, by_thinking[night.thinking])
            for night in nights
            if night.thinking in by_thinking
        ]
        size = NIGHTS_PER_PROCESS * self.jobs
        for start in range(0, len(pairs), size):
            for judged in self._judge(model, pairs[start : start + size]):
                self.judged.append(judged)
                yield judged

    def _judge(
        self, model: ModelSnapshot, pairs: Sequence[tuple[Night, Judged | None]]
    ) -> Iterator[Judged]:
        """Yield each as it is judged."""
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            futures = {
                pool.submit(_judge_in_time, self.end, self.work, model, night, champion): night.name
                for night, champion in pairs
            }
            for future in as_completed(futures):
                name = futures[future]
                if error := future.exception():
                    self.failed[name] = f"{type(error).__name__}: {error}"
                    print(f"{name}: {self.failed[name]}", file=sys.stderr, flush=True)
                elif judged := future.result():
                    yield judged
                else:
                    self.not_begun.append(name)


def _judge_in_time(
    end: float, work: Path, model: ModelSnapshot, night: Night, champion: Judged | None
) -> Judged | None:
    return judge(work, model, night, champion) if time.time() < end else None


def line_of(judged: Judged) -> str:
    """Return a candidate as one line of text."""
    candidate, base = judged.report.score("candidate"), judged.report.score("base")
    assert candidate is not None
    assert base is not None
    ability = (candidate.ability_loss or 0) - (base.ability_loss or 0)
    flags = "".join("+" if promoted else "-" for promoted in judged.promoted)
    asked = "/".join(f"{each.asked:3}" for each in judged.judgements.values())
    last = list(judged.judgements.values())[-1]
    return (
        f"{judged.night:30} {flags:2} {asked:7} asked  exact {candidate.exact_match:6.1%}  "
        f"loss {candidate.answer_loss or 0:6.3f}  ability {ability:+6.2f}  "
        f"{last.verdict.sentence[:100]}"
    )


def summarise(campaign: Campaign, seconds: float) -> dict[str, Any]:
    """Return counts, costs and the facts of every candidate."""
    judged = sorted(campaign.judged, key=lambda each: each.night)
    good, bad = ([j for j in judged if j.good is wanted] for wanted in (True, False))
    return {
        "machine": machine(),
        "seconds_of_this_call": round(seconds, 1),
        "processes": campaign.jobs,
        "questions": QUESTIONS,
        "bad": len(bad),
        "bad_promoted": [j.night for j in bad if any(j.promoted)],
        "good": len(good),
        "good_kept_out": [j.night for j in good if not all(j.promoted)],
        "thinking": sum(j.thinking for j in judged),
        "asked_share": _asked_share(judged),
        "asked_shares": {
            f"{kind} {name}": _asked_share(of, name)
            for kind, of in (("good", good), ("bad", bad))
            for name in (FIRST_NIGHT, BESIDE_CHAMPION)
        },
        "verdicts": sum(len(j.judgements) for j in judged),
        "changed_by_stopping": [
            f"{j.night} {name}"
            for j in judged
            for name, each in j.judgements.items()
            if each.changed
        ],
        "train_cpu_seconds": _mean(j.train_cpu_seconds for j in judged),
        "evaluate_cpu_seconds": _mean(j.evaluate_cpu_seconds for j in judged),
        "generated_again": sum(j.generated_again for j in judged),
        "failed": campaign.failed,
        "not_begun": campaign.not_begun,
        "champions": [_facts_of(j) for j in campaign.champions],
        "candidates": [_facts_of(j) for j in judged],
    }


def _asked_share(judged: Iterable[Judged], name: str = "") -> float:
    """Return the mean share of the questions that a verdict took, over all or one kind of night."""
    return _mean(
        (
            each.asked / QUESTIONS
            for one in judged
            for kind, each in one.judgements.items()
            if not name or kind == name
        ),
        digits=3,
    )


def _mean(values: Iterable[float], digits: int = 1) -> float:
    return round(fmean([*values] or [0.0]), digits)


def _facts_of(judged: Judged) -> dict[str, Any]:
    report = judged.report
    return {
        "night": judged.night,
        **{
            name: {
                "decision": each.verdict.decision,
                "reasons": each.verdict.reasons,
                "asked": each.asked,
                "looks": each.looks,
                "stopped_early": each.stopped_early,
                "with_all": each.with_all.decision,
                **({"reasons_with_all": each.with_all.reasons} if each.changed else {}),
            }
            for name, each in judged.judgements.items()
        },
        **{
            score.label: {name: getattr(score, name) for name in SHOWN}
            for score in report.scores
            if score.label == "candidate" or not judged.judgements.get(BESIDE_CHAMPION)
        },
        "thinking_asked": report.thinking_asked,
        "thinking_cut": report.thinking_cut.get("candidate", 0),
    }


def missed(results: dict[str, Any]) -> list[str]:
    """Return what does not hold."""
    bars = {
        "a bad candidate was promoted": len(results["bad_promoted"]) > MOST_BAD_PROMOTED,
        "good candidates were kept out": len(results["good_kept_out"]) > MOST_GOOD_KEPT,
        "too few questions were saved": 1 - results["asked_share"] < LEAST_SAVED,
        "candidates have no verdict": bool(results["failed"] or results["not_begun"]),
    }
    return [bar for bar, broken in bars.items() if broken]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every candidate and the counts; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 good candidates, 10 bad ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=600.0, help="none is begun later")
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    nights = all_nights(QUICK_GOOD, QUICK_BAD) if asked.quick else all_nights(GOOD, BAD)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qwen3ft-gate-") as folder:
        work = (asked.work or Path(folder)).resolve()
        campaign = Campaign(work, asked.jobs, time.time() + 60 * asked.minutes)
        for judged in campaign.run(nights):
            print(line_of(judged), flush=True)
            if asked.out:
                write_json(asked.out, summarise(campaign, time.monotonic() - started))
    results = summarise(campaign, time.monotonic() - started)
    promoted, kept = results["bad_promoted"], results["good_kept_out"]
    changed, shares = results["changed_by_stopping"], results["asked_shares"]
    print(
        f"bad promoted: {len(promoted)} of {results['bad']} {promoted or ''}\n"
        f"good kept out: {len(kept)} of {results['good']} {kept or ''}\n"
        f"questions asked: {results['asked_share']:.0%} of all; "
        f"{', '.join(f'{name} {share:.0%}' for name, share in shares.items())}\n"
        f"decisions that all questions would have changed: {len(changed)} of "
        f"{results['verdicts']} {changed or ''}\n"
        f"{results['seconds_of_this_call']:.0f} s in {asked.jobs} processes; a candidate takes "
        f"{results['train_cpu_seconds']} s of CPU to train and {results['evaluate_cpu_seconds']} s "
        f"to evaluate; answers of base and champion generated again: "
        f"{results['generated_again']}\n"
        f"{'; '.join(missed(results)) or 'all bars hold'}"
    )
    if asked.out:
        write_json(asked.out, results)
    return int(bool(missed(results)))


if __name__ == "__main__":
    sys.exit(main())
