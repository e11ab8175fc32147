"""Numbers in a run's newest checkpoint, changed: what a fault in memory or an overflow leaves."""

import json
import pathlib
import shutil

import numpy as np
import orbax.checkpoint as ocp

from llm.training.checkpoint import MANIFEST, Checkpoints


def poison(workdir: pathlib.Path, name: str, place: tuple[int, ...], value: float) -> int:
    """Sets one number of a parameter in the newest checkpoint, and makes the run unfinished; returns its step."""
    (workdir / "summary.json").unlink(missing_ok=True)
    folder = workdir / "checkpoints"
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    facts = json.loads((folder / str(step) / MANIFEST).read_text())["facts"]
    state = ocp.StandardCheckpointer().restore(folder / str(step) / "state")
    at = state["params"]
    *parents, last = name.split("/")
    for part in parents:
        at = at[part]
    changed = np.array(at[last])
    changed[place] = value
    at[last] = changed
    shutil.rmtree(folder / str(step))
    checkpoints = Checkpoints(folder, 10)
    checkpoints.save(step, state, **facts)
    checkpoints.wait()
    return step
