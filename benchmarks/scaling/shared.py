"""Ranks on one GPU: what the elastic agent costs, and two ranks that share the card over gloo.

NCCL refuses two ranks on one GPU, and the product's plans give each its own. So the plan is one for
two such GPUs, and both places are made the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.scaling.campaign import Campaign

MOST_AGENT_COST = 0.01
MOST_LOSS_DRIFT = 0.005
STEPS, QUESTIONS, SHARING_RANKS, MOST_PAIRS = 50, 100, 2, 5


def run_shared(campaign: Campaign, model: str) -> None:
    """Run what the bars need, then further pairs with and without the agent while there is time."""
    shared = _Shared(campaign, model)
    shared.train("process", take=0)
    shared.train("agent", take=0)
    shared.compare_agent()
    shared.train("sharing", ranks=SHARING_RANKS)
    for ranks in (1, SHARING_RANKS):
        shared.answer(ranks)
    for take in range(1, MOST_PAIRS):
        # The order alternates, as a GPU may grow slower with its temperature.
        for part in ("agent", "process") if take % 2 else ("process", "agent"):
            if time.monotonic() + shared.longest_seconds > campaign.end:
                return
            shared.train(part, take=take)
        shared.compare_agent()


class _Shared:
    def __init__(self, campaign: Campaign, model: str) -> None:
        self.campaign, self.model = campaign, model
        self.rows = min(campaign.steps(model))
        self.steps = campaign.asked.steps or STEPS

    @property
    def longest_seconds(self) -> float:
        """Longest time of a training in one process."""
        return max((float(each["seconds"]) for each in self.takes("process", "agent")), default=0)

    def takes(self, *parts: str) -> list[dict[str, Any]]:
        """Return the rows of these parts that ended well."""
        rows = self.campaign.rows
        return [each for each in rows if each["part"] in parts and each["status"] == "ok"]

    def train(self, part: str, ranks: int = 1, **more: Any) -> None:
        """Train by one process, by one rank under the agent, or by ranks that share a GPU."""
        self.campaign.part(part, self.model, ranks, self._train, rows=self.rows, **more)

    def _train(self, row: Mapping[str, Any]) -> dict[str, Any]:
        alone, sharing = self.takes("process"), row["part"] == "sharing"
        found: dict[str, Any] = self.campaign.job(
            row,
            "train",
            sequences=self.rows,
            rows=self.steps,
            steps=self.steps,
            one_gpu=True,
            by_agent=row["part"] != "process",
            alone_step_ms=alone[0]["step_ms"] if alone and sharing else None,
        )
        if sharing:
            self.compare_sharing(found)
        return found

    def compare_agent(self) -> None:
        """Compare the least time of each step under the agent with that in one process."""
        agent, process = self.takes("agent"), self.takes("process")
        takes = min(len(agent), len(process))
        if not takes:
            return
        times = (_least_seconds(agent[:takes]), _least_seconds(process[:takes]))
        pairs = list(zip(*times, strict=True))
        newest = agent[takes - 1]
        newest["agent_cost"] = sum(mine for mine, _ in pairs) / sum(own for _, own in pairs) - 1
        newest["agent_cost_median"] = statistics.median(mine / own - 1 for mine, own in pairs)
        newest["loss_drift"] = _drift(newest, process[0])
        print(f"the agent's cost after {takes} pairs: {newest['agent_cost']:+.2%}", flush=True)
        if self.campaign.gpus:
            name = f"{self.model}: a step of one rank under the agent costs at most 1 % more"
            self.campaign.bars[name] = newest["agent_cost"] <= MOST_AGENT_COST

    def compare_sharing(self, found: dict[str, Any]) -> None:
        """Compare two ranks on one GPU with one process; the exchange is that of the last rank."""
        bars, ranks = self.campaign.bars, SHARING_RANKS
        found["exchange_share"] = min(found["exchange_ms"]) / found["step_ms"]
        print(*found["expected"], sep="\n")
        process = self.takes("process")
        if process:
            found["loss_drift"] = _drift(found, process[0])
            name = f"{self.model}: losses of {ranks} ranks on one GPU within {MOST_LOSS_DRIFT:.1%}"
            bars[name] = found["loss_drift"] <= MOST_LOSS_DRIFT
        self.check_budget("training", found)

    def check_budget(self, what: str, found: Mapping[str, Any]) -> None:
        """Have each rank within its budget: by NVML's list, or else by their own numbers."""
        if self.campaign.gpus:
            listed = [peak for peak in found["nvml_process_gb"] if peak]
            has_all = len(listed) >= SHARING_RANKS
            source = "NVML's list" if has_all else "the ranks' own numbers"
            peaks = listed if has_all else found["peak_gb"]
            name = (
                f"{self.model}, {what}: each of {SHARING_RANKS} ranks within its budget by {source}"
            )
            self.campaign.bars[name] = max(peaks) <= found["budget_gb"]

    def answer(self, ranks: int) -> None:
        """Compare an adapter with its base as the inference stage does, on one GPU."""
        self.campaign.part("sharing answers", self.model, ranks, self._answer)

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = self.campaign.exam(row, questions=QUESTIONS, one_gpu=True)
        if row["ranks"] > 1:
            self.check_budget("answers", found)
        return found


def _least_seconds(takes: list[dict[str, Any]]) -> list[float]:
    """Return the least seconds per token of each step, which other work disturbs least."""
    steps = zip(*(each["rates"] for each in takes), strict=True)
    return [1 / max(rate or 0.0 for rate in rates) for rates in steps]


def _drift(found: Mapping[str, Any], alone: Mapping[str, Any]) -> float:
    """Return the largest relative difference of a step's loss."""
    pairs = zip(found["losses"], alone["losses"], strict=True)
    return max(abs(mine / theirs - 1) for mine, theirs in pairs)
