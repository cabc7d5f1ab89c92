"""Answers per second of qwen3ft's decoder and of its peers, on one GPU.

    python -m benchmarks.answers --work DIR --out FILE --case 4b:13:256 [--case 4b:13:256:200:3]
        [--contestants all | ours,generate] [--shuffles 0] [--alone]

Each contestant has a fresh process: the same random-init model of an exact Qwen3 shape, quantised
once, two random adapters of rank 6, the same prompts of 40 to 140 tokens, and answers that end at
lengths drawn beforehand (lognormal, median half of the most, sigma 0.6). Peers answer the first
`--most-questions` only, with the first adapter. Agreement is the share of their answers that equal
ours token by token, as far as both go (continuous batching gives every answer the mean length); on
random weights near ties are common, so it says little there. vLLM answers where it is installed.
The shape `tiny` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.answers.cases import Case, parse_case
from benchmarks.jobs import JobFailedError, run_job
from benchmarks.machine import machine, write_json
from qwen3ft.machine.gpus import visible_gpus

CHILD, MAKER = "benchmarks.answers.contestants", "benchmarks.speed.contestants"
CONTESTANTS = ("ours", "generate", "continuous", "vllm")


def main() -> None:
    """Run the cases, write the results, print the table."""
    arguments = _arguments()
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    models: dict[str, dict[str, Any]] = {}
    work = arguments.work.resolve()
    for case in map(parse_case, arguments.case):
        if case.shape not in models:
            values = {"kind": "model", "shape": case.shape, "work": str(work), "seed": 0}
            prepared = run_job(MAKER, work / "prepare", values, 600)
            models[case.shape] = prepared["snapshot"]
        asked = CONTESTANTS if arguments.contestants == "all" else arguments.contestants.split(",")
        for contestant in asked:
            row = {"case": case.name, "contestant": contestant}
            row |= _run(case, contestant, models[case.shape], work, arguments)
            results["rows"].append(row)
            write_json(arguments.out, results)
            print(_line(row), flush=True)
    print(f"\n{results['machine']['date']}  {results['machine']['gpu'] or 'CPU'}")
    print(table(results["rows"]))


def _run(
    case: Case, contestant: str, snapshot: dict[str, Any], work: Path, arguments: Any
) -> dict[str, Any]:
    folder = work / "answers" / f"{case.name} {contestant}".replace(" ", "-").replace(",", "")
    names = ("shuffles", "alone", "slots", "resident", "batch", "most_questions")
    values = {
        "case": asdict(case),
        "contestant": contestant,
        "snapshot": snapshot,
        "seed": 0,
        **{name: getattr(arguments, name) for name in names},
    }
    if contestant == "vllm" and find_spec("vllm") is None:
        return {"status": "not installed"}
    if contestant == "continuous" and not visible_gpus():
        return {"status": "needs a GPU"}  # on a CPU its cache takes all of the memory
    try:
        row = {"status": "ok", **run_job(CHILD, folder, values, arguments.timeout)}
    except JobFailedError as error:
        return {"status": error.status, "detail": error.detail}
    ours = folder.with_name(folder.name.removesuffix(contestant) + "ours") / "answers.json"
    if contestant != "ours" and ours.exists():
        theirs = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        mine = json.loads(ours.read_text(encoding="utf-8"))
        row["agreement"] = agreement(mine, theirs)
    return row


def agreement(mine: list[list[int]], theirs: list[list[int]]) -> float:
    """Return the share of `theirs` that equal ours, as far as both go."""
    pairs = zip(mine, theirs, strict=False)  # peers answer the first questions alone
    same = [all(a == b for a, b in zip(*pair, strict=False)) for pair in pairs]
    return sum(same) / len(same)


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line for each row, aligned."""
    head = ("case", "contestant", "tokens/s", "first s", "NVML GB", "agreement")
    lines = [head]
    for row in rows:
        if row["status"] != "ok":
            lines.append((row["case"], row["contestant"], row["status"], "", "", ""))
            continue
        first, nvml, same = (
            row.get(name) for name in ("first_tokens_seconds", "nvml_gb", "agreement")
        )
        lines.append(
            (
                row["case"],
                row["contestant"],
                f"{row['tokens_per_second']:,.0f}",
                "" if first is None else f"{first:.2f}",
                "" if nvml is None else f"{nvml:.2f}",
                "" if same is None else f"{same:.0%}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['case']}: {row['contestant']} {row['status']} {row.get('detail', '')}"
    extras = {
        name: row[name]
        for name in ("sizes", "step_ms", "alone", "same_when_shuffled", "agreement", "reserved_gb")
        if row.get(name) is not None
    }
    first = row["first_tokens_seconds"]
    return (
        f"{row['case']}: {row['contestant']} {row['tokens_per_second']:,.0f} tok/s, "
        f"{row['seconds']:.1f} s, first {first or 0:.2f} s, NVML {row['nvml_gb'] or 0:.2f} GB, "
        f"prepared in {row.get('prepare_seconds', 0):.1f} s {extras}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", required=True)
    parser.add_argument("--contestants", default="ours")
    parser.add_argument("--shuffles", type=int, default=0)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--no-resident", dest="resident", action="store_false")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--most-questions", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
