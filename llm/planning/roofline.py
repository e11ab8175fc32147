"""The least time that a compiled step can take on published hardware: arithmetic, memory and network by their peaks."""

from typing import NamedTuple

from llm.devices import Device
from llm.planning.collectives import Collective
from llm.planning.program import Program

DAY = 86400.0


class Roofline(NamedTuple):
    """Seconds of a step by each of its limits, were the others free.

    Attributes:
        arithmetic: all operations at the peak, those that rematerialisation repeats included.
        memory: all bytes read and written at the peak.
        network: by mesh axes, all bytes sent at the bandwidth of one axis.
        model: the model's own operations at the peak, which MFU is a share of.
    """

    arithmetic: float
    memory: float
    network: dict[str, float]
    model: float

    @property
    def step(self) -> float:
        """Of a step in which all of them overlap."""
        return max(self.arithmetic, self.memory, *self.network.values())

    @property
    def mfu(self) -> float:
        """The most that the model's FLOPs utilisation can be."""
        return self.model / self.step


def roofline(program: Program, sent: list[Collective], moved: float, device: Device) -> Roofline:
    """The limits of a program's step.

    Args:
        program: the compiled step.
        sent: its collectives.
        moved: bytes read and written by one device.
        device: what the devices can do.
    """
    peak = len(program.topology.devices) * device.flops
    network: dict[str, float] = {}
    for one in sent:
        axes = "+".join(one.axes)
        network[axes] = network.get(axes, 0.0) + one.sent / bandwidth(one, device)
    return Roofline(program.executed / peak, moved / device.memory_bandwidth, network, program.flops / peak)


def bandwidth(one: Collective, device: Device) -> float:
    """Bytes a second that a device sends in a collective: the links of its node, or its share of those between nodes.

    A group with several devices in each node has the ports of all of them.
    """
    if device.node is None or len({place // device.node for place in one.group}) == 1:
        return device.link_bandwidth
    together = sum(place // device.node == one.group[0] // device.node for place in one.group)
    return min(device.link_bandwidth, together * device.node_bandwidth)
