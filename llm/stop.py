"""The request to stop, by SIGTERM or SIGINT, which a long loop can put off until it has saved."""

import contextlib
import signal
from collections.abc import Iterator

from llm.errors import Stopped


class StopSignal:
    """Whether SIGTERM or SIGINT came. Outside `deferred` either one stops the verb at once, with exit code 75."""

    def __init__(self):
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def deferred(self) -> Iterator["StopSignal"]:
        """Inside, a signal only sets `requested`, so that the loop can save first; a second one stops at once."""
        self._deferred = True
        try:
            yield self
        finally:
            self._deferred = False

    def _on_signal(self, number, frame) -> None:
        again, self.requested = self.requested, True
        if self._deferred and not again:
            return
        raise Stopped(f"stopped by {signal.Signals(number).name}; the same command goes on")


stop_signal = StopSignal()
