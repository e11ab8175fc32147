"""Writing safetensors, a tensor at a time, in one file or in parts with their index."""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from llm.weights.sources import Tensor

# The most bytes of a file that holds several tensors: a whole above it is written in parts.
PART_BYTES = 5 * 10**9


def write_checkpoint(folder: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes model.safetensors, or its parts and the index that says which tensor lies in which."""
    parts: list[dict[str, Tensor]] = [{}]
    left = PART_BYTES
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if parts[-1] and size > left:
            parts.append({})
            left = PART_BYTES
        parts[-1][name] = tensor
        left -= size
    if len(parts) == 1:
        return write_safetensors(folder / "model.safetensors", tensors)
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return 4 * math.prod(tensor.shape)


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors in float32, each read when its turn comes: the header needs their shapes alone.

    The format (https://github.com/huggingface/safetensors): the length of the header as eight bytes, the header as
    JSON, padded by spaces so that the numbers begin at a multiple of eight, then the numbers, little-endian.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read(), "<f4").data)
