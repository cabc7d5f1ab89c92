"""Settings that tests of the benchmarks share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads on two cores that others use too are slower than one, and bits depend on the number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
