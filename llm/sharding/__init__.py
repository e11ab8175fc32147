"""The device mesh, and the table that says which logical axis of an array lies on which of its axes."""

from llm.sharding.attention import attention
from llm.sharding.mesh import batch_shards, make_mesh, request_cpu_devices
from llm.sharding.rules import RULES, constrain, partition_spec
from llm.sharding.spec import AXES, MeshSpec

__all__ = [
    "AXES",
    "RULES",
    "MeshSpec",
    "attention",
    "batch_shards",
    "constrain",
    "make_mesh",
    "partition_spec",
    "request_cpu_devices",
]
