"""Faults under MPI, with real processes of mpiexec.

MPICH ends all ranks when one dies; the run is then resumed under MPI, on another number of ranks. Open MPI 5 with ULFM goes on without the
dead rank. Importing everything takes a rank some seconds of a core, so that a job has three: a server, and two that play two clients each.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

from drill import sabotage
from drill.one import CLIENTS, HEALING, PATIENCE, PATIENT, ROOT, SECONDS, SECRET, Drill, Fault, Outcome, away
from drill.processes import alive
from drill.ranks import Saboteur, pids, until
from drill.sabotage import POINTS, ROOT_POINTS, Deed

SIZE = 3
OTHER_SIZES = (1, 2)  # of the world that resumes
TIMEOUT = 10.0  # seconds of one operation, where a rank stands still
LEFT_OVER = 10.0  # seconds after the end of mpiexec in which the last rank must be gone
Plot = Callable[[], Saboteur]  # a saboteur that is made in its rank: this can be pickled


@dataclass(frozen=True)
class Library:
    """An MPI library: the environment that it lives in, the options of its mpiexec and the variables that this one needs."""

    bin: Path
    options: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


MPICH = Library(Path(sys.executable).parent)
ULFM = Library(
    ROOT / ".venv-mpi-ft" / "bin",
    ("--with-ft", "ulfm", "--oversubscribe"),
    {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
)


class MpiRanks:
    """The processes of one mpiexec. ``arguments`` are those of ``slora-dist``; what is to be done to ranks is in ``plots``."""

    def __init__(self, drill: Drill, arguments: Sequence[str], plots: Mapping[int, Plot], size: int, library: Library) -> None:
        self.log, self.folder = drill.log, drill.folder / f"ranks-{size}"
        self.folder.mkdir()
        (self.folder / "sabotage").write_bytes(pickle.dumps(dict(plots)))
        rank = [str(library.bin / "python"), "-m", "drill.mpi_rank", str(self.folder), *arguments]
        self._command = [str(library.bin / "mpiexec"), *library.options, "-n", str(size), *rank]
        self._environ = {**os.environ, **SECRET, **library.environ, "TMPDIR": str(drill.folder)}

    def __enter__(self) -> "MpiRanks":
        with self.log.open("a", encoding="utf-8") as log:
            self._mpiexec = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._mpiexec.poll() is None:
            os.killpg(self._mpiexec.pid, signal.SIGKILL)
            self._mpiexec.wait()
        for pid in pids(self.folder).values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Return as soon as ``condition`` holds; raises ``TimeoutError`` after ``seconds``."""
        until(condition, seconds, what, self.log)

    def wait(self) -> int:
        """Return mpiexec's exit code, when it has ended and left no rank behind."""
        self.until(lambda: self._mpiexec.poll() is not None, SECONDS, "mpiexec to end")
        self.until(lambda: not any(map(alive, pids(self.folder).values())), LEFT_OVER, "the last rank to end")
        return int(self._mpiexec.returncode)


def kill(drill: Drill) -> Outcome:
    """A rank is killed: the job ends."""
    victim, point = _victim(drill), drill.draw.choice(POINTS)
    noticed = _ends(drill, {victim: partial(sabotage.at, point, drill.number, sabotage.kill, drill.mark)})
    return _resumed(drill, f"kill rank {victim}, round {drill.number}, {point}", noticed)


def kill_root(drill: Drill) -> Outcome:
    """Rank 0 is killed: the job ends."""
    point = drill.draw.choice(ROOT_POINTS)
    noticed = _ends(drill, {0: partial(sabotage.at, point, drill.number, sabotage.kill, drill.mark)})
    return _resumed(drill, f"kill rank 0, round {drill.number}, {point}", noticed)


def stop(drill: Drill) -> Outcome:
    """A rank stands still: who waits for it ends the job after ``comm.timeout``, and no rank is left, the one that stands still neither."""
    victim, point = _victim(drill), drill.draw.choice(POINTS)
    plots: dict[int, Plot] = dict.fromkeys(range(SIZE), partial(sabotage.hurry, TIMEOUT))
    plots[victim] = partial(sabotage.at, point, drill.number, sabotage.stop, drill.mark)
    noticed = _ends(drill, plots, f"not done after {TIMEOUT:g} s")
    return _resumed(drill, f"stop rank {victim}, round {drill.number}, {point}", max(0.0, noticed - TIMEOUT))


def slow(drill: Drill) -> Outcome:
    """A rank is late: nothing is lost."""
    victim, point = _victim(drill), drill.draw.choice(POINTS)
    with _start(drill, {victim: partial(sabotage.at, point, drill.number, sabotage.dawdle, drill.mark)}) as ranks:
        _ended(ranks, 0)
    assert drill.mark.exists()
    return drill.outcome(f"slow rank {victim}, round {drill.number}, {point}", None)


def nan_client(drill: Drill) -> Outcome:
    """A client's update is not a number: it is left out of that round and named."""
    client = drill.draw.randrange(CLIENTS)
    with _start(drill, dict.fromkeys(range(SIZE), partial(sabotage.nan_update, client, drill.number, drill.mark))) as ranks:
        noticed = drill.noticed(ranks, [f"client {client} is left out of round {drill.number}"])
        _ended(ranks, 0)
    return drill.outcome(f"NaN from client {client}, round {drill.number}", noticed, away({client: [drill.number, drill.number]}))


def corrupt_frame(drill: Drill) -> Outcome:
    """A damaged message ends the job with the line that says whose it was."""
    client = drill.draw.randrange(CLIENTS)
    plots = dict.fromkeys(range(SIZE), partial(sabotage.corrupt_frame, client, drill.number, drill.mark))
    return _resumed(drill, f"corrupt frame of client {client}, round {drill.number}", _ends(drill, plots, f"message of client {client}"))


def disk_full(drill: Drill) -> Outcome:
    """There is no room for a checkpoint, or for half of one: the job ends, the last good one survives."""
    deed = drill.draw.choice((sabotage.fill_disk, sabotage.tear_checkpoint))
    plots = {0: partial(sabotage.at, "checkpoint", drill.number, deed, drill.mark)}
    return _resumed(drill, f"{deed.__name__.replace('_', ' ')}, round {drill.number}", _ends(drill, plots, "[rank 0] failed"))


def requeue(drill: Drill) -> Outcome:
    """All ranks are told to go at the same moment, as before a requeue, and come again."""
    deed = partial(sabotage.end_all, drill.folder / f"ranks-{SIZE}")
    plots = {_victim(drill): partial(sabotage.at, drill.draw.choice(POINTS), drill.number, deed, drill.mark)}
    return _resumed(drill, f"requeue, round {drill.number}", _ends(drill, plots, "ended by SIGTERM"))


def ulfm_kill(drill: Drill) -> Outcome:
    """A rank is killed: the others make a communicator without it, and the run goes on."""
    return _survived(drill, "kill", sabotage.kill, HEALING)


def ulfm_stop(drill: Drill) -> Outcome:
    """A rank stands still: after ``comm.client_timeout`` it counts as dead, and the ranks on its machine kill it."""
    return _survived(drill, "stop", sabotage.stop, PATIENT, PATIENCE)


def lacking() -> str:
    """Return why these faults cannot be played with MPICH, nothing where they can."""
    return "" if (MPICH.bin / "mpiexec").exists() else "no mpiexec in the environment of this Python (pip install 'slora-dist[mpi]')"


def lacking_ulfm() -> str:
    """Return why these faults cannot be played with ULFM, nothing where they can."""
    return "" if (ULFM.bin / "mpiexec").exists() else "no Open MPI 5 in .venv-mpi-ft (make .venv-mpi-ft/.installed)"


def _victim(drill: Drill) -> int:
    return drill.draw.randrange(1, SIZE)


def _start(drill: Drill, plots: Mapping[int, Plot], *settings: str, library: Library = MPICH) -> MpiRanks:
    return MpiRanks(drill, drill.train("comm.backend=mpi", *settings), plots, SIZE, library)


def _ends(drill: Drill, plots: Mapping[int, Plot], *words: str) -> float:
    """Play a run that ends early; return the seconds until the log had one of ``words``, or until all was over where there are none."""
    with _start(drill, plots) as ranks:
        noticed = drill.noticed(ranks, words) if words else None
        assert ranks.wait(), "mpiexec says that all is well"
    assert drill.mark.exists(), "the fault did not come to pass"
    return drill.since() if noticed is None else noticed


def _survived(drill: Drill, name: str, deed: Deed, settings: Sequence[str], patience: float = 0.0) -> Outcome:
    """Play a run with ULFM that goes on without the rank to which ``deed`` is done; it counts as dead after ``patience`` seconds."""
    victim, point = _victim(drill), drill.draw.choice(POINTS)
    with _start(drill, {victim: partial(sabotage.at, point, drill.number, deed, drill.mark)}, *settings, library=ULFM) as ranks:
        noticed = drill.noticed(ranks, [f"rank {victim} is gone"])
        _ended(ranks, 3)
    injected = f"{name} rank {victim}, round {drill.number}, {point}"
    return drill.outcome(injected, max(0.0, noticed - patience), _without(victim, drill.number))


def _resumed(drill: Drill, injected: str, noticed: float) -> Outcome:
    """Play the rest under MPI, and compare with an undisturbed run."""
    size = drill.draw.choice(OTHER_SIZES)
    with MpiRanks(drill, ["train", "--resume", str(drill.run)], {}, size, MPICH) as ranks:
        _ended(ranks, 0)
    return drill.outcome(f"{injected}; then {size} rank{'s' * (size > 1)}", noticed)


def _ended(ranks: MpiRanks, wanted: int) -> None:
    code = ranks.wait()
    assert code == wanted, f"exit code {code}, should be {wanted}"


def _without(rank: int, number: int) -> str:
    """Return the setting by which the clients that live on a rank are away from a round on."""
    return away({client: [number] for client in range(CLIENTS) if client % (SIZE - 1) + 1 == rank})


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill rank 0": kill_root,
    "stop": stop,
    "slow rank": slow,
    "NaN client": nan_client,
    "corrupt frame": corrupt_frame,
    "disk full": disk_full,
    "requeue": requeue,
}
ULFM_FAULTS: dict[str, Fault] = {"kill": ulfm_kill, "stop": ulfm_stop}
