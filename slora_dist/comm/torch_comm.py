"""torch.distributed as a communicator: gloo between CPUs, nccl between GPUs.

gloo binds the interface that GLOO_SOCKET_IFNAME names, else the one of the host name. nccl moves device memory only: wires that lie
elsewhere are staged through the device, and gathered chunks are handed over on the CPU, as by every transport.
Legend: B bytes of a message, b bytes of a bucket or less.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from slora_dist.comm import stream
from slora_dist.comm.alone import leave
from slora_dist.comm.base import BUCKET, INIT_SECONDS, MAX_MESSAGE, Chunk, check_summable, check_wire, failing, staged
from slora_dist.comm.door import listen, reach_lifeline, serve_lifeline
from slora_dist.comm.generations import Generations
from slora_dist.comm.lifeline import Healing
from slora_dist.comm.root_lifeline import Lifeline
from slora_dist.errors import ConfigError, RootGone, RunError, TransportError
from slora_dist.world import World

NCCL_PATIENCE = timedelta(days=365)  # nccl's watchdog may end the process: the deadlines are those of our waits, which may be longer


@dataclass(frozen=True)
class _Transfer:
    """A transfer with ``peer`` since ``posted``. ``staged_b`` keeps its memory alive, ``target_b`` is where a receive's bytes go."""

    rank: int
    peer: int
    seconds: float
    posted: float
    work: dist.Work
    staged_b: Tensor
    target_b: Tensor
    await_: Callable[[Callable[[], object]], None]

    def wait(self) -> None:
        past = time.monotonic() - self.posted if self.staged_b.is_cuda else 0.0  # nccl's clock runs since the posting, gloo's since now
        with failing(self.rank, "gather", self.peer):
            self.await_(partial(self.work.wait, timedelta(seconds=past + self.seconds)))
        if self.target_b is not self.staged_b:
            self.target_b.copy_(self.staged_b)


class TorchComm:
    """One rank of a process group with all ranks.

    ``store`` is the one that all ranks share. ``timeout`` is seconds of one operation; coming together may take ``INIT_SECONDS``.
    ``device`` is this rank's CUDA device for nccl, and not used by gloo. ``bucket`` is a multiple of 64 bytes. With a ``lifeline`` (gloo
    only) those who are left can form the group anew; a rank that joins a run under way is in no group before that.
    """

    def __init__(
        self,
        backend: str,
        rank: int,
        size: int,
        store: Store,
        timeout: float,
        device: torch.device | None = None,
        bucket: int = BUCKET,
        max_message: int = MAX_MESSAGE,
        lifeline: Lifeline | None = None,
    ) -> None:
        assert bucket > 0 and bucket % 64 == 0
        self.rank, self.size, self.name = rank, size, backend
        self.members: Sequence[int] = range(size)
        self.timeout, self.bucket, self.max_message = timeout, bucket, max_message
        self.device = device if backend == "nccl" and device else torch.device("cpu")
        self._store, self.generations = store, Generations(lifeline, timeout) if lifeline else None
        if self.generations is None:
            with failing(rank, "connect"):
                _call_roll(store, backend, rank, size)
                self._join(PrefixStore("slora_dist", store))
        elif not self.generations.joins:
            self.regroup(INIT_SECONDS)

    def regroup(self, seconds: float | None = None) -> None:
        """Leave the group, and form the next one with all ranks that are there then; who trains meanwhile is waited for.

        Raises ``TransportError`` when one of them dies just then (call again), another ``RunError`` when this rank is on its own.
        """
        assert self.generations
        self.generations.leave()
        if dist.is_initialized():
            dist.destroy_process_group()
        with self.generations.next(self.rank, seconds) as meeting, failing(self.rank, "regroup"):
            self.members = meeting.members
            fresh = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own, which may be cut with the others
            self._join(PrefixStore(f"slora_dist/{meeting.generation}", fresh))

    def _join(self, store: Store) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else a late peer kills the process instead of raising here
        dist.distributed_c10d._world.group_count = 0  # part of the keys in the store: a join that failed must not shift it on some ranks
        dist.init_process_group(
            self.name,
            store=store,
            rank=self.members.index(self.rank),
            world_size=len(self.members),
            timeout=NCCL_PATIENCE if on_gpu else timedelta(seconds=self.timeout),
            device_id=self.device if on_gpu else None,
        )
        self.barrier()  # nccl's first operation must be one of all ranks; and who dies after this fails nobody's connecting

    def broadcast(self, wire_B: Tensor) -> None:
        """Overwrite ``wire_B`` by that of rank 0."""
        check_wire(wire_B)
        if wire_B.numel():
            self._collective("broadcast", wire_B, lambda tensor: dist.broadcast(tensor, 0, async_op=True))

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Bring messages to rank 0 in order, in chunks. A rank keeps its messages until all are sent: gloo cannot tell before."""
        return stream.gather(self, messages, senders, nbytes)

    def reduce(self, values: Tensor) -> None:
        """Sum to rank 0, in place."""
        check_summable(values)
        if values.numel():
            self._collective("reduce", values, lambda tensor: dist.reduce(tensor, 0, async_op=True))

    def barrier(self) -> None:
        """Return when all ranks have called it; gloo's names a rank that does not."""
        if self.name != "gloo":
            self._collective("barrier", torch.zeros(1), lambda tensor: dist.all_reduce(tensor, async_op=True))
            return
        with failing(self.rank, "barrier"):
            self._await(lambda: dist.monitored_barrier(timeout=timedelta(seconds=self.timeout)))

    def abort(self, code: int) -> NoReturn:
        """End this process; its broken connections end those that wait for it, and torchrun or srun -K all others."""
        leave(code)

    def close(self) -> None:
        """Wait for all ranks, so that none cuts a connection in use, and leave the group."""
        if self.generations is None:
            self.barrier()
            dist.destroy_process_group()
            return
        if not dist.is_initialized():  # a rank that joins, and has found that it cannot
            return
        with suppress(RunError):  # all is done: who dies now is not missed
            self.barrier()
        self.generations.lifeline.close()
        dist.destroy_process_group()

    def send(self, chunk_b: Tensor, turns: int) -> stream.Transfer:
        """Start to send to rank 0 (see ``stream.Link``)."""
        staged_b = chunk_b.to(self.device)
        return self._transfer("send", staged_b, staged_b, 0, self.timeout * turns)

    def receive(self, chunk_b: Tensor, peer: int) -> stream.Transfer:
        """Start to receive from ``peer`` (see ``stream.Link``)."""
        staged_b = chunk_b if self.device.type == "cpu" else torch.empty_like(chunk_b, device=self.device)
        return self._transfer("recv", staged_b, chunk_b, peer, self.timeout)

    def _transfer(self, op: Literal["send", "recv"], staged_b: Tensor, target_b: Tensor, peer: int, seconds: float) -> _Transfer:
        posted = time.monotonic()
        place = self.members.index(peer)
        with failing(self.rank, "gather", peer):
            if self.name == "gloo":
                work = getattr(dist.group.WORLD, op)([staged_b], place, 0)
            else:  # a batch of one, for on its own it would have nccl open a communicator per pair of ranks
                (work,) = dist.batch_isend_irecv([dist.P2POp(getattr(dist, f"i{op}"), staged_b, place)])
        return _Transfer(self.rank, peer, seconds, posted, work, staged_b, target_b, self._await)

    def _collective(self, op: str, values: Tensor, start: Callable[[Tensor], dist.Work | None]) -> None:
        with failing(self.rank, op), staged(values, self.device) as tensor:
            work = start(tensor)
            assert work is not None
            self._await(lambda: work.wait(timedelta(seconds=self.timeout)))

    def _await(self, call: Callable[[], object]) -> None:
        """Let ``call`` wait for the group."""
        self.generations.wait(call) if self.generations else call()


def open_store(host: str, port: int, world: World, environ: Mapping[str, str]) -> Store:
    """Return the store at ``host``:``port`` that all ranks share. Rank 0 serves it, unless torchrun's agent does so already.

    The agent's store outlives its workers: what they wrote before a restart must not be taken for news.
    """
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with _connecting(world.rank):
        patience = timedelta(seconds=INIT_SECONDS)
        serves = world.rank == 0 and not served
        door = listen(host, port, world) if serves else None
        store = TCPStore(host, port, is_master=serves, timeout=patience, wait_for_workers=False, master_listen_fd=door)
    return PrefixStore(f"attempt{attempt}", store)


def open_lifeline(host: str, store: Store, world: World, healing: Healing) -> Lifeline:
    """Return this rank's end of the lifeline, which rank 0 serves at ``host``. Its port is in the store, which nobody has to trust."""
    with _connecting(world.rank):
        if world.rank == 0:
            root = serve_lifeline(host, world, healing)
            store.set("lifeline", str(root.port))
            return root
        store.wait(["lifeline"], timedelta(seconds=INIT_SECONDS))
        return reach_lifeline(host, store.get("lifeline").decode(errors="replace"), world, healing)


@contextmanager
def _connecting(rank: int) -> Iterator[None]:
    """Name what fails inside, where other ranks reach for rank 0: what they cannot reach is not there."""
    try:
        with failing(rank, "connect", 0 if rank else None):
            yield
    except TransportError as error:
        raise (RootGone(str(error)) if rank else error) from error.__cause__


def _call_roll(store: Store, backend: str, rank: int, size: int) -> None:
    """Return once all ranks have come; say who has not after ``INIT_SECONDS``.

    Raises ``ConfigError`` on all ranks when they mean different backends: groups of two kinds would wait for each other.
    """
    store.set(f"here/{rank}", backend)
    for peer in range(size):
        with failing(rank, f"connect within {INIT_SECONDS:.0f} s", peer):
            store.wait([f"here/{peer}"], timedelta(seconds=INIT_SECONDS))
    found = [store.get(f"here/{peer}").decode() for peer in range(size)]
    if other := [peer for peer in range(size) if found[peer] != found[0]]:
        problem = f"rank 0 takes {found[0]} and rank {other[0]} {found[other[0]]}"
        raise ConfigError("comm.backend", problem, "gloo, or nccl where every rank has a GPU of its own")
