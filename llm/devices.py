"""What accelerators can do, from their published data sheets: what MFU is a share of, and what a plan reckons with."""

from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """One device as JAX counts them: a chip, or half of a TPU7x, which shows its two halves as two devices.

    Attributes:
        name: what people call it.
        flops: peak bfloat16 floating-point operations a second, without sparsity.
        memory: bytes of high-bandwidth memory.
        memory_bandwidth: bytes a second between that memory and the chip.
        link_bandwidth: bytes a second that it sends along one axis of a mesh: of a TPU both directions of one axis of
            the torus, of a GPU all NVLinks.
        node: devices that those links join; None where they join all of a topology.
        node_bandwidth: bytes a second that it sends to other nodes.
        source: where the figures stand.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    node: int | None
    node_bandwidth: float
    source: str


def _tpu(name: str, flops: float, gib: float, bandwidth: float, interconnect: float, axes: int, page: str) -> Device:
    """A TPU from its page, which gives the interconnect in both directions together, over all axes of the torus."""
    link = interconnect / 2 / axes
    return Device(name, flops, gib * GIB, bandwidth, link, None, link, f"cloud.google.com/tpu/docs/{page}")


# By JAX's `device_kind`.
DEVICES: dict[str, Device] = {
    "TPU v5 lite": _tpu("TPU v5e", 197e12, 16, 819e9, 400e9, 2, "v5e"),
    "TPU v5": _tpu("TPU v5p", 459e12, 95, 2765e9, 1200e9, 3, "v5p"),
    "TPU v6 lite": _tpu("TPU v6e", 918e12, 32, 1640e9, 800e9, 2, "v6e"),
    # A chip has 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, and 1,200 GB/s of interconnect.
    "TPU7x": _tpu("half a TPU7x", 2307e12 / 2, 96, 7380e9 / 2, 600e9, 3, "tpu7x"),
    # The SXM card: dense bfloat16; NVLink 900 GB/s in both directions together; one NDR InfiniBand port (400 Gb/s) a
    # card, as a DGX H100 has.
    "NVIDIA H100 80GB HBM3": Device(
        "H100 SXM", 989e12, 80e9, 3350e9, 450e9, 8, 50e9, "nvidia.com/en-us/data-center/h100, DGX H100 data sheet"
    ),
}  # fmt: skip


def published(kind: str) -> Device | None:
    """The data sheet of a device by its `device_kind`; None where there is none here."""
    return DEVICES.get(kind)
