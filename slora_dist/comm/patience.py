"""Waiting for the transport in a way that can be given up.

A collective of gloo whose connections are cut raises, with one exception: what was handed over to a connection but is not yet, or only
partly, on its way is forgotten, and whoever waits for it waits until the time-out. So where ranks heal the wait is left to a thread; when
the group is over and the wait does not end by itself, the thread is left alone with it. Its group is gone by then; nothing else is held up.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from slora_dist.errors import TransportError


class _Wait:
    """One wait: ``done`` is set when it has ended, or has been given up."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.done = call, threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:  # whatever it is: it is raised where somebody waits
            self.error = self.error or error
        self.done.set()


class Patience:
    """Waits one after the other for the operations of one group."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Wait | None] = SimpleQueue()
        self._present: _Wait | None = None
        threading.Thread(target=self._serve, name="transport", daemon=True).start()

    def wait(self, call: Callable[[], object]) -> None:
        """Return when ``call`` has; raises what it raises, and ``TransportError`` when it was given up."""
        self._present = wait = _Wait(call)
        self._queue.put(wait)
        wait.done.wait()
        self._present = None
        if wait.error:
            raise wait.error

    def give_up(self) -> None:
        """End the wait that is under way, if there is one. Called from another thread."""
        wait = self._present
        if wait and not wait.done.is_set():
            wait.error = TransportError("the group is over")
            wait.done.set()

    def end(self) -> None:
        """Let the thread go: there will be no other wait."""
        self._queue.put(None)

    def _serve(self) -> None:
        while wait := self._queue.get():
            wait.run()
