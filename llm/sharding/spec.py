"""The settings of the device mesh."""

import dataclasses
import math

from llm.errors import InputError

AXES = ("data", "fsdp", "tensor", "context", "expert")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes and, on CPU, the number of devices.

    Attributes:
        cpu_devices: devices that a CPU is split into. Part of the config because it changes the bits of a sum.
        data: splits the rows of a batch; parameters are whole on every device.
        fsdp: splits rows, and parameters along their width.
        tensor: splits heads, the hidden layers of MLPs, gates and vocabularies.
        context: splits the places of a row.
        expert: splits rows, and the experts of a mixture.

    At most one size is -1 and takes what is left.
    """

    cpu_devices: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self):
        if self.cpu_devices < 1:
            raise InputError(f"mesh.cpu_devices={self.cpu_devices}: must be at least 1")
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise InputError(f"mesh.{axis}={size}: must be at least 1, or -1 for what is left")
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            raise InputError("mesh: only one axis may be -1")

    def shape(self, devices: int) -> tuple[int, ...]:
        """The mesh's shape over a number of devices, in the order of AXES.

        Raises:
            InputError: the sizes do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        left = devices // math.prod(size for size in sizes if size != -1)
        filled = tuple(left if size == -1 else size for size in sizes)
        if math.prod(filled) != devices:
            wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
            raise InputError(f"mesh: {wanted} does not fit {devices} devices")
        return filled
