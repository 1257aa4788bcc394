"""The lifeline: who is let in, who counts as gone, and how the others meet again. All ends are in this process."""

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from drill.processes import until
from slora_dist.comm import line, root_lifeline
from slora_dist.comm.lifeline import GENERATION_BYTES, READY, Healing, Meeting, RankLifeline
from slora_dist.comm.line import MAX_ACCOUNT, NONCE, Line, await_sign, call, take
from slora_dist.comm.root_lifeline import RootLifeline
from slora_dist.errors import ConfigError, RootGone, RunError

SECRET, ACCOUNT, PATIENCE, SECONDS = b"secret", b"who I am", 30.0, 30.0
SESSION = b"k" * 32
HOST = "127.0.0.1"


def healing(secret: bytes = SECRET, account: bytes = ACCOUNT, joins: bool = False, patience: float = PATIENCE) -> Healing:
    return Healing(patience, secret, account, judge, joins)


def judge(rank: int, account: bytes) -> ConfigError | None:
    return None if account == ACCOUNT else ConfigError("a.setting", f"rank {rank} is {account.decode()}", ACCOUNT.decode())


@contextmanager
def world(size: int, patience: float = PATIENCE) -> Iterator[tuple[RootLifeline, dict[int, RankLifeline]]]:
    root = RootLifeline(socket.create_server((HOST, 0)), size, healing(patience=patience))
    ranks = {rank: RankLifeline(HOST, root.port, rank, healing(), SECONDS) for rank in range(1, size)}
    try:
        yield root, ranks
    finally:
        for rank in ranks.values():
            rank.close()
        root.close()


def meet(root: RootLifeline, *ranks: RankLifeline, newcomer: RankLifeline | None = None) -> list[Meeting]:
    """Let all ends meet at the same time, as processes would; a ``newcomer`` is ready before."""
    found: dict[int, Meeting] = {}

    def one(at: int, end: RootLifeline | RankLifeline) -> None:
        found[at] = end.meet(SECONDS)

    threads = [threading.Thread(target=one, args=(at, end)) for at, end in enumerate([newcomer, root, *ranks]) if end]
    for thread in threads:
        thread.start()
        if newcomer and thread is threads[0]:
            until(lambda: bool(root.newcomers()), "the newcomer to be ready", SECONDS)
    for thread in threads:
        thread.join(SECONDS)
    return [found[at] for at in sorted(found)]


def tell(over: threading.Event) -> Callable[[int], None]:
    return lambda _: over.set()


def test_all_meet_then_those_who_are_left() -> None:
    with world(4) as (root, ranks):
        over = {rank: threading.Event() for rank in range(4)}
        for rank, end in {0: root, **ranks}.items():
            end.on_over = tell(over[rank])
        assert meet(root, *ranks.values()) == [Meeting(0, (0, 1, 2, 3))] * 4
        ranks[2]._line.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does when the process is killed
        assert all(over[rank].wait(SECONDS) for rank in (0, 1, 3)), "everybody learns that the generation is over"
        assert [(loss.rank, loss.reason) for loss in root.losses] == [(2, "its connection closed")]
        assert meet(root, ranks[1], ranks[3]) == [Meeting(1, (0, 1, 3))] * 3
        assert root.ended(0) and not root.ended(1) and ranks[1].ended(0) and not ranks[1].ended(1)


def test_silence_counts_as_death() -> None:
    with world(3, patience=2.0) as (root, ranks):
        meet(root, *ranks.values())
        over = threading.Event()
        root.on_over = tell(over)
        ranks[1]._line.send = lambda *_: None  # type: ignore[method-assign]  # its heart stops, its connection stays
        assert over.wait(SECONDS)
        assert [(loss.rank, loss.reason) for loss in root.losses] == [(1, "silent for 2 s")]
        with pytest.raises(RunError, match="given this rank up") as found:
            ranks[1].meet(SECONDS)
        assert not isinstance(found.value, RootGone), "rank 0 lives"


def test_a_rank_0_that_is_silent_is_told_from_one_that_has_gone() -> None:
    with world(2) as (root, ranks):
        meet(root, *ranks.values())
        ranks[1].patience = 1.0
        send, beats = root._send, iter(range(2))  # then its heart stops, and its connection stays
        root._send = lambda *frame: send(*frame) if next(beats, None) is not None else None  # type: ignore[method-assign]
        with pytest.raises(RootGone, match=r"\(silent for 1 s\)"):
            ranks[1].meet(SECONDS)


def test_a_new_rank_takes_the_place_of_a_dead_one() -> None:
    with world(3) as (root, ranks), pytest.MonkeyPatch.context() as patch:
        meet(root, *ranks.values())
        root.session = SESSION
        over = threading.Event()
        root.on_over = tell(over)
        ranks[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert over.wait(SECONDS)
        assert meet(root, ranks[2]) == [Meeting(1, (0, 2))] * 2 and root.newcomers() == []
        travelled: list[bytes] = []
        patch.setattr(line, "take", lambda connection, *size: travelled.append(take(connection, *size)) or travelled[-1])
        ranks[1] = RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        assert ranks[1].session == SESSION and ranks[2].session == b"", "a newcomer has not been at the admission, where the key is made"
        assert ACCOUNT in travelled and not any(SESSION in part for part in travelled), "the key is sealed"
        assert meet(root, ranks[2]) == [Meeting(2, (0, 2))] * 2, "nobody waits for one that still loads its model"
        assert meet(root, ranks[2], newcomer=ranks[1]) == [Meeting(3, (0, 1, 2))] * 3
        assert root.newcomers() == []


def test_a_newcomer_that_has_loaded_something_else_is_refused_and_the_generation_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        other = ConfigError("model.name", "rank 1 has loaded other weights than rank 0", "the same")
        root.begin(SESSION, b"", lambda rank, holdings: None if (rank, holdings) == (1, b"as rank 0 has it") else other)
        ranks[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert meet(root, ranks[2]) == [Meeting(1, (0, 2))] * 2
        stranger = RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        stranger.begin(SESSION, b"another snapshot", judge)
        with pytest.raises(ConfigError, match=r"model\.name: rank 1 has loaded other weights"):
            stranger.meet(SECONDS)
        assert not root.ended(1) and root.newcomers() == [] and len(root.losses) == 1
        assert f"refused rank 1: {other}" in capfd.readouterr().err
        ranks[1] = RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        ranks[1].begin(SESSION, b"as rank 0 has it", judge)
        assert meet(root, ranks[2], newcomer=ranks[1]) == [Meeting(2, (0, 1, 2))] * 3


def test_a_rank_that_has_joined_may_still_be_sent_away_and_others_may_not() -> None:
    """What it makes of the model may differ by its processor, which shows later."""
    error = ConfigError("--join", "rank 1 has another mask", "the same")
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        root.session = SESSION
        assert not root.refuse(1, error) and not root.ended(0)
        ranks[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert meet(root, ranks[2]) == [Meeting(1, (0, 2))] * 2
        ranks[1] = RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        assert meet(root, ranks[2], newcomer=ranks[1]) == [Meeting(2, (0, 1, 2))] * 3
        assert root.refuse(1, error) and not root.refuse(2, error)
        with pytest.raises(ConfigError, match="rank 1 has another mask"):
            ranks[1].meet(SECONDS)
        assert meet(root, ranks[2]) == [Meeting(3, (0, 2))] * 2 and root.losses[-1].reason == str(error)


@pytest.mark.parametrize("introduced", [True, False], ids=["introduced", "still introducing itself"])
def test_a_newcomer_that_comes_to_the_end_does_not_wait(introduced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> bytes:
        root.close()
        return SESSION

    with world(2) as (root, ranks):
        meet(root, *ranks.values())
        root.session = SESSION
        ranks[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert meet(root) == [Meeting(1, (0,))]
        if not introduced:
            monkeypatch.setattr(root, "_judge", end)
        ranks[1] = RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        root.close()
        with pytest.raises(RunError, match="the run has ended"):
            ranks[1].meet(SECONDS)


def test_a_meeting_that_is_over_before_it_was_heard_of_is_not_waited_for() -> None:
    """Somebody dies just after the call: who has not woken yet must leave that generation, too, and not wait for the next one."""
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        for rank in ranks.values():
            rank._line.send(READY, bytes(GENERATION_BYTES))
        assert root.meet(SECONDS) == Meeting(1, (0, 1, 2))
        until(lambda: all(rank._meeting.generation == 1 for rank in ranks.values()), "both to hear of the meeting", SECONDS)
        ranks[2]._line.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: ranks[1].ended(1), "the end of the generation", SECONDS)
        assert ranks[1].meet(SECONDS) == Meeting(1, (0, 1, 2)) and ranks[1].ended(1)
        assert meet(root, ranks[1]) == [Meeting(2, (0, 1))] * 2


def test_who_has_said_goodbye_is_not_waited_for() -> None:
    """It is through with the run, where the others have to begin the end of it anew."""
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        ranks.pop(1).close()
        assert meet(root, ranks[2]) == [Meeting(1, (0, 2))] * 2 and not root.losses


def test_time_in_which_a_rank_stood_still_itself_is_no_silence_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is suspended as a whole finds everybody alive when it wakes."""
    one, other = socket.socketpair()

    class Poll:
        """Looks in which this process is stopped, whatever that takes; after two of them something comes."""

        looks = 0

        def register(self, *_: object) -> None: ...

        def poll(self, _: float) -> list[int]:
            Poll.looks += 1
            return [1] if Poll.looks == 3 else []

    monkeypatch.setattr(line.select, "poll", Poll)
    await_sign(one, 60.0)
    with pytest.raises(TimeoutError):
        await_sign(one, 60.0)
    assert Poll.looks == 3 + 120
    one.close()
    other.close()


def test_the_end_of_rank_0_is_the_end_of_all() -> None:
    root = RootLifeline(socket.create_server((HOST, 0)), 2, healing())
    rank = RankLifeline(HOST, root.port, 1, healing(), SECONDS)
    meet(root, rank)
    over = threading.Event()
    rank.on_over = tell(over)
    root._lines[1].socket.shutdown(socket.SHUT_RDWR)
    assert over.wait(SECONDS) and rank.ended(0)
    with pytest.raises(RunError, match="rank 0 is gone"):
        rank.meet(SECONDS)
    root.close()


def test_the_first_meeting_names_who_has_not_come() -> None:
    root = RootLifeline(socket.create_server((HOST, 0)), 3, healing())
    with pytest.raises(RunError, match="rank 1 has not come"):
        root.meet(0.1)
    root.close()


@pytest.mark.parametrize(
    ("own", "rank", "reason"),
    [
        (healing(secret=b"guessed"), 1, "does not hold the job's secret"),
        (healing(account=b"somebody else", joins=True), 1, "a.setting: rank 1 is somebody else. Allowed: who I am."),
        (healing(account=b"x" * (MAX_ACCOUNT + 1), joins=True), 1, "announces 65537 bytes, allowed are 65536"),
        (healing(), 7, "calls itself rank 7 of 2"),
        (healing(), 0, "calls itself rank 0 of 2"),
    ],
)
def test_strangers_are_refused_and_the_job_waits_on(own: Healing, rank: int, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = RootLifeline(socket.create_server((HOST, 0)), 2, healing())
    root.session = SESSION
    with pytest.raises((RunError, ConnectionError, ConfigError)):
        RankLifeline(HOST, root.port, rank, own, SECONDS)
    told = ""
    while reason not in told:  # rank 0 may still be speaking
        told += capfd.readouterr().err
    member = RankLifeline(HOST, root.port, 1, healing(), SECONDS)
    with pytest.raises((RunError, ConnectionError)):
        RankLifeline(HOST, root.port, 1, healing(), SECONDS)._line.receive()
    assert "rank 1 is here already" in capfd.readouterr().err
    assert meet(root, member)[0].members == (0, 1)
    member.close()
    root.close()


def test_a_call_that_cannot_be_taken_ends_no_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than may be pending at a time: each gives its place back."""
    monkeypatch.setattr(root_lifeline, "PENDING", 2)
    monkeypatch.setattr(root_lifeline, "BEAT", 0.01)

    class Crowded(socket.socket):
        left = 3

        def accept(self) -> tuple[socket.socket, object]:
            self.left -= 1
            if self.left >= 0:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    listener = socket.create_server((HOST, 0))
    root = RootLifeline(Crowded(fileno=listener.detach()), 2, healing())
    for _ in range(3):
        with pytest.raises(RunError, match="rank 1: rank 0 closed the connection: does this rank hold the job's secret"):
            RankLifeline(HOST, root.port, 1, healing(secret=b"guessed"), SECONDS)
    member = RankLifeline(HOST, root.port, 1, healing(), SECONDS)
    assert meet(root, member)[0].members == (0, 1)
    member.close()
    root.close()


def test_a_rank_that_breaks_what_hears_it_is_gone_and_another_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        monkeypatch.setattr(root, "_ready", lambda *_: (_ for _ in ()).throw(RecursionError))
        ranks[1]._line.send(READY)
        until(lambda: bool(root.losses), "rank 1 to be lost", SECONDS)
        assert [loss.rank for loss in root.losses] == [1] and 1 not in root._lines


def test_a_newcomer_is_told_why_it_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with world(2) as (root, _):
        with pytest.raises(ConfigError, match="--join: the run has not begun"):
            RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        root.session = SESSION
        with pytest.raises(ConfigError, match="--join: rank 1 is here already"):
            RankLifeline(HOST, root.port, 1, healing(joins=True), SECONDS)
        root._lines.pop(1).close()
        with pytest.raises(ConfigError, match=r"a\.setting: rank 1 is another"):
            RankLifeline(HOST, root.port, 1, healing(account=b"another", joins=True), SECONDS)
        told = ""
        while told.count("refused a connection") < 3:  # rank 0 says so, too, when it has answered
            told += capfd.readouterr().err


def test_a_rank_that_is_started_again_without_join_is_told_to_join() -> None:
    """It would go through the start while the others are in the middle of the run."""
    with world(3) as (root, ranks):
        meet(root, *ranks.values())
        root.session = SESSION
        ranks[1]._line.socket.shutdown(socket.SHUT_RDWR)
        assert meet(root, ranks[2])[0].members == (0, 2)
        with pytest.raises(ConfigError, match="--join: not given, and the run that rank 1 comes to is under way"):
            RankLifeline(HOST, root.port, 1, healing(), SECONDS)
        assert root.newcomers() == []


def test_a_rank_does_not_talk_to_a_root_without_the_secret() -> None:
    listener = socket.create_server((HOST, 0))

    def impostor() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"n" * NONCE)
        take(connection, 9 + 2 * NONCE)
        connection.sendall(b"x" * (NONCE + 5))

    thread = threading.Thread(target=impostor)
    thread.start()
    with socket.create_connection(listener.getsockname()) as connection, pytest.raises(RunError, match="does not hold the job's secret"):
        call(connection, SECRET, b"", 1, False)
    thread.join()
    listener.close()


def test_a_forged_frame_is_refused() -> None:
    with world(2) as (root, ranks):
        meet(root, ranks[1])
        over = threading.Event()
        root.on_over = tell(over)
        Line(ranks[1]._line.socket, b"another key", b"rank", b"root").send(0)  # whoever is on the way does not know the key
        assert over.wait(SECONDS)
        assert "did not send" in root.losses[0].reason
