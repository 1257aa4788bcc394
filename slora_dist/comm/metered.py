"""Counting, wrapped around any communicator: the same verbs with a label, every call an entry of the ledger."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from slora_dist.comm.base import Communicator
from slora_dist.errors import TransportError
from slora_dist.ledger import BROKEN, Entry, Label, Ledger, Timing
from slora_dist.wire import HEADER_BYTES


class Metered:
    """A communicator that writes what it moves, and how long it took, into a ledger."""

    def __init__(self, comm: Communicator, ledger: Ledger, carried: Callable[[int], int] = int) -> None:
        """``carried`` gives the bytes that travel for a message of so many: more of them where messages are sealed."""
        self.comm, self.ledger, self.carried = comm, ledger, carried
        self.rank, self.size = comm.rank, comm.size
        self.seconds = 0.0  # spent inside the transport since the caller last set it to zero

    @property
    def members(self) -> Sequence[int]:
        """The ranks that are there, ascending."""
        return self.comm.members

    def broadcast(self, wire_B: Tensor, label: Label, clients: int) -> None:
        """Fill ``wire_B`` on every rank with rank 0's; ``clients`` of this rank receive it."""
        began = time.perf_counter()
        moved = self.carried(wire_B.numel()) if self.size > 1 else 0
        with self._breaking(label, "broadcast", 0, moved if self.rank == 0 else 0):
            self.comm.broadcast(wire_B)
        self._note(label, "broadcast", clients, moved, Timing(began, time.perf_counter() - began))

    def gather(
        self, messages: Iterable[Tensor], senders: Sequence[int], label: Label, nbytes: int | None, header: bool = False
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the messages on rank 0 as ``Communicator.gather`` does; time spent making or using them is not counted.

        Without ``nbytes`` the label's first kind is of whatever size: its bytes are noted as they were, the others' as they are told.
        With ``header`` each message begins with one, noted apart as control.
        """
        clock = _Clock()
        made = _Made(messages, clock)
        arrived: dict[int, tuple[float, float]] = {}
        received = 0
        clock.start()
        try:
            for item in self.comm.gather(made, senders, nbytes):
                received += self.carried(item[2].numel()) * (senders[item[0]] != self.rank)
                clock.stop()
                arrived[item[0]] = (clock.now, clock.outside)
                yield item
                clock.start()
        except TransportError:  # what was handed over or has arrived has travelled
            clock.stop()
            timing = Timing(clock.began, clock.seconds)
            self._break(label, "gather", len(made.sizes), sum(made.sizes), self._moved(made.sizes, received), timing)
            raise
        clock.stop()
        moved = self._moved(made.sizes, received)
        clients, varying = len(made.sizes) if nbytes is not None or header else 1, dict[str, int]()
        if nbytes is None:  # sizes are known only now
            first, *rest = label.by_kind
            varying = {first: sum(made.sizes) - len(made.sizes) * (sum(label.by_kind[kind] for kind in rest) + HEADER_BYTES * header)}
        timing = Timing(clock.began, clock.seconds, made.ready, list(arrived.values()), () if self.rank else tuple(senders))
        self._note(label, "gather", clients, moved, timing, varying)
        if header:
            control = Label(label.phase, label.round, "control", {"header": HEADER_BYTES})
            self.ledger.add(control, "gather", len(made.sizes), 0, Timing(clock.began, 0.0))

    def _moved(self, sizes: Sequence[int], received: int) -> int:
        """Return the bytes that this rank received, and of its own messages of these ``sizes`` handed over."""
        return received + (sum(map(self.carried, sizes)) if self.rank else 0)

    def reduce(self, values: Tensor, label: Label, clients: int) -> None:
        """Sum ``values`` of all ranks to rank 0, in place; this rank's part sums ``clients`` clients."""
        began = time.perf_counter()
        moved = values.numel() * values.element_size() if self.size > 1 else 0
        with self._breaking(label, "reduce", clients if self.rank else 0, moved if self.rank else 0):
            self.comm.reduce(values)
        self._note(label, "reduce", clients, moved, Timing(began, time.perf_counter() - began))

    @contextmanager
    def _breaking(self, label: Label, op: str, clients: int, handed: int) -> Iterator[None]:
        """Note what this rank has ``handed`` to the transport, of so many clients, if the collective inside breaks."""
        began = time.perf_counter()
        try:
            yield
        except TransportError:
            payload = sum(label.by_kind.values()) * clients
            self._break(label, op, clients, payload, handed, Timing(began, time.perf_counter() - began))
            raise

    def _break(self, label: Label, op: str, clients: int, payload: int, moved: int, timing: Timing) -> None:
        """Note a collective that broke: the bytes of this rank's messages, and what it handed over or took, if that is anything.

        Who was to be given a broadcast, or rank 0 a sum, has nothing to note: what had come of it the transport does not tell.
        """
        if payload or moved:
            control = Label(label.phase, label.round, "control", {BROKEN: 0})
            self.ledger.broken.append(Entry(control, op, clients, moved, timing, {BROKEN: payload}))

    def _note(self, label: Label, op: str, clients: int, moved: int, timing: Timing, varying: dict[str, int] | None = None) -> None:
        self.seconds += timing.seconds
        self.ledger.add(label, op, clients, moved, timing, varying)


class _Clock:
    """Seconds between each start and the stop that follows it, and those outside, since the first start."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began = self.now = time.perf_counter()
        self._started = self.began

    @property
    def outside(self) -> float:
        return self.now - self.began - self.seconds

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.now = time.perf_counter()
        self.seconds += self.now - self._started


class _Made:
    """This rank's own messages, counted, with the clock stopped while one is being made."""

    def __init__(self, messages: Iterable[Tensor], clock: _Clock) -> None:
        self._messages, self._clock = iter(messages), clock
        self.sizes: list[int] = []
        self.ready: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self._clock.stop()
        try:
            message_B = next(self._messages)
        finally:
            self._clock.start()
        self.ready.append(time.perf_counter())
        self.sizes.append(message_B.numel())
        return message_B
