"""Devices by name, whether or not this machine has them: `v5e:16x16`, `h100:256`, `cpu:8`."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from llm.errors import InputError

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
NAMES = "v5e:16x16, v5p:8x8x16, v6e:16x16, tpu7x:4x4x4, h100:8, cpu:8"
# XLA's GpuTargetConfigProto of an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
H100_NODE = 8  # cards of a host


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: all of them.
        target: the arguments of `llm.attention.target.compiling_for`; None for this machine's own.
        platform: what a program is lowered for.
        options: of the compiler.
    """

    name: str
    devices: list
    target: dict | None
    platform: str
    options: dict


def make(name: str) -> Topology:
    """The devices of `name`; call it before the first use of a device, and once in a process.

    Raises:
        InputError: no such topology, or its compiler is not installed.
    """
    kind, _, size = name.partition(":")
    if kind in TPUS:
        return _tpu(name)
    if kind not in ("h100", "cpu"):
        raise InputError(f"--topology={name}: there are {NAMES}")
    if not re.fullmatch(r"[1-9]\d{0,4}", size):
        raise InputError(f"--topology={name}: expected a number of devices, {kind}:8")
    return _h100(name, int(size)) if kind == "h100" else _cpu(name, int(size))


def _cpu(name: str, count: int) -> Topology:
    _only_the_host()
    jax.config.update("jax_num_cpu_devices", count)
    return Topology(name, jax.devices(), None, "cpu", {})


def _tpu(name: str) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--topology={name} needs the TPU compiler: pip install libtpu (no TPU, no account)")
    # Otherwise libtpu asks a server for a TPU, prints what it did not find, and wants to be alone on the machine.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    _only_the_host()
    _without_cache()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={name}: {str(error).splitlines()[0]}; there are {NAMES}") from None
    return Topology(name, devices, {"platform": "tpu", "kind": devices[0].device_kind}, "tpu", {})


def _h100(name: str, count: int) -> Topology:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise InputError(
            f"--topology={name} needs the CUDA compiler: pip install --no-deps jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 (no GPU needed)"
        )
    nodes, rest = divmod(count, H100_NODE)
    if count > H100_NODE and rest:
        raise InputError(f"--topology={name}: {count} cards are no whole nodes of {H100_NODE}")
    _only_the_host()
    _without_cache()
    shape = f"1x{nodes}x{H100_NODE}" if nodes else f"1x1x{count}"
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=shape).devices
    target = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "capability": "9.0", "cores": 132}
    return Topology(name, devices, target, "cuda", {"xla_gpu_autotune_level": 0})  # tuning would need the card


def _only_the_host() -> None:
    """A device that is there is left alone: a plan needs none."""
    jax.config.update("jax_platforms", "cpu")


def _without_cache() -> None:
    """A program for devices that are not there can be written to the cache of compiled ones, and not be read again."""
    jax.config.update("jax_enable_compilation_cache", False)
