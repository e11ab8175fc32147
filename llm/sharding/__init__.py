"""The device mesh, and the table that says which logical axis of an array lies on which of its axes."""

from llm.sharding.attention import attention
from llm.sharding.mesh import batch_shards, check_length, make_mesh, request_cpu_devices
from llm.sharding.rules import ACTIVATIONS, RULES, constrain, free_axes, mesh_axes, partition_spec, split
from llm.sharding.spec import AXES, MeshSpec

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "RULES",
    "MeshSpec",
    "attention",
    "batch_shards",
    "check_length",
    "constrain",
    "free_axes",
    "make_mesh",
    "mesh_axes",
    "partition_spec",
    "request_cpu_devices",
    "split",
]
