"""Preferences: the log-probabilities of pairs of answers, those of the run that a run starts from, and the scores.

What a preference is learned against is computed once, before the first step, and kept in the run's folder in
`reference.npz`: no second model is held, whatever the mesh, and a run that goes on compares with the very same numbers.
"""

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llm.data import Dataset, Mixture, Prepared
from llm.errors import InputError
from llm.evaluation.bootstrap import mean_interval
from llm.evaluation.perplexity import batches
from llm.models import Model
from llm.sharding import hosts
from llm.training import losses
from llm.training.step import put_batch

REFERENCE = "reference.npz"
SPLITS = ("train", "validation")


def compile_pairs(model: Model, loss_chunk: int | None) -> Callable[..., jax.Array]:
    """f(params, batch) -> (B, 2), jitted: the log-probabilities of the chosen and the rejected answer of each row."""
    return jax.jit(losses.pair_log_probabilities(model, loss_chunk))


def log_probabilities(
    pairs: Callable,
    params,
    dataset: Dataset | Mixture,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(those of the model, those that rows have as their reference), each float32 (pairs, 2), in order.

    Args:
        pairs: from `compile_pairs`.
        limit: so many rows, evenly spaced; None has all.
    """
    found, reference = [], []
    for batch, real in batches(dataset, batch_size, mesh, limit):
        found.append(hosts.fetch(pairs(params, put_batch(mesh, batch)))[:real])
        if "reference" in batch:
            reference.append(batch["reference"][:real])
        progress(real)
    return np.concatenate(found), np.concatenate(reference) if reference else None


def scores(log_probabilities_N2: np.ndarray, reference_N2: np.ndarray, beta: float) -> dict[str, Any]:
    """loss (without smoothing), accuracy, margin and rewards over all pairs, in float64."""
    rewards_N2 = beta * (log_probabilities_N2.astype(np.float64) - reference_N2)
    margins_N = rewards_N2[:, 0] - rewards_N2[:, 1]
    right_N = (margins_N > 0).astype(np.float64)
    return {
        "loss": float(np.logaddexp(0.0, -margins_N).mean()),
        "accuracy": float(right_N.mean()),
        "accuracy_interval": mean_interval(right_N),
        "margin": float(margins_N.mean()),
        "chosen_reward": float(rewards_N2[:, 0].mean()),
        "rejected_reward": float(rewards_N2[:, 1].mean()),
        "examples": len(margins_N),
    }


def with_reference(prepared: Prepared, tables: dict[str, np.ndarray]) -> Prepared:
    """The data with the log-probabilities of the start, by split."""
    return Prepared(
        prepared.tokenizer,
        prepared.train.with_reference(tables["train"]),
        prepared.validation.with_reference(tables["validation"]),
        prepared.report,
        prepared.fingerprint,
    )


def write_reference(workdir: pathlib.Path, tables: dict[str, np.ndarray], made_of: dict[str, str]) -> None:
    """Writes reference.npz, whole or not at all; `made_of` says of which data and start."""
    path = workdir / REFERENCE
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **tables, **{name: np.array(text) for name, text in made_of.items()})
    partial.replace(path)


def read_reference(workdir: pathlib.Path, prepared: Prepared) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """What `write_reference` wrote, (tables, made_of); None where nothing was.

    Raises:
        InputError: it cannot be read, or is of other data.
    """
    path = workdir / REFERENCE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tables = {split: arrays[split] for split in SPLITS}
            made_of = {name: str(arrays[name]) for name in arrays.files if name not in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): put back what it was, or begin a new folder") from None
    sizes = {"train": len(prepared.train), "validation": len(prepared.validation)}
    wrong = made_of.get("data") != prepared.fingerprint
    if wrong or any(tables[split].shape != (size, 2) for split, size in sizes.items()):
        raise InputError(f"{path} is of other data than {workdir} holds now: put those back, or begin a new folder")
    return tables, made_of
