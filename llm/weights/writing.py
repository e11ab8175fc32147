"""Writing safetensors, a tensor at a time."""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from llm.weights.sources import Tensor


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors in float32, each read when its turn comes: the header needs their shapes alone.

    The format (https://github.com/huggingface/safetensors): the length of the header as eight bytes, the header as
    JSON, padded by spaces so that the numbers begin at a multiple of eight, then the numbers, little-endian.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read(), "<f4").data)
