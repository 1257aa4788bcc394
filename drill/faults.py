"""Faults over gloo: ranks on this machine, forked from this process. What is done, what has to come of it, and with which run the result is
compared bit for bit.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from drill import sabotage
from drill.one import HEALING, PATIENCE, PATIENT, RANKS, ROUNDS, SECONDS, Drill, Fault, Outcome, away, payload
from drill.ranks import STEP, Saboteur, rounds
from drill.sabotage import POINTS, ROOT_POINTS
from slora_dist.comm.line import FRAME_SECONDS


def kill(drill: Drill, *settings: str, points: Sequence[str] = POINTS, planned: Sequence[str] | None = None) -> Outcome:
    """A client's rank is killed: the round closes without it, and the run goes on. The reference has the settings ``planned``."""
    point = drill.draw.choice(points)
    with drill.start({drill.victim: sabotage.at(point, drill.number, sabotage.kill, drill.mark)}, *HEALING, *settings) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        _ended(ranks.wait(SECONDS), {drill.victim: -signal.SIGKILL}, 3)
    injected = f"kill rank {drill.victim}, round {drill.number}, {point}"
    return drill.outcome(injected, noticed, *(settings if planned is None else planned), away({drill.client: [drill.number]}))


def kill_masked(drill: Drill) -> Outcome:
    """A client is missing whose masks are in the others' messages: they mask anew, and the sums are those of a run in the clear."""
    collective = f"comm.collective={drill.draw.choice(('gather', 'reduce'))}"
    return kill(drill, "comm.sum=exact", "comm.secure=true", collective, points=("upload",), planned=("comm.sum=exact",))


def kill_chooser(drill: Drill) -> Outcome:
    """A client that has helped to choose the mask is gone in the first round, when all have sent: the others choose and train anew."""
    drill.number = 1
    return kill(drill, "method.sparse.mask=gradient", points=("ledger",))


def kill_sampled(drill: Drill) -> Outcome:
    """Not every client is in every round, and who lacks what follows from the rounds before, of which the dead one was part."""
    drill.number = 8
    settings = ("clients.per_round=2", "method.lowrank.rule=ffa")
    outcome = kill(drill, *settings, points=("broadcast",))
    twin = drill.reference(*settings, away({drill.client: [drill.number]}))
    return dataclasses.replace(outcome, equal=outcome.equal and payload(drill.run) == payload(twin))


def kill_two(drill: Drill) -> Outcome:
    """Two die, at the same or at different times."""
    other = drill.victim % (RANKS - 1) + 1
    later = drill.draw.randrange(drill.number, ROUNDS + 1)
    points = drill.draw.choice(POINTS), drill.draw.choice(POINTS)
    saboteurs = {
        drill.victim: sabotage.at(points[0], drill.number, sabotage.kill, drill.mark),
        other: sabotage.at(points[1], later, sabotage.kill, drill.folder / "second"),
    }
    with drill.start(saboteurs, *HEALING) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        _ended(ranks.wait(SECONDS), {drill.victim: -signal.SIGKILL, other: -signal.SIGKILL}, 3)
    planned = away({drill.client: [drill.number], other - 1: [later]})
    return drill.outcome(f"kill ranks {drill.victim} and {other}, rounds {drill.number} and {later}", noticed, planned)


def replace(drill: Drill, *settings: str, point: str = "training", planned: Sequence[str] = ()) -> Outcome:
    """A rank is killed, and a new one takes its place in a later round, after others that are refused.

    Of the ``settings`` those that change bits are ``planned`` as well.
    """
    drill.number = min(drill.number, ROUNDS - 4)
    slow = {0: _slowly(drill)}
    with drill.start({drill.victim: sabotage.at(point, drill.number, sabotage.kill, drill.mark), **slow}, *HEALING, *settings) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        ranks.until(lambda: drill.victim in ranks.codes and rounds(drill.run) >= drill.number, SECONDS, "a round without the victim")
        ranks.start_one(drill.victim, None, "--join", "method.sparse.lr=0.125")
        assert ranks.wait(SECONDS, drill.victim) == {drill.victim: 2}
        refused = f"error: method.sparse.lr: rank {drill.victim} has 0.125, rank 0 has "
        assert f"[rank {drill.victim}] {refused}" in drill.log.read_text(encoding="utf-8")
        ranks.start_one(drill.victim, sabotage.another_snapshot, "--join")
        assert ranks.wait(SECONDS, drill.victim) == {drill.victim: 2}
        refused = f"error: model.name: rank {drill.victim} has loaded other weights than rank 0"
        assert f"[rank {drill.victim}] {refused}" in drill.log.read_text(encoding="utf-8")
        ranks.start_one(drill.victim, None, "--join")
        _ended(ranks.wait(SECONDS), {}, 0)
    records = [json.loads(line) for line in (drill.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(record["round"] for record in records if record["missing"]["clients"])
    assert last < ROUNDS
    injected = f"replace rank {drill.victim}, round {drill.number}"
    return drill.outcome(injected, noticed, *planned, away({drill.client: [drill.number, last]}))


def replace_owing(drill: Drill) -> Outcome:
    """What the dead rank's client owes is that of the last round that it took part in: it dies when it has noted what it would owe now."""
    settings = ("comm.wire.topk=0.2", "comm.wire.indices=gap")
    return replace(drill, *settings, point="upload", planned=settings)


def stop(drill: Drill) -> Outcome:
    """A rank stands still: after ``comm.client_timeout`` it counts as dead, and when it wakes it ends itself."""
    point = drill.draw.choice(POINTS)
    with drill.start({drill.victim: sabotage.at(point, drill.number, sabotage.stop, drill.mark)}, *PATIENT) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        survivors = [rank for rank in range(RANKS) if rank != drill.victim]
        _ended(ranks.wait(SECONDS, *survivors), {}, 3)
        ranks.send(signal.SIGCONT, drill.victim)
        assert ranks.wait(SECONDS, drill.victim) == {drill.victim: 1}
    injected = f"stop rank {drill.victim}, round {drill.number}, {point}"
    return drill.outcome(injected, max(0.0, noticed - PATIENCE), away({drill.client: [drill.number]}))


def drop_link(drill: Drill) -> Outcome:
    """A rank loses all its connections: the others go on, it ends itself."""
    point = drill.draw.choice(POINTS[1:])
    with drill.start({drill.victim: sabotage.at(point, drill.number, sabotage.drop_links, drill.mark)}, *HEALING) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        _ended(ranks.wait(SECONDS), {drill.victim: 1}, 3)
    return drill.outcome(f"cut off rank {drill.victim}, round {drill.number}, {point}", noticed, away({drill.client: [drill.number]}))


def suspend(drill: Drill) -> Outcome:
    """All ranks stand still for longer than ``comm.client_timeout``, as SLURM suspends a job, and go on: nothing is lost."""
    with drill.start({}, *PATIENT) as ranks:
        ranks.until(lambda: rounds(drill.run) >= drill.number - 1, SECONDS, "a round")
        ranks.send(signal.SIGSTOP, *range(RANKS))
        time.sleep(1.5 * max(PATIENCE, FRAME_SECONDS))
        ranks.send(signal.SIGCONT, *range(RANKS))
        _ended(ranks.wait(SECONDS), {}, 0)
    return drill.outcome(f"suspend all ranks, round {drill.number}", None)


def stop_root(drill: Drill) -> Outcome:
    """Rank 0 stands still: the others leave, and their exit code tells why. It is killed then, as the scripts do, and the run resumed."""
    point = drill.draw.choice(ROOT_POINTS)
    with drill.start({0: sabotage.at(point, drill.number, sabotage.stop, drill.mark)}, *PATIENT) as ranks:
        noticed = drill.noticed(ranks, ["rank 0 is gone, or has given this rank up (silent"])
        _ended(ranks.wait(SECONDS, *range(1, RANKS)), {}, 4)
        ranks.send(signal.SIGKILL, 0)
        assert ranks.wait(SECONDS, 0) == {0: -signal.SIGKILL}
    drill.resume(RANKS)
    return drill.outcome(f"stop rank 0, round {drill.number}, {point}", max(0.0, noticed - FRAME_SECONDS))


def slow_link(drill: Drill) -> Outcome:
    """A rank is late: nothing is lost."""
    point = drill.draw.choice(POINTS)
    with drill.start({drill.victim: sabotage.at(point, drill.number, sabotage.dawdle, drill.mark)}, *HEALING) as ranks:
        _ended(ranks.wait(SECONDS), {}, 0)
    return drill.outcome(f"slow rank {drill.victim}, round {drill.number}, {point}", None)


def nan_client(drill: Drill) -> Outcome:
    """A client's update is not a number: it is left out of that round and named."""
    with drill.start({drill.victim: sabotage.nan_update(drill.client, drill.number, drill.mark)}) as ranks:
        noticed = drill.noticed(ranks, [f"client {drill.client}"])
        _ended(ranks.wait(SECONDS), {}, 0)
    planned = away({drill.client: [drill.number, drill.number]})
    return drill.outcome(f"NaN from client {drill.client}, round {drill.number}", noticed, planned)


def corrupt_frame(drill: Drill) -> Outcome:
    """A damaged message ends the run with the line that says whose it was; what was finished is resumed."""
    with drill.start({drill.victim: sabotage.corrupt_frame(drill.client, drill.number, drill.mark)}) as ranks:
        noticed = drill.noticed(ranks, [f"message of client {drill.client}"])
        assert ranks.wait(SECONDS)[0] == 1
    drill.resume(drill.draw.choice((1, 3, 5)))
    return drill.outcome(f"corrupt frame of client {drill.client}, round {drill.number}", noticed)


def kill_root(drill: Drill) -> Outcome:
    """Rank 0 is killed: all others end by themselves; the run is resumed, on any number of ranks."""
    point = drill.draw.choice(ROOT_POINTS)
    with drill.start({0: sabotage.at(point, drill.number, sabotage.kill, drill.mark)}, *drill.draw.choice(((), HEALING))) as ranks:
        noticed = drill.noticed(ranks, ["[rank 0] died"])
        codes = ranks.wait(SECONDS)
        assert codes.pop(0) == -signal.SIGKILL and all(codes.values()), codes
    drill.resume(drill.draw.choice((1, 2, 5)) if "min_clients" not in drill.log.read_text(encoding="utf-8") else RANKS)
    return drill.outcome(f"kill rank 0, round {drill.number}, {point}", noticed)


def disk_full(drill: Drill) -> Outcome:
    """There is no room for a checkpoint, or for half of one: the last good one survives."""
    deed = drill.draw.choice((sabotage.fill_disk, sabotage.tear_checkpoint))
    with drill.start({0: sabotage.at("checkpoint", drill.number, deed, drill.mark)}) as ranks:
        noticed = drill.noticed(ranks, ["[rank 0] failed"])
        assert ranks.wait(SECONDS)[0] == 1
    drill.resume(drill.draw.choice((1, 3, 5)))
    return drill.outcome(f"{deed.__name__.replace('_', ' ')}, round {drill.number}", noticed)


def requeue(drill: Drill) -> Outcome:
    """All ranks are told to go, as before a requeue, and come again, on another number of ranks."""
    with drill.start({drill.victim: sabotage.at(drill.draw.choice(POINTS), drill.number, sabotage.end, drill.mark)}) as ranks:
        noticed = drill.noticed(ranks, ["ended by SIGTERM"])
        ranks.send(signal.SIGTERM, *range(RANKS))
        codes = ranks.wait(SECONDS)
        assert all(codes.values()), codes
    drill.resume(drill.draw.choice((1, 2, 4, 5)))
    return drill.outcome(f"requeue, round {drill.number}", noticed)


def _slowly(drill: Drill) -> Saboteur:
    """Give the newcomer time to come: rank 0 waits before each round after the victim's death until it is there."""

    def saboteur() -> None:
        from slora_dist.rounds import session

        play = session.Session._round

        def played(self: session.Session, stage: object, this: int) -> object:
            group = self.seat.group
            if this == ROUNDS - 1 and group and group.generations:
                deadline = time.monotonic() + SECONDS
                while len(group.members) < group.size and not group.generations.lifeline.newcomers() and time.monotonic() < deadline:
                    time.sleep(STEP)
            return play(self, stage, this)  # type: ignore[arg-type]

        session.Session._round = played  # type: ignore[method-assign, assignment]

    return saboteur


def _ended(codes: Mapping[int, int], own: Mapping[int, int], others: int) -> None:
    wanted = {rank: own.get(rank, others) for rank in codes}
    assert codes == wanted, f"exit codes {codes}, should be {wanted}"


def _with(fault: Callable[..., Outcome], *settings: str) -> Fault:
    return lambda drill: fault(drill, *settings)


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill two": kill_two,
    "replace": replace,
    "stop": stop,
    "dropped link": drop_link,
    "slow link": slow_link,
    "NaN client": nan_client,
    "corrupt frame": corrupt_frame,
    "kill rank 0": kill_root,
    "disk full": disk_full,
    "requeue": requeue,
}
ON_DEMAND: dict[str, Fault] = {  # played only where they are named
    "kill, masked": kill_masked,
    "kill, chooser": kill_chooser,
    "kill, sampled": kill_sampled,
    "suspend": suspend,
    "stop rank 0": stop_root,
    "replace, sealed": _with(replace, "comm.encrypt=true"),
    "replace, owing": replace_owing,
    "kill, overlap": _with(kill, "server.evaluate=overlap"),
    "kill, keep": _with(
        kill, "method.lowrank.residual=keep", "method.sparse.mask=gradient", "method.sparse.rounds=3", "method.lowrank.rounds=7"
    ),
    "kill, fedex": _with(kill, "method.lowrank.rule=fedex", "server.momentum=0"),
    "kill, stack": _with(kill, "method.lowrank.rule=stack", "server.momentum=0"),
}
