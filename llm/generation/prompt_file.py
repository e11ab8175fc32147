"""Files of prompts and of examples, a JSON object a line, and the file that the answers go to."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from llm.errors import InputError

PARTIAL = ".partial"


def read_lines(
    path: str, flag: str, fields: Sequence[str], absent: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, Any]]]:
    """(the places, FILE:NUMBER, and the objects) of a file of JSON lines; blank lines are skipped.

    Args:
        path: of the file.
        flag: which names it, for messages.
        fields: each line's texts, which must not be empty.
        absent: fields that a line must not have.

    Raises:
        InputError: the file cannot be read, has no line, or a line is not such an object; with its number.
    """
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{flag}={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{flag}={path}: not UTF-8 at byte {error.start}") from None
    places, found = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            one = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(one, dict):
            raise InputError(f"{where}: expected an object with {' and '.join(fields)}, got {line.strip()[:40]}")
        for field in fields:
            if not isinstance(one.get(field), str) or not one[field]:
                raise InputError(f'{where}: "{field}" must be a text that is not empty, got {one.get(field)!r}')
        for field in absent:
            if field in one:
                raise InputError(f'{where}: the field "{field}" is what the answer is written to; rename it')
        try:
            json.dumps(one, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: holds a lone surrogate, which is not valid Unicode") from None
        places.append(where)
        found.append(one)
    if not found:
        raise InputError(f"{flag}={path}: there is no line in it")
    return places, found


def few_shot(examples: Iterable[dict[str, Any]], prompt: str) -> str:
    """The prompt after examples of "input" and "output", as a text that goes on with its output (Brown et al. 2020)."""
    shown = "".join(f"Input: {one['input']}\nOutput: {one['output']}\n\n" for one in examples)
    return f"{shown}Input: {prompt}\nOutput:"


FEW_SHOT_STOP = "\n"


class AnswerFile:
    """Answers, a JSON object a line, written a batch at a time and kept when the writer is stopped.

    Until the last line they stand in PATH.partial under a line that says what they were made of; then the file gets its
    own name.
    """

    def __init__(self, path: str, made_of: Any, batch: int):
        """Opens the file to go on after its last whole batch.

        Args:
            path: of the finished file.
            made_of: everything that decides the answers, as JSON.
            batch: lines that are written at once.

        Raises:
            InputError: the file is there, cannot be written, or was begun with something else.
        """
        self._path, self._partial = pathlib.Path(path), pathlib.Path(path + PARTIAL)
        head = json.dumps({"answers": hashlib.sha256(json.dumps(made_of).encode()).hexdigest()}) + "\n"
        if self._path.exists():
            raise InputError(f"--output={path} is there already: name another file, or remove it")
        try:
            kept = self._partial.read_bytes() if self._partial.exists() else b""
            if not kept.startswith(head.encode()) and not head.encode().startswith(kept):
                raise InputError(
                    f"{self._partial} was begun with other prompts, flags or another checkpoint: remove it, or name "
                    "another --output"
                )
            # A line that was cut off, and those of a batch that was, are written again.
            lines = kept.splitlines(keepends=True)[1:]
            whole = len(lines) - (bool(lines) and not lines[-1].endswith(b"\n"))
            self.done = whole - whole % batch
            with self._partial.open("wb") as file:
                file.write(head.encode() + b"".join(lines[: self.done]))
        except OSError as error:
            raise InputError(f"--output={path} cannot be written: {error.strerror}") from None

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """Writes a batch, and waits until it is on the disk."""
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers)
        with self._partial.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the file its name."""
        whole = self._partial.read_bytes()
        ready = self._path.with_name(self._path.name + ".ready")
        ready.write_bytes(whole[whole.index(b"\n") + 1 :])
        ready.replace(self._path)
        self._partial.unlink()
