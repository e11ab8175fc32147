"""`llm.train` with faults in what it reads: `python -m tests.training.faulty FAULTS ARGUMENTS`.

FAULTS is JSON, {"sleep": [STEP, SECONDS], "short": STEP, "nan": STEP}: batches by the step from 1 that reads them, one
that comes late, one that lacks half of its rows, and one whose weights are not numbers.
"""

import json
import sys
import time

import numpy as np

from llm import cli, train
from llm.training import loop

FAULTS = json.loads(sys.argv.pop(1))
good = loop.batch_at


def batch_at(dataset, seed, step, *arguments):
    """The batch of a step, with its fault."""
    batch = good(dataset, seed, step, *arguments)
    if "sleep" in FAULTS and step + 1 == FAULTS["sleep"][0]:
        time.sleep(FAULTS["sleep"][1])
    if step + 1 == FAULTS.get("short"):
        batch = {name: x[: len(x) // 2] for name, x in batch.items()}
    if step + 1 == FAULTS.get("nan"):
        batch["weights"] = np.full_like(batch["weights"], np.nan)
    return batch


loop.batch_at = batch_at
cli.run(train.main)
