"""Where the phases run: in this process, in local worker processes, or as datatrove's tasks on Slurm or Ray.

A phase's result stands in files named after its unit, never after the task, so that any number of workers or tasks
makes the same.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from llm.data import finish, phases
from llm.data.work import Work
from llm.errors import InputError

EXECUTORS = ("local", "datatrove", "slurm", "ray")
# name, whether it runs once a unit, function
PHASES: tuple[tuple[str, bool, Callable], ...] = (
    ("documents", True, phases.documents),
    ("decide", False, phases.decide),
    ("tokenizer", False, phases.tokenizer),
    ("encode", True, phases.encode),
    ("finish", False, finish.finish),
)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a preparation is run; it never changes what comes out.

    Attributes:
        executor: "local", worker processes of this machine; "datatrove", its local executor; "slurm" or "ray".
        workers: processes, or tasks that run at the same time.
        tasks: datatrove tasks that the units are dealt to; 0 takes `workers`.
        slurm_partition: where Slurm runs the tasks.
        slurm_time: the time limit of a task, "hours:minutes:seconds".
    """

    executor: str = "local"
    workers: int = 1
    tasks: int = 0
    slurm_partition: str = ""
    slurm_time: str = "08:00:00"

    def __post_init__(self):
        if self.executor not in EXECUTORS:
            raise InputError(f"--executor={self.executor}: there are {', '.join(EXECUTORS)}")
        if self.workers < 1 or self.tasks < 0:
            raise InputError(
                f"--workers={self.workers} --tasks={self.tasks}: at least one worker, and no less than 0 tasks"
            )
        if self.tasks and self.executor == "local":
            raise InputError(f"--tasks={self.tasks} is for datatrove's executors; give --executor too, or --workers")
        if (self.executor == "slurm") != bool(self.slurm_partition):
            raise InputError("--executor=slurm and --slurm-partition=NAME need each other")


def execute(folder: pathlib.Path, execution: Execution, quiet: bool = False) -> bool:
    """Runs the phases that are not done. Returns whether all are done: Slurm's go on after this returns."""
    if execution.executor == "local":
        for name, per_unit, function in PHASES:
            _local(folder, name, per_unit, function, execution.workers, quiet)
        return True
    return _datatrove(folder, execution)


def _local(folder: pathlib.Path, name: str, per_unit: bool, function: Callable, workers: int, quiet: bool) -> None:
    work = Work.open(folder)
    if not per_unit:
        if not work.done("all", name):
            function(work)
        return
    waiting = [unit for unit in range(len(work.units)) if not work.done(unit, name)]
    sizes = [unit.size for unit in work.units]
    total, before = sum(sizes), sum(sizes) - sum(sizes[unit] for unit in waiting)
    # Short work shows no bar.
    with tqdm(
        total=total, initial=before, desc=name, unit="B", unit_scale=True, disable=quiet, delay=1, mininterval=0.5
    ) as bar:
        if min(workers, len(waiting)) <= 1:
            for unit in waiting:
                function(work, unit)
                bar.update(sizes[unit])
            return
        # Spawned, not forked: threads of libraries that are loaded do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(waiting)), initializer=_ignore_stop) as pool:
            for unit in pool.imap_unordered(_Unit(folder, name), waiting):
                bar.update(sizes[unit])


def _ignore_stop() -> None:
    # The parent hears the signal and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One phase of one unit, for a worker process."""

    folder: pathlib.Path
    phase: str

    def __call__(self, unit: int) -> int:
        function = next(f for name, _, f in PHASES if name == self.phase)
        function(Work.open(self.folder), unit)
        return unit


@dataclasses.dataclass
class Task:
    """One phase as a step of a datatrove pipeline: rank r of w takes the units r, r + w, ..."""

    folder: pathlib.Path
    phase: str

    def __call__(self, data, rank: int, world_size: int) -> None:
        """Runs what is not done of this rank's units; it takes no documents from a step before, and gives none."""
        name, per_unit, function = next(entry for entry in PHASES if entry[0] == self.phase)
        work = Work.open(self.folder)
        if not per_unit:
            if not work.done("all", name):
                function(work)
            return
        for unit in range(len(work.units))[rank::world_size]:
            if not work.done(unit, name):
                function(work, unit)


@contextlib.contextmanager
def _stderr_to(path: pathlib.Path) -> Iterator[None]:
    """What this process and those it starts write to stderr goes to a file: datatrove tells of every task there."""
    path.parent.mkdir(exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _datatrove(folder: pathlib.Path, execution: Execution) -> bool:
    folder = folder.resolve()
    with _stderr_to(folder / "logs" / "datatrove.txt"):
        return _run_pipelines(folder, execution)


def _run_pipelines(folder: pathlib.Path, execution: Execution) -> bool:
    units = len(Work.open(folder).units)
    tasks = min(execution.tasks or execution.workers, units)
    last = None
    for name, per_unit, _ in PHASES:
        count = tasks if per_unit else 1
        logs = str(folder / "logs" / f"{name}-{count}")
        # A step may fail in the middle of its units: the marks of the units count, not datatrove's of the task.
        common = {"pipeline": [Task(folder, name)], "tasks": count, "logging_dir": logs, "skip_completed": False}
        if execution.executor == "slurm":
            from datatrove.executor import SlurmPipelineExecutor

            root = pathlib.Path(__file__).parents[2]
            last = SlurmPipelineExecutor(
                **common,
                time=execution.slurm_time,
                partition=execution.slurm_partition,
                workers=execution.workers,
                job_name=f"prepare-{name}",
                env_command=f"export PATH={pathlib.Path(sys.executable).parent}:$PATH PYTHONPATH={root}:$PYTHONPATH",
                depends=last,
            )
            continue
        if execution.executor == "ray":
            try:
                import ray  # noqa: F401  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise InputError("--executor=ray needs the package ray: pip install 'ray[default]'") from None
            from datatrove.executor import RayPipelineExecutor

            RayPipelineExecutor(**common, workers=execution.workers).run()
        else:
            from datatrove.executor import LocalPipelineExecutor

            LocalPipelineExecutor(**common, workers=min(execution.workers, count)).run()
    if last is not None:
        last.run()
    return last is None
