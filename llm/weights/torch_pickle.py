"""Tensors in a file of torch.save, read without torch and without running what the file asks for.

A pickle is a program. This one may build dictionaries, lists, numbers, texts and tensors; whatever else it names is
refused before it is looked up, so a file with code in it is an error that says which.
"""

import collections
import pathlib
import pickle
import zipfile
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from llm.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip archives
_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip


class Storage(NamedTuple):
    """A run of numbers in the file: its key, and the name of its type there."""

    key: str
    kind: str


class Stored(NamedTuple):
    """Where a tensor's numbers lie: in a storage, from `offset` on, with a shape and the strides of its axes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The type of the numbers."""
        return storage_dtype(self.storage.kind)

    def of(self, data: np.ndarray) -> np.ndarray:
        """The tensor, a view of its storage's numbers where that is possible.

        Raises:
            InputError: it reaches beyond them.
        """
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        if 0 in self.shape:
            return np.zeros(self.shape, data.dtype)
        if self.offset < 0 or min((*self.strides, 0)) < 0 or last >= data.size:
            raise InputError(f"a tensor of shape {self.shape} reaches beyond the {data.size} numbers of its storage")
        bytes_each = data.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, tuple(s * bytes_each for s in self.strides), writeable=False
        )


def storage_dtype(kind: str) -> np.dtype:
    """The numpy type of a storage's kind."""
    if kind == "BFloat16Storage":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_DTYPES[kind])


def _tensor(storage, offset, size, stride, *_) -> Stored:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return Stored(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    **{("torch", kind): kind for kind in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and `Stored`; refuses every other name. `kinds` are those of all storages, by key."""

    def __init__(self, file: BinaryIO | IO[bytes]):
        super().__init__(file)
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor; nothing of it was run")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and pid[1] in _DTYPES):
            raise pickle.UnpicklingError(f"an unknown kind of storage, {str(pid)[:80]}")
        self.kinds[str(pid[2])] = pid[1]
        return Storage(str(pid[2]), pid[1])


class TorchFile:
    """The tensors of one file: `stored` by name, read one at a time.

    Raises:
        InputError: no file of torch.save, a damaged one, or one with anything but tensors in it.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        try:
            if zipfile.is_zipfile(path):
                self._zip = zipfile.ZipFile(path)
                pickled = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
                if len(pickled) != 1:
                    raise InputError(f"{path}: a zip archive without one data.pkl: no file of torch.save")
                self._folder = pickled[0].removesuffix("data.pkl")
                order = f"{self._folder}byteorder"
                if order in self._zip.namelist() and self._zip.read(order) != b"little":
                    raise InputError(f"{path}: its numbers are big-endian; save it on another machine")
                with self._zip.open(pickled[0]) as file:
                    found = _Unpickler(file).load()
            else:
                with path.open("rb") as file:
                    found = self._legacy(file)
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError,
                zipfile.BadZipFile, UnicodeDecodeError) as error:  # fmt: skip
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read as tensors: {error}") from None
        self.stored: dict[str, Stored] = _tensors(found, path)

    def _legacy(self, file: BinaryIO) -> Any:
        """The format before the archives: five pickles, then the storages one after the other."""
        if _Unpickler(file).load() != _MAGIC or _Unpickler(file).load() != _PROTOCOL:
            raise InputError(f"{self._path} is no file of torch.save")
        _Unpickler(file).load()  # byte order and sizes of the machine that wrote it
        unpickler = _Unpickler(file)
        found = unpickler.load()
        keys = _Unpickler(file).load()
        self._starts: dict[str, int] = {}
        place = file.tell()
        for key in keys:
            file.seek(place)
            count = int.from_bytes(file.read(8), "little")
            self._starts[str(key)] = place
            place += 8 + count * storage_dtype(unpickler.kinds[str(key)]).itemsize
        if place > self._path.stat().st_size:
            raise InputError(f"{self._path} is cut off: it has fewer bytes than its tensors")
        return found

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor.

        Raises:
            InputError: they are not all there.
        """
        stored = self.stored[name]
        dtype = stored.dtype
        try:
            if self._zip is not None:
                data = np.frombuffer(self._zip.read(f"{self._folder}data/{stored.storage.key}"), dtype)
            else:
                with self._path.open("rb") as file:
                    file.seek(self._starts[stored.storage.key])
                    count = int.from_bytes(file.read(8), "little")
                    data = np.frombuffer(file.read(count * dtype.itemsize), dtype)
            return stored.of(data)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._path}, {name}: {error}") from None


def _tensors(found: Any, path: pathlib.Path) -> dict[str, Stored]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not any(isinstance(x, Stored) for x in found.values()):
        raise InputError(f"{path}: no dictionary of tensors by name")
    return {str(name): x for name, x in found.items() if isinstance(x, Stored)}
