"""The parts of the scaling benchmark, one after another; each becomes a row of the results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.jobs import JobFailedError, run_job
from benchmarks.machine import machine, write_json
from benchmarks.scaling.answering import answer, answer_case
from benchmarks.scaling.shared import run_shared
from benchmarks.speed.cases import TINY

PARTS = ("exchange", "kill", "train", "exam", "answers", "side")
"""In the order in which they run; the first two while other models are still being made."""

ONLY_IF_ASKED = ("shared", "offload", "tight")
SEGMENTS_MB = (20, 12)
"""Sizes of the allocator's segments that are tried: its default, and hardly more than the least."""

LEAST_SPEEDUP = {2: 1.9, 4: 3.7, 8: 7.2}
LEAST_SIDE_BY_SIDE = 0.95
MOST_LOSS_DRIFT = 0.005
MOST_END_SECONDS = 10.0
MAKER, CHILD = "benchmarks.speed.contestants", "benchmarks.scaling.parts"
ANSWERING = ((1, 600), (1, 4800), (3, 600))
"""Models that answer, one adapter, or base, candidate and champion as in a run; and questions for
each. Of 600 the longest answer ends last wherever it is written, so GPUs win less there."""

STEPS = {"4b": {64: 100, 256: 12}, "14b": {256: 6, 64: 8}, TINY: {8: 12, 32: 6}}
"""{model: {rows a step: steps}}, in the order in which they run; of others as many as of 14b."""

PART_SECONDS, GRACE_SECONDS = 240.0, 20.0
"""Longest time of a part, and for how long one may outlast the campaign's time."""

MAKE_SECONDS, WAIT_SECONDS = 400.0, 90.0
"""Longest time to make a model, and to leave the GPUs idle for it."""

TYPICAL_SECONDS = 45.0
"""Time of a part that has not run before, for the question whether it would end in time."""


class Campaign:
    """The parts so far.

    Args:
        asked: Command line.
        work: Folder for models and logs.
        gpus: UUIDs of the GPUs; none for CPU ranks.
    """

    def __init__(self, asked: argparse.Namespace, work: Path, gpus: Sequence[str]) -> None:
        self.asked, self.work, self.gpus = asked, work, gpus
        self.end = time.monotonic() + 60 * asked.minutes
        self.rows: list[dict[str, Any]] = []
        self.bars: dict[str, bool] = {}
        self.models: dict[str, Future[dict[str, Any]]] = {}
        self.machine = machine()

    def make_models(self, pool: ThreadPoolExecutor) -> None:
        """Begin to make the models, each on a GPU of its own as far as there are as many."""
        for number, model in enumerate(self.asked.models):
            gpus = self.gpus and [self.gpus[number % len(self.gpus)]]
            values = {"kind": "model", "shape": model, "work": str(self.work), "seed": 0}
            folder = self.work / "made" / model
            self.models[model] = pool.submit(run_job, MAKER, folder, values, MAKE_SECONDS, gpus)

    def run(self) -> None:
        """Run the parts that are asked for."""
        first = self.asked.models[0]
        several = [size for size in self.asked.ranks if size > 1]
        for ranks in several if "exchange" in self.asked.parts else ():
            self.part("exchange", first, ranks, self.exchange)
        if "kill" in self.asked.parts and several:
            self.part("kill", first, 2, self.kill)
        wait(self.models.values(), WAIT_SECONDS)  # speeds are measured on an idle machine
        for model in self.asked.models:
            for rows in self.steps(model) if "train" in self.asked.parts else ():
                for ranks in self.asked.ranks:
                    self.part("train", model, ranks, self.train, rows=rows)
            for ranks in self.asked.ranks if "exam" in self.asked.parts else ():
                self.part("exam", model, ranks, self.exam)
            for models, asked in ANSWERING if "answers" in self.asked.parts else ():
                for ranks in self.asked.ranks:
                    more = {"models": models, "questions": asked}
                    self.part("answers", model, ranks, self.answers, **more)
            if "side" in self.asked.parts and model == first and len(self.gpus) > 1:
                self.part("side", model, 1, self.side_by_side, rows=self.larger(model))
            if "shared" in self.asked.parts and model == first:
                run_shared(self, model)
            for rows in self.steps(model) if "offload" in self.asked.parts else ():
                self.part("offload", model, 1, self.offload, rows=rows)
            for size in SEGMENTS_MB if "tight" in self.asked.parts else ():
                self.part("tight", model, 1, self.tight, rows=self.larger(model), segment_mb=size)

    def part(
        self, kind: str, model: str, ranks: int, compute: Callable[..., dict[str, Any]], **more: Any
    ) -> None:
        """Compute one row, print it and write all; a failure becomes a row."""
        row: dict[str, Any] = {"part": kind, "model": model, "ranks": ranks, **more}
        names = {"part": kind, "model": model, "status": "ok"}.items()
        like = [each["seconds"] for each in self.rows if names <= each.items()]
        needed = max(like, default=TYPICAL_SECONDS)
        if ranks > 1 and self.ranks_never_met():
            row["status"] = "left out: no part with several ranks ended well"
        elif time.monotonic() + needed > self.end:
            row["status"] = f"left out: it would take about {needed:.0f} s"
        else:
            started = time.monotonic()
            try:
                row |= {"status": "ok", **compute(row)}
            except JobFailedError as error:
                row |= {"status": error.status, "detail": error.detail, "log": self.log_of(row)}
            except Exception as error:  # noqa: BLE001  the other parts must not be lost
                row |= {"status": "failed", "detail": f"{type(error).__name__}: {error}"}
            row["seconds"] = round(time.monotonic() - started, 1)
        self.bars[f"{kind} of {model} on {ranks} {more or ''}: done"] = row["status"] == "ok"
        self.rows.append(row)
        print(line_of(row), flush=True)
        self.write()

    def ranks_never_met(self) -> bool:
        """Return True once two parts with several ranks have failed and none has not."""
        states = [each["status"] == "ok" for each in self.rows if each["ranks"] > 1]
        return len(states) > 1 and not any(states)

    @property
    def limit_seconds(self) -> float:
        """Time that a part may take."""
        return min(PART_SECONDS, self.end - time.monotonic() + GRACE_SECONDS)

    def write(self) -> None:
        """Write all rows so far."""
        if self.asked.out:
            write_json(self.asked.out, {"machine": self.machine, "rows": self.rows})

    def job(self, row: Mapping[str, Any], kind: str, number: int = 0, **values: Any) -> Any:
        """Run a part in a process that sees as many GPUs as it has ranks, from the given one on."""
        model, ranks = row["model"], 1 if values.get("one_gpu") else row["ranks"]
        made = self.models[model].result()
        return run_job(
            CHILD,
            self.folder(row, number),
            {
                "kind": kind,
                "model": model,
                "ranks": row["ranks"],
                "tokens": 64 if model == TINY else 256,
                "design": min(self.steps(model)),
                "snapshot": made["snapshot"],
                **values,
            },
            self.limit_seconds,
            self.gpus and self.gpus[number : number + ranks],
        )

    def folder(self, row: Mapping[str, Any], number: int = 0) -> Path:
        """Return the folder of a part's process."""
        names = ("part", "model", "rows", "models", "questions", "ranks", "take", "segment_mb")
        kind = "-".join(str(row[name]).replace(" ", "-") for name in names if name in row)
        return self.work / "parts" / f"{kind}-{number}"

    def log_of(self, row: Mapping[str, Any]) -> list[str]:
        """Return the end of the log of a part that failed."""
        paths = [self.folder(row, number) / "log.txt" for number in range(max(2, row["ranks"]))]
        texts = [path.read_text(errors="replace") for path in paths if path.exists()]
        return [line for text in texts for line in text.splitlines()[-80:]]

    def steps(self, model: str) -> dict[int, int]:
        """Return the steps to train by rows a step."""
        table = STEPS.get(model, STEPS["14b"])
        return {rows: self.asked.steps or steps for rows, steps in table.items()}

    def larger(self, model: str) -> int:
        """Return the larger number of rows a step."""
        return max(self.steps(model))

    def exchange(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the sum of gradients."""
        rows = min(self.steps(row["model"]))
        found: dict[str, Any] = self.job(row, "exchange", sequences=rows, rows=2, steps=2)
        sent = 2 * found["gradient_bytes"] * (row["ranks"] - 1) / row["ranks"]
        return found | {"gb_per_second": sent / found["ms"] / 1e6}

    def train(self, row: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
        """Train, and compare with one rank."""
        steps = self.steps(row["model"])[row["rows"]]
        found: dict[str, Any] = self.job(
            row, "train", number, sequences=row["rows"], rows=steps, steps=steps
        )
        if number or row["part"] == "side":
            return found
        alone = self.alone(row)
        if alone and row["ranks"] > 1:
            found |= compared(found, alone, row["ranks"])
            name = f"{row['model']}, {row['rows']} rows a step, {row['ranks']} ranks"
            self.bars[f"{name}: losses within {MOST_LOSS_DRIFT:.1%} of one"] = (
                found["loss_drift"] <= MOST_LOSS_DRIFT
            )
            if self.gpus and (least := LEAST_SPEEDUP.get(row["ranks"])):
                self.bars[f"{name}: at least {least} x one"] = found["speedup"] >= least
        exchanges = [
            each["ms"]
            for each in self.rows
            if each["part"] == "exchange"
            and (each["model"], each["ranks"]) == (row["model"], row["ranks"])
            and each["status"] == "ok"
        ]
        if exchanges:
            found["exchange_share"] = exchanges[-1] / found["step_ms"]
        return found

    def offload(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Train with the plan of a search that holds nothing against offloading."""
        steps, alone = self.steps(row["model"])[row["rows"]], self.alone({**row, "part": "train"})
        given = {"sequences": row["rows"], "rows": steps, "steps": steps}
        found: dict[str, Any] = self.job(row, "train", **given, offload_overhead=1.0)
        own = alone["tokens_per_second"] if alone else None
        return found | {"plan_of_train": own}

    def tight(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Train in one process, and see how much of the budget the allocator cannot use."""
        steps = self.steps(row["model"])[row["rows"]]
        given = {"sequences": row["rows"], "rows": steps, "steps": steps}
        found: dict[str, Any] = self.job(row, "tight", **given, segment_mb=row["segment_mb"])
        return found

    def alone(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row of the same part on one rank; None if there is none."""
        names = ("part", "model", "rows", "models", "questions")
        same = [each for each in self.rows if all(each.get(n) == row.get(n) for n in names)]
        return next((each for each in same if each["ranks"] == 1 and each["status"] == "ok"), None)

    def kill(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Kill a rank twice, and see the run completed on those that are left."""
        rows = min(self.steps(row["model"]))
        found: dict[str, Any] = self.job(
            row, "kill", sequences=rows, rows=self.steps(row["model"])[rows]
        )
        ends = [each["end_seconds"] for each in found["attempts"] if "end_seconds" in each]
        self.bars[f"a killed rank ends its attempt within {MOST_END_SECONDS:g} s"] = (
            max(ends) <= MOST_END_SECONDS
        )
        self.bars["the run is completed on what is left"] = (
            len(found["attempts"][-1]["places"]) == row["ranks"] - 1
        )
        return found

    def compare_kill(self) -> None:
        """Compare the losses of the run whose rank was killed with those of one rank."""
        killed = next((each for each in self.rows if each["part"] == "kill"), {"status": ""})
        rows = min(self.steps(self.asked.models[0]))
        alone = killed["status"] == "ok" and self.alone({**killed, "part": "train", "rows": rows})
        if alone:
            pairs = list(zip(killed["losses"], alone["losses"], strict=False))
            killed["loss_drift"] = max(abs(mine / theirs - 1) for mine, theirs in pairs)
            name = f"the run with a killed rank: {len(pairs)} losses within {MOST_LOSS_DRIFT:.1%}"
            self.bars[name] = killed["loss_drift"] <= MOST_LOSS_DRIFT

    def exam(
        self, row: Mapping[str, Any], questions: int = 600, *, one_gpu: bool = False
    ) -> dict[str, Any]:
        """Compare an adapter with its base by the product's own stage, on all ranks."""
        tiny = row["model"] == TINY
        rows = min(self.steps(row["model"]))
        kind = {"part": "process", "take": 0} if one_gpu else {"part": "train"}
        trained = self.folder({**row, **kind, "rows": rows, "ranks": 1}) / "run"
        found: dict[str, Any] = self.job(
            row,
            "exam",
            trained=str(trained),
            questions=24 if tiny else questions,
            new_tokens=16 if tiny else 256,
            one_gpu=one_gpu,
        )
        if alone := self.alone(row):
            found["speedup"] = alone["answer_seconds"] / found["answer_seconds"]
            name = f"{row['model']}, {row['part']} on {row['ranks']} ranks"
            self.bars[f"{name}: the answers of one"] = found["digest"] == alone["digest"]
            if self.gpus and not one_gpu and row["ranks"] in LEAST_SPEEDUP:
                least = LEAST_SPEEDUP[row["ranks"]]
                self.bars[f"{name}: at least {least} x one"] = found["speedup"] >= least
        return found

    def answers(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Answer questions, dealt to the GPUs; the same answers must come as from one."""
        model, ranks = row["model"], row["ranks"]
        snapshot = self.models[model].result()["snapshot"]
        case = answer_case(model, row["models"], row["questions"])
        folders = [self.folder(row, number) for number in range(ranks)]
        found = answer(case, snapshot, folders, self.gpus[:ranks], self.limit_seconds)
        alone = self.alone(row)
        if alone:
            found["speedup"] = alone["answer_seconds"][0] / max(found["answer_seconds"])
            asked = f"{row['questions']} questions to {row['models']}"
            name = f"{model}, answers of {ranks} ranks, {asked}"
            self.bars[f"{name}: those of one"] = found["digest"] == alone["digest"]
            if self.gpus and ranks in LEAST_SPEEDUP:
                least = LEAST_SPEEDUP[ranks]
                self.bars[f"{name}: at least {least} x one"] = found["speedup"] >= least
        return found

    def side_by_side(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Train twice at once, on a GPU each."""
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda number: self.train(row, number), range(2)))
        speeds = [each["tokens_per_second"] for each in both]
        alone = self.alone({**row, "part": "train"})
        if alone is None:
            return {"tokens_per_second": speeds}
        shares = [speed / alone["tokens_per_second"] for speed in speeds]
        name = f"each of two runs at least {LEAST_SIDE_BY_SIDE:.0%} as fast as alone"
        self.bars[name] = min(shares) >= LEAST_SIDE_BY_SIDE
        return {"tokens_per_second": speeds, "share_of_alone": shares}


def compared(found: dict[str, Any], alone: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Return speed-up, efficiency and the largest relative difference of a step's loss."""
    speedup = found["tokens_per_second"] / alone["tokens_per_second"]
    pairs = zip(found["losses"], alone["losses"], strict=True)
    return {
        "speedup": speedup,
        "efficiency": speedup / ranks,
        "loss_drift": max(abs(mine / theirs - 1) for mine, theirs in pairs),
    }


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as one line, without what is long."""
    long = ("losses", "rates", "memory", "log", "sizes", "digest", "expected")
    shown = {name: _rounded(value) for name, value in row.items() if name not in long}
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(each) for each in value] if isinstance(value, list) else value
