"""`llm.train` with faults in what it reads: `python -m tests.training.faulty FAULTS ARGUMENTS`.

FAULTS is JSON, {"late": [STEP, FILE], "short": STEP, "nan": STEP}: batches by the step from 1 that reads them, one that
comes once a file is there, one whose rows are half as long, and one whose weights are not numbers.
"""

import json
import pathlib
import sys
import time

import numpy as np

from llm import cli, train
from llm.sharding import hosts
from llm.training import loop

FAULTS = json.loads(sys.argv.pop(1))
good = loop.batch_at


def batch_at(dataset, seed, step, *arguments):
    """The batch of a step, with its fault."""
    batch = good(dataset, seed, step, *arguments)
    while step + 1 == FAULTS["late"][0] and not pathlib.Path(FAULTS["late"][1]).exists():
        time.sleep(0.1)
    if step + 1 == FAULTS["short"]:
        batch = {name: x[:, : x.shape[1] // 2] for name, x in batch.items()}
    if step + 1 == FAULTS["nan"]:
        batch["weights"] = np.full_like(batch["weights"], np.nan)
    return batch


loop.batch_at = batch_at
cli.run(train.main, hosts.leave)
