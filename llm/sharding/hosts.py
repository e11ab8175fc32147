"""Several processes as one run: how they find each other, what they tell each other, and how they end together.

A launcher that JAX knows (Slurm's srun, OpenMPI, a TPU pod slice or GKE) needs nothing, MPICH and Intel MPI the address
of process 0, JAX_COORDINATOR_ADDRESS=HOST:PORT; anything else sets JAX_NUM_PROCESSES and JAX_PROCESS_ID too. A process
by itself does nothing of what stands here.

Each process is given only the rows of a batch that its devices hold. Process 0 alone prints and writes, but for
checkpoints, which all write; what it finds on the disk it tells the others, so that all decide alike. When one of them
ends with another code than 0, it says so, and all end with that code: none waits for one that has gone.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # the store of keys, which JAX has no public name for
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from llm.errors import InputError, RunFailed
from llm.sharding.rules import partition_spec

ADDRESS, NUMBER, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_END, _DONE = "llm/end", "llm/done"
_GOING = 3  # seconds from the barrier to the end of a process, on a machine that has much else to do
_LONG = 7 * 24 * 3600 * 1000  # milliseconds; one that dies meanwhile is noticed by JAX's heartbeats


def join() -> None:
    """Joins the other processes of this run, where it was launched as several. Call before the first use of a device.

    Raises:
        InputError: the variables are incomplete or wrong.
        RunFailed: the others do not come.
    """
    how = launched(os.environ)
    if how is None:
        return
    # SIGTERM is the verbs' own to handle: they also stop by SIGINT, and while no step is taken.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**how)
    except (ValueError, TypeError) as error:
        raise InputError(f"this process cannot join the others: {error}; set {ADDRESS}, {NUMBER} and {ID}") from None
    except RuntimeError as error:
        raise RunFailed(f"the processes of this run do not find each other: {' '.join(str(error).split())}") from None
    if several():
        _ending.watch()


def launched(environ) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`, which finds the others by itself; None of a process alone."""
    if ours := [name for name in (ADDRESS, NUMBER, ID) if environ.get(name)]:
        return _told(environ, ours)
    if {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environ) and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return {}
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return {}
        raise InputError(
            f"this OpenMPI does not tell where process 0 is: give {ADDRESS}=HOST:PORT, mpirun -x {ADDRESS}"
        )
    if int(environ.get("PMI_SIZE", 1)) > 1:
        raise InputError(
            f"this launcher (PMI_SIZE={environ['PMI_SIZE']}, as of MPICH and Intel MPI) does not tell where process 0 "
            f"is: give {ADDRESS}=HOST:PORT, mpiexec -genv {ADDRESS} HOST:PORT"
        )
    if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
        from jax._src import cloud_tpu_init

        if cloud_tpu_init.running_in_cloud_tpu_vm:
            return {}
    return None


def _told(environ, given: list[str]) -> dict[str, Any] | None:
    """The arguments where some of our variables are given; a launcher's own stand in for number and id."""
    found: dict[str, int] = {}
    launchers = {
        NUMBER: ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
        ID: ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    }
    for name, others in launchers.items():
        text = next((environ[one] for one in (name, *others) if environ.get(one)), None)
        if text is None:
            raise InputError(f"{', '.join(given)} is set and {name} is not: set all of {ADDRESS}, {NUMBER} and {ID}")
        if not text.isdecimal():
            raise InputError(f"{name}={text!r}: expected a number")
        found[name] = int(text)
    number, own = found[NUMBER], found[ID]
    if number < 1 or own >= number:
        raise InputError(f"{ID}={own} with {NUMBER}={number}: processes are numbered from 0 to {number - 1}")
    if number == 1:
        return None
    address = environ.get(ADDRESS)
    if address is None or not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise InputError(f"{ADDRESS}={address or ''}: expected HOST:PORT of process 0")
    return dict(
        coordinator_address=address, num_processes=number, process_id=own, cluster_detection_method="deactivate"
    )


def _store() -> Any:
    """The keys and barriers that all processes of a run share."""
    assert global_state.client is not None, "this process is alone"
    return global_state.client


def several() -> bool:
    """Whether this run is more than this process. Touches no device."""
    return global_state.client is not None and global_state.num_processes > 1


def first() -> bool:
    """Whether this process is the one that prints and writes. Touches no device."""
    return global_state.process_id == 0


def say(text: str) -> None:
    """Prints, with one voice."""
    if first():
        print(text)


class _Count:
    """How often `from_first` was called: all processes call it in the same order, so it names what is told."""

    told = 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives at process 0, a JSON value, at all of them; the others wait for it. All have to call it."""
    if not several():
        return make()
    _Count.told += 1
    key = f"llm/told/{_Count.told}"
    if first():
        value = make()
        _store().key_value_set(key, json.dumps(value))
        return value
    while True:
        try:
            return json.loads(_store().blocking_key_value_get(key, 1000))
        except jax.errors.JaxRuntimeError as error:  # in pieces of a second, so that signals are heard
            if "DEADLINE_EXCEEDED" not in str(error):
                raise RunFailed(f"process 0 is gone: {' '.join(str(error).split())}") from None


def fetch(tree: Any) -> Any:
    """`jax.device_get` of arrays that lie on any process's devices. All processes have to call it."""
    if not several():
        return jax.device_get(tree)

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def rows_here(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices hold, ascending."""
    place = NamedSharding(mesh, partition_spec(("batch",)))
    indices = place.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in indices]))


class _Ending:
    """Has all processes end alike: a thread of each looks whether another one has ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Ends this process when another has ended."""
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            try:
                found = _store().key_value_try_get(_END)
            except jax.errors.JaxRuntimeError:  # not there
                continue
            with self._lock:
                code, line = self._read(found, None)
                if line:
                    print(line, file=sys.stderr, flush=True)
                sys.stdout.flush()
                self._part()
                os._exit(code)

    def leave(self, code: int, line: str | None) -> tuple[int, str | None]:
        """As the function. Waits for the others."""
        if code == 0:
            _store().wait_at_barrier(_DONE, _LONG)
            self._over.set()
            assert self._thread is not None
            self._thread.join()
            jax.distributed.shutdown()
            return code, line
        self._lock.acquire()  # for good: this process ends here
        try:
            _store().key_value_set(_END, json.dumps([code, global_state.process_id, line]))
        except jax.errors.JaxRuntimeError:  # another was before
            code, line = self._read(_store().blocking_key_value_get(_END, 1000), line)
        self._part()
        return code, line if first() else None

    def _read(self, found: str, own: str | None) -> tuple[int, str | None]:
        code, process, line = json.loads(found)
        if not first() or line is None:
            return code, None
        kind, _, rest = line.partition(": ")
        return code, line if line == own or kind != "error" else f"{kind}: process {process}: {rest}"

    def _part(self) -> None:
        """Waits until all know and, at process 0, have gone: JAX ends by a signal those that it leaves behind."""
        try:
            _store().wait_at_barrier(_END, 20_000)
        except jax.errors.JaxRuntimeError:  # one hangs: it is ended by its missing heartbeats
            pass
        if first():
            time.sleep(_GOING)


_ending = _Ending()


def leave(code: int, line: str | None) -> tuple[int, str | None]:
    """The exit code that this process has to end with, and what it has to print; the last that it does.

    Of several processes, all end with the first code other than 0 that one of them ends with.

    Args:
        code: that it would end with by itself.
        line: that it would print, `error: ...` or `stopped: ...`.
    """
    return _ending.leave(code, line) if several() else (code, line)
