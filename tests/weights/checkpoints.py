"""Reading the golden checkpoints: what the importer makes of them, and what the model computes.

`python -m tests.weights.checkpoints FOLDER` writes them out again, for `tests/goldens/weights.py --check`.
"""

import json
import pathlib
import sys

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm import models, weights
from llm.training.state import Recipe
from tests.helpers import ROOT

GOLDENS = ROOT / "tests" / "goldens" / "weights"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))


def read(path: pathlib.Path, change=lambda imported: imported, tensors=lambda tensors: tensors):
    """(what it is, the model, its parameters); `change` and `tensors` may spoil what is read."""
    source = weights.open_source(str(path))
    imported = change(weights.identify(source))
    model = models.build(imported.spec)
    recipe = Recipe(model, optax.identity(), imported.objective)
    target = jax.eval_shape(lambda: recipe.create(unbox=nn.unbox).params)
    shapes = {name: x.shape for name, x in flax.traverse_util.flatten_dict(target, sep="/").items()}
    table = weights.table_of(imported.spec, imported.objective, source.interleaved)
    loaded = weights.load(table, tensors(source.tensors), shapes)
    fresh = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in loaded.arrays}
    params = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict({**loaded.arrays, **fresh}, sep="/"))
    return imported, model, params


def outputs(imported, model, params, given) -> dict[str, np.ndarray]:
    """What the model computes, by the names of the goldens."""

    def apply(*args, **how):
        return model.apply({"params": params}, *args, **how)

    batch = {"tokens": jnp.asarray(given["input_ids"])}
    if imported.family in ("encdec", "t5"):
        real = jnp.asarray(given["attention_mask"], jnp.int32)
        batch = {"tokens": jnp.asarray(given["decoder_input_ids"]), "source_tokens": batch["tokens"]}
        batch["source_segments"] = real
    if "token_type_ids" in given:
        batch["types"] = jnp.asarray(given["token_type_ids"])
    hidden = jax.jit(lambda batch: apply(batch).hidden_BTD)(batch)
    if imported.objective == "contrastive":
        return {"last_hidden_state": hidden, "sentence": apply(hidden, batch, method="sentence")}
    if imported.objective == "classification":
        return {"logits": apply(hidden, batch, method="classify")}
    if imported.objective == "span_qa":
        return dict(zip(("start_logits", "end_logits"), apply(hidden, method="spans")))
    if imported.objective == "masked":
        next_sentence = apply(hidden, batch, method="next_sentence")[:, ::-1]
        logits = apply(hidden, method="unembed")
        return {"logits": logits, "prediction_logits": logits, "seq_relationship_logits": next_sentence}
    return {"logits": apply(hidden, method="unembed")}


def missing_heads(name: str) -> tuple[str, ...]:
    """The heads that a golden lacks."""
    return ("pooler", "next sentence") if name == "bert-masked" else ()


def export(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, tensors) that we write of a golden."""
    imported, _, params = read(GOLDENS / name)
    missing = missing_heads(name)
    flat = {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}
    table = weights.table_of(imported.spec, imported.objective).without(missing)
    pad = 0 if imported.family == "bert" else 258
    ends = imported.ends or (256,)
    config = weights.their_config(imported.spec, imported.objective, imported.labels, pad, ends, missing)
    shapes = {path: x.shape for path, x in flat.items()}
    tensors = weights.tensors_of(table, shapes, flat.__getitem__, bare=imported.objective == "contrastive")
    return config, {name: tensor.read() for name, tensor in tensors.items()}


def main(folder: pathlib.Path) -> None:
    """Writes all of them."""
    from safetensors.numpy import save_file

    for name in NAMES:
        config, tensors = export(name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))


def error(name: str, **spoilt) -> float:
    """The largest difference between a golden's outputs and ours."""
    given = dict(np.load(GOLDENS / name / "expected.npz"))
    found = outputs(*read(GOLDENS / name, **spoilt), given)
    compared = [key for key in found if key in given]
    assert compared, given.keys()
    return max(float(np.abs(np.asarray(found[key]) - given[key]).max()) for key in compared)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
