"""What a run says of itself along the way: its speed, its waiting, its compiles, its memory, and what hangs."""

import collections
import contextlib
import os
import pathlib
import resource
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from llm.errors import InputError
from llm.sharding import hosts
from llm.training.metrics import peak_flops

HANGS = 20  # times the median of the steps before it, and it hangs,
HANGS_SECONDS = 5.0  # but not before so many
_STEPS = 5  # that a median needs
FIRST_SECONDS = 600.0  # what has no median, a first step (which compiles) or the last save, hangs after so many


def say(text: str, everywhere: bool = False) -> None:
    """A warning beside the progress bar, at once; of several processes the first one gives it, or each its own."""
    if hosts.first() or everywhere:
        tqdm.write(f"process {jax.process_index()}: {text}" if hosts.several() else text, file=sys.stderr)
        sys.stderr.flush()


class HungSteps:
    """A thread that says of a step which takes far longer than those before it where it hangs, while it hangs.

    Of the first steps, and of what is no step, it does so after FIRST_SECONDS.
    """

    def __init__(self):
        # What is done, when it began, its limit, and the median that this is of, if any; replaced as a whole.
        self._now: tuple[str, float, float, float | None] | None = None
        self._seconds: collections.deque[float] = collections.deque(maxlen=100)
        self._told: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hung steps", daemon=True)

    def __enter__(self) -> "HungSteps":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def begin(self, step: int) -> None:
        """The step begins, and what was before it has ended."""
        self.end()
        median = statistics.median(self._seconds) if len(self._seconds) >= _STEPS else None
        limit = FIRST_SECONDS if median is None else max(HANGS * median, HANGS_SECONDS)
        self._now = f"step {step}", time.perf_counter(), limit, median

    def begin_other(self, what: str) -> None:
        """Something that is no step begins, and the step before it has ended."""
        self.end()
        self._now = what, time.perf_counter(), FIRST_SECONDS, None

    def end(self, count: bool = True) -> None:
        """Nothing that is watched is done now; `count` takes the step that ends for the median."""
        if self._now is None:
            return
        (what, began, _, _), self._now = self._now, None
        seconds = time.perf_counter() - began
        if self._told == what:
            say(f"{what} goes on after {seconds:.1f} s", everywhere=True)
        if count:
            self._seconds.append(seconds)

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            now = self._now
            if now is None or now[0] == self._told or time.perf_counter() - now[1] < now[2]:
                continue
            self._told, median = now[0], now[3]
            before = "" if median is None else f", those before it took {median:.3g} s"
            say(
                f"{now[0]} has taken {time.perf_counter() - now[1]:.1f} s{before}: it may hang\n{_stacks()}",
                everywhere=True,
            )


_SHOWN = ("batches", "checkpoint")  # the threads that make batches, and that write


def _stacks() -> str:
    """Where the main thread is, and those that make batches and write checkpoints."""
    frames = sys._current_frames()
    found = []
    for thread in threading.enumerate():
        if thread.ident in frames and (thread is threading.main_thread() or thread.name.startswith(_SHOWN)):
            found.append(f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}")
    return "".join(found).rstrip()


class Compiles:
    """Counts how often a jitted function was compiled, and says which argument made it compile once more.

    Args:
        function: the jitted function, of (state, batch).
        lengths: the lengths that batches are padded to; each is compiled once, and that is no surplus.

    Attributes:
        count: programs so far.
        surplus: those of them after the second call that no new length explains.
    """

    def __init__(self, function: Callable, lengths: Iterable[int] = ()):
        self._function: Any = function
        self._lengths = set(lengths)
        self._calls = 0
        self._before: dict[str, str] = {}
        self.count = self.surplus = 0

    def look(self, step: int, state: Any, batch: dict) -> None:
        """Looks at the call of a step with these arguments, which may be donated."""
        self._calls += 1
        count = self._function._cache_size()
        if count == self.count:
            return
        self.count = count
        before, self._before = self._before, _signature({"state": state, "batch": batch})
        length = batch["tokens"].shape[1]
        explained = length in self._lengths
        self._lengths.discard(length)
        if self._calls <= 2 or explained:
            return
        self.surplus += 1
        changed = [
            f"{name} was {before.get(name, 'absent')} and is {self._before.get(name, 'absent')}"
            for name in sorted(before | self._before)
            if before.get(name) != self._before.get(name)
        ]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = "; ".join(changed[:3]) or "no argument's shape, dtype or sharding"
        say(f"step {step} compiled the train step again, as program {count}: {what}{more}")


def _signature(arguments: Any) -> dict[str, str]:
    """What a jitted function is compiled for: shape, dtype and place of each array by its name."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(x, "dtype"):
            found[name] = f"a Python {type(x).__name__}"
            continue
        place = getattr(x, "sharding", "the host")
        weak = " (weak)" if getattr(x, "weak_type", False) else ""
        found[name] = f"{x.dtype}{list(x.shape)}{weak} on {getattr(place, 'spec', place)}"
    return found


def memory() -> dict[str, int]:
    """Bytes in use, and the most that were: of this process's fullest device, or resident where it has no account."""
    stats = [found for found in (device.memory_stats() for device in jax.local_devices()) if found]
    if stats:
        names = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
        return {ours: max(one[theirs] for one in stats) for ours, theirs in names.items() if theirs in stats[0]}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    pages = pathlib.Path("/proc/self/statm")
    if not pages.is_file():
        return {"peak_memory_bytes": peak}
    resident = int(pages.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return {"memory_bytes": resident, "peak_memory_bytes": max(peak, resident)}


def process_seconds() -> float | None:
    """How long this process has been there, imports included; None where the system does not tell."""
    stat = pathlib.Path("/proc/self/stat")
    if not stat.is_file():
        return None
    began = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])  # in ticks since the machine's start
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


class Profile:
    """A trace of a few steps, for xprof or TensorBoard's profiler.

    Args:
        text: START:COUNT, the first step from 1, and how many.

    Raises:
        InputError: it is not that.
    """

    def __init__(self, text: str):
        start, _, count = text.partition(":")
        try:
            self.start, self.count = int(start), int(count)
        except ValueError:
            self.start = self.count = 0
        if self.start < 1 or self.count < 1:
            raise InputError(f"--profile={text}: expected START:COUNT, the first step and how many, as --profile=20:5")
        self._running = False

    def check(self, done: int, steps: int) -> None:
        """Raises InputError when its steps are not among those that are left to do, after `done` of `steps`."""
        last = self.start + self.count - 1
        if self.start <= done or last > steps:
            left = f"steps {done + 1} to {steps}" if done < steps else "none"
            raise InputError(
                f"--profile={self.start}:{self.count} is of steps {self.start} to {last}, of which this run has "
                f"{left} left to do; name some of those"
            )

    def begin(self, step: int, folder: pathlib.Path) -> None:
        """Starts where `step` is the first."""
        if step == self.start:
            jax.profiler.start_trace(folder)
            self._running = True

    def end(self, step: int, results: Any) -> None:
        """Ends where `step` was the last, once its results are there."""
        if step == self.start + self.count - 1:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Watch:
    """Watches the loop that it is a context of.

    Args:
        step_function: the jitted train step.
        flops_per_token: operations of the train step a token.
        workdir: of the run, for its profile.
        tokens: read before the loop.
        lengths: as in `Compiles`.
        profile: of which steps to write a trace; None writes none.

    Attributes:
        peak: operations per second of all devices together, and of what they are the peak.
        first_step_seconds: from the start of the process to the results of its first step; None before that, and where
            the system does not tell.
        first_step_cached: whether that step's programs came from the cache of compiled ones; None without one.
    """

    def __init__(
        self,
        step_function: Callable,
        flops_per_token: float,
        workdir: pathlib.Path,
        tokens: int = 0,
        lengths: Iterable[int] = (),
        profile: Profile | None = None,
    ):
        flops, what = peak_flops()
        self.peak = flops * jax.device_count(), what
        self._flops_per_token = flops_per_token
        self._folder = workdir / "profile"
        self._profile = profile
        self._hung = HungSteps()
        self._compiles = Compiles(step_function, lengths)
        self._mark, self._tokens, self._waited = time.perf_counter(), tokens, 0.0
        self.first_step_seconds: float | None = None
        self.first_step_cached: bool | None = None
        self._stepped = False
        self._events: collections.Counter[str] = collections.Counter()
        jax.monitoring.register_event_listener(lambda event, **_: self._events.update([event.rpartition("/")[2]]))

    def __enter__(self) -> "Watch":
        self._hung.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._hung.__exit__()
        if self._profile is not None:
            self._profile.close()

    def batches(self, steps: Iterable[int], batches: Iterator[dict]) -> Iterator[tuple[int, dict]]:
        """(step, batch) for each step, from 0; counts the time that the loop waits for them."""
        for step in steps:
            self._hung.begin(step + 1)
            if self._profile is not None:
                self._profile.begin(step + 1, self._folder)
            began = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - began
            yield step, batch
        self._hung.end()

    @contextlib.contextmanager
    def last_save(self) -> Iterator[None]:
        """Around the wait for a save after which no step comes."""
        self._hung.begin_other("the last save")
        yield
        self._hung.end(count=False)

    def ran(self, step: int, state: Any, batch: dict, results: Any) -> None:
        """The train step was called with this state and batch; `step` from 1."""
        self._compiles.look(step, state, batch)
        if self._profile is not None:
            self._profile.end(step, results)

    def stepped(self) -> None:
        """The results of a step are there."""
        if not self._stepped:
            self._stepped = True
            self.first_step_seconds = process_seconds()
            asked, hits = (self._events[name] for name in ("compile_requests_use_cache", "cache_hits"))
            self.first_step_cached = hits == asked if asked else None

    def row(self, tokens: int) -> dict[str, float]:
        """What the record has of the time since the last row: tokens/s, their share of the peak, the share of the time
        that the loop waited for batches; and compiles and memory so far.
        """
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        rate, waited = (tokens - self._tokens) / seconds, self._waited / seconds
        self._mark, self._tokens, self._waited = now, tokens, 0.0
        return {
            "tokens_per_second": rate,
            "mfu": self.mfu(rate),
            "input_wait": waited,
            "compiles": self._compiles.count,
            "surplus_compiles": self._compiles.surplus,
            **memory(),
        }

    def mfu(self, rate: float) -> float:
        """The share of the peak that so many tokens a second take."""
        return self._flops_per_token * rate / self.peak[0]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training: its time counts for nothing."""
        self._hung.end(count=False)
        began = time.perf_counter()
        yield
        self._mark += time.perf_counter() - began
