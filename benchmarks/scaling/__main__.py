"""Several GPUs of one host beside one of them: training, answers, a lost rank, two runs at once.

    python -m benchmarks.scaling [--models 4b 14b] [--ranks 1 2 4 8] [--parts train answers ...]
                                 [--steps N] [--minutes 9] [--work DIR] [--out FILE]
    python -m benchmarks.scaling --predict

Random-init models of exact shapes, 13 GB a GPU, rows of up to 256 tokens, trained by the product's
workers. For each model, and for each number of ranks, the first of which is 1:

- `exchange`: the sum of an adapter's gradients alone: time, and memory that NCCL takes (the first
  model).
- `train`: 64 rows a step, the design's, and 256; tokens a second without the first steps, the
  peak of each rank and GPU, and the loss of each step beside that of one rank.
- `exam`: the inference stage of a run, 600 questions to base and adapter, dealt to the ranks.
- `answers`: the decoder alone, 600 questions of up to 256 new tokens to one model and to three,
  and 4,800 to one, dealt to the GPUs; and the steps that it needs, as the longest answer takes its
  time.
- `kill`: rank 0 is killed twice, and recovery ends the run on the others (the first model).
- `side`: two runs at once on disjoint GPUs, beside one alone (the first model).

Only if asked for, on one GPU:

- `shared`: one process beside one rank under torch's agent, in turn, and two ranks that share the
  GPU over gloo: losses, memory, answers, the exchange, and the efficiency to expect of several
  (the first model).
- `offload`: the trainings of `train` under the plans of a search that holds nothing against
  offloading.
- `tight`: the larger training, with the allocator's segments of two sizes: what of the budget it
  cannot use.

A part that fails leaves a row that says so, and the rest goes on; one that would not end within
`--minutes` is left out. Results are printed and written after each part.

Without GPUs the embedded model is trained in CPU processes, for correctness; then speeds say only
how busy the cores are. `--predict` prints the planner's expectation for several links.

Exits with 1 if a part failed, if a loss lies more than 0.5 % from that of one rank, if a process
is left, or if GPUs scale less than the bars: 1.9, 3.7 and 7.2 times one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import report, write_json
from benchmarks.scaling.campaign import ONLY_IF_ASKED, PARTS, Campaign
from benchmarks.scaling.prediction import predict
from benchmarks.speed.cases import TINY
from qwen3ft.machine.gpus import visible_gpus

RANKS = (1, 2, 4, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, *ONLY_IF_ASKED), default=PARTS)
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    gpus = [gpu.uuid for gpu in visible_gpus()]
    asked.models = asked.models or (["4b", "14b"] if gpus or asked.predict else [TINY])
    if asked.predict:
        return report({model: predict(model) for model in asked.models}, {}, asked.out)
    asked.ranks = asked.ranks or [size for size in RANKS if size <= (len(gpus) or RANKS[-1])]
    if asked.ranks[0] != 1 or (gpus and max(asked.ranks) > len(gpus)):
        parser.error(f"--ranks begins with 1, and this machine has {len(gpus)} GPUs")
    if not gpus:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast can put a shared host's GPUs out
    work = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-scaling-"))).resolve()
    campaign = Campaign(asked, work, gpus)
    with ThreadPoolExecutor(len(asked.models)) as pool:
        campaign.make_models(pool)
        campaign.run()
    campaign.compare_kill()
    if asked.work is None:
        shutil.rmtree(work, ignore_errors=True)
    predicted = {model: predict(model) for model in asked.models if model != TINY}
    result = {"rows": campaign.rows, "predicted": predicted}
    for bar, holds in campaign.bars.items():
        print(f"{'held  ' if holds else 'MISSED'} {bar}")
    if asked.out:
        write_json(asked.out, {"machine": campaign.machine, **result, "bars": campaign.bars})
    return 0 if all(campaign.bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
