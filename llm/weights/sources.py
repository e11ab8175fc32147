"""Opening checkpoints of others: what config and tensors a folder or file holds, each tensor read when it is wanted."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llm.errors import InputError
from llm.weights.torch_pickle import TorchFile

READABLE = "model.safetensors, pytorch_model.bin (one file, or parts and their index), *.gguf"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
# Of safetensors. What is not a float is no weight.
_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """A tensor of a checkpoint: its shape, and `read()`, which gives its numbers in float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Source(NamedTuple):
    """A checkpoint of others.

    Attributes:
        path: the file or folder.
        config: its config.json; what a GGUF says of itself, in the same words.
        tensors: by name.
        interleaved: rotary features are paired (0, 1), (2, 3), ... as in GGUF's Llamas, not (0, H/2), ...
        tokenizer: the file or folder that its tokenizer is read from; None where none was found.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    interleaved: bool
    tokenizer: pathlib.Path | None

    @property
    def folder(self) -> pathlib.Path:
        """The folder of its other files."""
        return self.path if self.path.is_dir() else self.path.parent


def open_source(name: str) -> Source:
    """Opens a folder of Hugging Face's, a .safetensors or torch file beside its config.json, or a .gguf.

    Raises:
        InputError: nothing there that can be read, or a damaged file.
    """
    path = pathlib.Path(name)
    if not path.exists():
        raise InputError(f"--from={name}: there is no such file or folder")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        files = _in_folder(path)
        if not files and len(ggufs) == 1:
            path, files = ggufs[0], []
        elif not files:
            found = f"{len(ggufs)} .gguf files; name one of them" if ggufs else "no weights"
            raise InputError(f"--from={name}: {found}; what can be read: {READABLE}")
    else:
        files = [path]
    if path.suffix == ".gguf":
        from llm.weights import gguf_file

        config, tensors, interleaved = gguf_file.read(path)
        return Source(path, config, tensors, interleaved, path)
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in _file(file).items():
            if key in tensors:
                raise InputError(f"{file}: {key} stands in another part too")
            tensors[key] = tensor
    return Source(path, config, tensors, False, folder)


def _in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights, safetensors before pickles; a part that the index names must be there."""
    for name in _WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            listed = _json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise InputError(f"{index}: expected an object weight_map, which names the part of each tensor")
            parts = sorted(set(map(str, listed.values())))
            missing = [part for part in parts if not (folder / str(part)).is_file()]
            if not parts or missing:
                raise InputError(f"{index} names {', '.join(missing) or 'no parts'}: fetch the whole checkpoint")
            return [folder / str(part) for part in parts]
    return []


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it says what the weights are the weights of") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object")
    return value


def _file(path: pathlib.Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _torch(path)
    raise InputError(f"{path}: a format that is not known; what can be read: {READABLE}")


def _safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None

    def tensor(name: str) -> Tensor:
        part = file.get_slice(name)
        kind = part.get_dtype()

        def read() -> np.ndarray:
            if kind not in _FLOATS:
                raise InputError(f"{path}, {name}: numbers of type {kind} are no weights that can be read")
            # Opened for each: what is mapped stays in memory as long as the file is open.
            with safe_open(path, framework="numpy") as again:
                return np.asarray(again.get_tensor(name), np.float32)

        return Tensor(tuple(part.get_shape()), read)

    return {name: tensor(name) for name in names}


def _torch(path: pathlib.Path) -> dict[str, Tensor]:
    file = TorchFile(path)

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(file.read(name), np.float32)

    return {name: Tensor(stored.shape, reader(name)) for name, stored in file.stored.items()}
