"""What all verbs share: flags, one-line errors, exit codes, the stop signal, and the index of verbs.

Exit codes: 0 done; 1 the run failed; 2 wrong usage, config or input; 75 stopped by SIGTERM or SIGINT after saving,
to be resumed by the same command.
"""

import argparse
import errno
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from llm.errors import InputError, RunFailed, Stopped
from llm.stop import stop_signal

VERBS = {
    "prepare": "turn text into packed training rows and a tokenizer",
    "train": "train an experiment config from raw text to a finished, evaluated, sampled model",
    "sweep": "train an experiment once for every setting of a sweep, or search by optuna",
    "evaluate": "loss, perplexity and bits per byte of a run over its validation set",
    "generate": "continue a prompt, a file of prompts or a conversation with a run's model",
    "plan": "compile the train step for hardware that is not there: memory, network, least time",
    "convert": "take weights of others in as a run, and write a run as theirs",
}

FAILED, WRONG_INPUT, STOPPED = 1, 2, 75
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "no file may be that large here (ulimit -f)",
    errno.EROFS: "read-only",
    errno.EIO: "the disk fails",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of a verb's flags whose errors are one line."""
    return _Parser(
        prog=f"python -m llm.{verb}" if verb else "python -m llm",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """The `--config.path=value` (or `--config.path value`) flags among what a parser left over.

    Raises:
        InputError: any other flag or word.
    """
    found, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise InputError(f"unknown argument {word!r}")
        path, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{word}: expected a value, {word}=VALUE")
            value = words.pop(0)
        found.append((path, value))
    return found


def add_which(parser: argparse.ArgumentParser) -> None:
    """The flags --average and --checkpoint of the verbs that open a run."""
    add = parser.add_argument
    add("--average", type=int, default=1, metavar="N", help="take the mean of the newest N checkpoints")
    add("--checkpoint", default="", metavar="STEP", help="take that step's, or the best (training.keep_best)")


def writable_workdir(name: str) -> pathlib.Path:
    """Makes the workdir and proves that it can be written.

    Raises:
        InputError: it is a file, or cannot be made or written.
    """
    if not name:
        raise InputError("--workdir is empty, expected a folder")
    path = pathlib.Path(name)
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--workdir={name} is a file, expected a folder")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink(missing_ok=True)  # another machine's process may have had this number
    except OSError as error:
        raise InputError(f"--workdir={name} cannot be written: {_DISK.get(error.errno or 0, error.strerror)}") from None
    return path


def existing_workdir(name: str) -> pathlib.Path:
    """A run's folder that must exist already."""
    path = pathlib.Path(name)
    try:
        found = bool(name) and path.is_dir()
    except OSError as error:
        raise InputError(f"--workdir={name}: {error.strerror}") from None
    if not found:
        raise InputError(f"--workdir={name}: there is no such folder")
    return path


def _alone(code: int, line: str | None) -> tuple[int, str | None]:
    return code, line


def run(main: Callable[[list[str]], None], leave: Callable[[int, str | None], tuple[int, str | None]] = _alone) -> None:
    """Runs a verb's `main(argv)` and exits with the project's codes; expected errors are one line on stderr.

    Args:
        main: of the verb.
        leave: of a verb that runs as several processes, `llm.sharding.hosts.leave`: what all of them end with.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    stop_signal.install()
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # So jax says that it found no TPU. libtpu, which the tests install, would print what it cannot find out then.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        main(sys.argv[1:])
        code, message = 0, None
    except InputError as error:
        code, message = WRONG_INPUT, str(error)
    except Stopped as stopped:
        code, message = STOPPED, str(stopped)
    except RunFailed as error:
        code, message = FAILED, str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = FAILED, None
    except Exception as error:
        code, message = WRONG_INPUT, _known(error)
        if message is None:
            traceback.print_exc()
            code = FAILED
    line = message and f"{'stopped' if code == STOPPED else 'error'}: {' '.join(message.split())}"
    code, line = leave(code, line)
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if not code:
        sys.exit(0)
    # Threads of a failed save must not keep the process, nor a second traceback follow the line above; but what workers
    # shared is taken down, or its tracker would warn of it.
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._run_finalizers()
    os._exit(code)


def _known(error: Exception) -> str | None:
    """One line of an error that is none of the program's: the disk's, or an attention that cannot do what is asked."""
    if isinstance(error, NotImplementedError) and str(error).startswith("attention: "):
        return f"{error}; model.attention='auto' takes one that can"
    reason = disk_fault(error)
    if reason is None and isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return reason


def disk_fault(error: BaseException) -> str | None:
    """One line if the error, or what caused it, is the disk's: full, over quota, read-only or broken."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            where = f" {seen.filename}" if seen.filename else ""
            return f"cannot write{where}: {_DISK[seen.errno]}; what was saved before is kept, make room and run again"
        for number, what in _DISK.items():  # as text, from libraries that write by themselves
            if re.search(rf"{re.escape(os.strerror(number))}|\b{errno.errorcode[number]}\b", str(seen)):
                return f"cannot write: {what}; what was saved before is kept, make room and run again"
        seen = seen.__cause__ or seen.__context__
    return None


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values under each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def keep_compiled(folder: pathlib.Path) -> None:
    """Keeps compiled programs for the next process, in a folder or where JAX_COMPILATION_CACHE_DIR says."""
    import jax  # heavy, and not every verb needs it

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small ones too: a process that writes one text compiles some dozens.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def say_error(message: str) -> None:
    """A line to stderr, for notes that must not mix with a verb's output."""
    print(message, file=sys.stderr)
