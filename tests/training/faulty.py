"""`llm.train` with faults in what it reads and writes: `python -m tests.training.faulty FAULTS ARGUMENTS`.

FAULTS is JSON, {"late": [STEP, FILE], "short": STEP, "nan": STEP, "slow": STEP, "last": [STEP, FILE]}: batches by the
step from 1 that reads them, one that comes once a file is there, one whose rows are half as long, and one whose weights
are not numbers; and two saves, one that is complete only after a later row was logged, which it tells in
`while-saving.txt`, and one that is complete once a file is there. Where something is late, what has no
median hangs after a second.
"""

import json
import pathlib
import sys
import time

import numpy as np

from llm import cli, train
from llm.sharding import hosts
from llm.training import loop, metrics, watch
from llm.training.checkpoint import Checkpoints

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


write = Checkpoints._commit


def commit(self, step, arrays, facts):
    """Completes the save of a step, late where it is one of the faults."""
    workdir, deadline = self._folder.parent, time.time() + 100
    last = step
    while step == FAULTS["slow"] and last <= step and time.time() < deadline:
        time.sleep(0.01)
        last = max(row["step"] for row in metrics.read(workdir))
        (workdir / "while-saving.txt").write_text(str(last))
    while step == FAULTS["last"][0] and not pathlib.Path(FAULTS["last"][1]).exists() and time.time() < deadline:
        time.sleep(0.1)
    write(self, step, arrays, facts)


loop.batch_at = batch_at
Checkpoints._commit = commit
if FAULTS["late"][0] or FAULTS["last"][0]:
    watch.FIRST_SECONDS = 1.0
cli.run(train.main, hosts.leave)
