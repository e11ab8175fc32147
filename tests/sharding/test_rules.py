"""The table of logical axes: it covers every array of every family and nothing else, and bad meshes are refused."""

import ast
import dataclasses

import flax.linen as nn
import jax
import optax
import pytest

from llm import models, sharding
from llm.errors import InputError
from llm.sharding import AXES, RULES, MeshSpec
from llm.training.adapters import Adapters
from llm.training.state import Recipe, check_mesh, rule_table
from tests.conformance import families as table
from tests.conformance.families import ROWS
from tests.helpers import ROOT

FAMILIES = ("rnn lstm", "classifier", "encdec pre-norm", "bert", "gpt2", "mixture", "t5 1.0")


def logical_axes(name: str) -> set[str]:
    """The logical axes of all parameters of a row of the families' table."""
    row = ROWS[name]
    small = {key: x[:1, :1] for key, x in table.batch(row).items()}
    model = models.build(row.spec)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), small, method=table.everything(row)))["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes), name
    return {axis for box in boxes for axis in box.names}


def constrained() -> set[str]:
    """The logical axes that activations are constrained by, read from the source."""
    found = set()
    for path in (ROOT / "llm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "constrain":
                found |= {axis.value for axis in node.args[1:] if isinstance(axis, ast.Constant)}
    return found


def test_rules_cover_every_family_and_each_rule_covers_something():
    assert {type(ROWS[name].spec) for name in FAMILIES} == {family.spec for family in models.FAMILIES.values()}
    adapted = Recipe(models.build(ROWS["llama"].spec), optax.identity(), adapters=Adapters(2, 1.0, ("attention",)))
    boxes = jax.tree.leaves(adapted.boxed().params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    adapters = {axis for box in boxes for axis in box.names}
    assert set().union(constrained(), adapters, *map(logical_axes, FAMILIES)) == set(RULES)
    assert {axis for rule in RULES.values() for axis in sharding.mesh_axes(rule)} == set(AXES)


def test_the_table_of_rules_names_what_each_covers():
    spec = ROWS["mixture"].spec
    lines = {
        line.split()[0]: line.split(maxsplit=2)[1:]
        for line in rule_table(Recipe(models.build(spec), optax.identity())).splitlines()
    }
    moe = "stack/layers/moe"
    assert lines["experts"] == ["expert", f"{moe}/down, {moe}/gate, {moe}/router, {moe}/up"]
    assert lines["batch"] == ["data+fsdp+expert", "activations"]
    assert lines["gates"] == ["tensor", "no parameter of this model"]


def mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("mixture", dict(expert=3), "stack/layers/moe/down has 4 along its experts axis, which the 3 parts of expert"),
        ("mixture", dict(tensor=2), "1 along its kv_heads axis, which the 2 parts of tensor"),
        ("llama", dict(fsdp=3), "16 along its embed axis"),
        ("llama", dict(expert=2), "mesh.expert=2: this model has no experts"),
        ("rnn lstm", dict(context=2), "mesh.context=2: this model has no heads"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_refused(name, sizes, message):
    spec = dataclasses.replace(ROWS[name].spec, vocab_size=60)
    recipe = Recipe(models.build(spec), optax.identity())
    check_mesh(recipe, mesh(data=8))
    with pytest.raises(InputError, match=message):
        check_mesh(recipe, mesh(**sizes))


def test_rows_are_shared_by_all_axes_but_tensor_and_context():
    assert sharding.batch_shards(mesh(data=2, fsdp=3, tensor=5, context=7, expert=11)) == 66
    assert MeshSpec(expert=2, context=2).shape(8) == (2, 1, 1, 2, 2)
    sharding.check_length(8, mesh(context=4))
    with pytest.raises(InputError, match="data.row_length=12 is not a multiple of 8"):
        sharding.check_length(12, mesh(context=4))
