"""One ``train`` command on one rank: make everything ready, agree that all ranks are, play the rounds, leave the results."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from slora_dist import export, methods, model, settings, show
from slora_dist.admission import Admitted
from slora_dist.agreement import agree
from slora_dist.comm.base import Communicator
from slora_dist.comm.metered import Metered
from slora_dist.comm.mpi_comm import MpiComm
from slora_dist.comm.sealed import Sealed
from slora_dist.comm.shaped import Shaped
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.config import Config
from slora_dist.data.federation import Federation
from slora_dist.disk import writing
from slora_dist.ending import Where
from slora_dist.errors import ConfigError, RunError
from slora_dist.ledger import Ledger
from slora_dist.network import Network, routing
from slora_dist.privacy import check_accounting
from slora_dist.roundplan import check_world, home
from slora_dist.rounds.healing import regroup
from slora_dist.rounds.holdings import compare, holdings
from slora_dist.rounds.seat import Seat
from slora_dist.rounds.session import Session
from slora_dist.runfolder import Checkpoint, RunFolder
from slora_dist.scalars import Scalars
from slora_dist.summary import summarize
from slora_dist.support import Support


class Job:
    """What a rank needs for a run. It keeps ``where`` up to date."""

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        out: Path,
        device: torch.device,
        where: Where | None = None,
        admitted: Admitted | None = None,
        launch: str | None = None,
    ) -> None:
        """``admitted`` is what the ranks have proved to each other; ``comm.encrypt`` needs it for its key.

        ``launch`` names who has started the ranks, and starts them anew when one dies: the run then goes on.
        """
        ledger = admitted.ledger if admitted else Ledger(comm.rank)
        self.sealed = Sealed(comm, _session(admitted)) if config.comm.encrypt and comm.size > 1 else None
        self.where = where or Where()
        self.config, self.folder, self.device = config, RunFolder(out), device
        self.where.finish = self.folder.finish
        self.shaped = Shaped(self.sealed or comm, routing(config)) if config.network.mode == "sleep" else None
        self.comm = Metered(self.shaped or self.sealed or comm, ledger, self.sealed.carried if self.sealed else int)
        self.group = comm if isinstance(comm, TorchComm | MpiComm) and comm.generations else None
        self.admitted, self.launch = admitted, launch
        self.checkpoint: Checkpoint | None = None
        self.tracker: Scalars | None = None

    def run(self, resume: bool, stop_after: int | None, track: str | None = None) -> bool:
        """Play the run to its end, or to round ``stop_after``; ``track`` names a tracker that gets every round as it ends.

        With ``resume``, or begun by this launch, it goes on from the last checkpoint, where there is one. Returns whether all ranks were
        there at the end.

        Raises ``ConfigError`` on all ranks alike, before any training; what a rank finds wrong later is a ``RunError``.
        """
        session = self._join() if self.group and self.group.generations and self.group.generations.joins else self.prepare(resume, track)
        done = self.checkpoint.values["round"] if self.checkpoint else 0
        try:
            self._play(session, done, stop_after)
        except ConfigError as error:
            if self.comm.size == 1:
                raise
            raise RunError(str(error)) from error  # this rank alone knows: the others would wait for it in vain
        if self.tracker:
            self.tracker.close()
        if session.is_root:
            self._leave_results(session)
        return len(self.comm.members) == self.comm.size

    def _play(self, session: Session, done: int, stop_after: int | None) -> None:
        judged = done - bool(self.checkpoint and self.checkpoint.values["unjudged"])  # that round's record is still to come
        with show.Progress(session.rounds, judged) if session.is_root else nullcontext() as progress:
            for record in session.play(self.checkpoint, stop_after):
                if progress:
                    progress.advance(record)
                if self.tracker:
                    self.tracker.add(record)

    def _join(self) -> Session:
        """Return the session of a rank that joins a run under way, once the others have taken it in."""
        assert self.group and self.group.generations
        session = self._prepare(resume=False)
        regroup(self.group)
        if self.sealed:
            self.sealed.restart(self.group.generations.number)
        return session

    def prepare(self, resume: bool, track: str | None = None) -> Session:
        """Return the session once all ranks are ready for it; raises the first rank's ``ConfigError`` on all of them."""
        session, problem = None, None
        try:
            session = self._prepare(resume)
            if track and session.is_root:
                settings, earlier = self.config.model_dump(), self.folder.lines("metrics")
                self.tracker = Scalars(track, self.folder.path.name, settings, self.folder.path / track, earlier)
        except ConfigError as error:
            problem = error
        try:
            agree(self.comm, problem)
        except ConfigError:
            self.folder.discard()
            raise
        assert session
        return session

    def _prepare(self, resume: bool) -> Session:
        """Find out now all that could go wrong later: settings against model, data, world and folder."""
        rank, size = self.comm.rank, self.comm.size
        check_world(self.config, size)
        check_accounting(self.config)
        federation = Federation(self.config, model.tokenizer(self.config.model))
        classifier = model.load(self.config.model, federation.names, self.config.run.seed)
        model.fit(classifier, federation.tokenizer, self.config.data.max_length)
        federation.vocabulary = model.vocabulary(classifier)
        federation.open(_at_home(self.config, rank, size))
        method, seed = self.config.method, self.config.run.seed
        supports = [methods.support(phase, classifier, method, seed) for phase in method.resolved()]
        network = Network(self.config, self.shaped)
        seat = Seat(self.config, self.comm, classifier, federation, self.folder, self.device, self.where, network, self.group, self.sealed)
        if seat.is_root:
            seat.test = federation.test()
            self._open_folder(resume)
        self._tell_holdings(seat, supports)
        return Session(seat)

    def _tell_holdings(self, seat: Seat, supports: Sequence[Support]) -> None:
        """Let a rank that joins tell rank 0 what it has loaded, and rank 0 judge it by what it has itself."""
        generations = self.group.generations if self.group else None
        if generations and self.admitted and (seat.is_root or generations.joins):
            own = holdings(seat.classifier, seat.federation, supports)
            generations.begin(self.admitted.session, own, partial(compare, own))

    def _open_folder(self, resume: bool) -> None:
        if self.folder.exists() and (resume or self.folder.begun_by(self.launch)):
            settings.require_equal(self.folder.config(), self.config)
            self.checkpoint = self.folder.latest()
            _check_place(self.config, self.checkpoint)
            done = self.checkpoint.values["round"] if self.checkpoint else -1
            self.folder.rewind(done, bool(self.checkpoint and self.checkpoint.values["unjudged"]))
        else:
            world = {"size": self.comm.size, "transport": self.comm.comm.name}
            self.folder.create(self.config, world | ({"launch": self.launch} if self.launch else {}))

    def _leave_results(self, session: Session) -> None:
        result = session.result()
        if result is None:
            show.stopped(self.folder)
            return
        summary = summarize(self.config, self.folder, session.seat.classifier, session.seat.switch, self.comm.size)
        summary |= {"lost": session.seat.all_lost, "clock_error_seconds": session.clock_error}
        self.folder.reopen()
        self.folder.write_parquet()
        with writing(self.folder.adapter):
            export.write(result, self.folder.adapter)
        self.folder.write_summary(summary)  # the last one: where it is, the run is finished
        show.finished(self.folder, summary)


def _session(admitted: Admitted | None) -> bytes:
    assert admitted, "comm.encrypt without an admission: nothing to make a key of"
    return admitted.session


def _check_place(config: Config, checkpoint: Checkpoint | None) -> None:
    """Raise ``ConfigError`` when a checkpoint is of a round or a phase that this run has not."""
    phases = [at for at, phase in enumerate(config.method.resolved()) for _ in range(phase.rounds)]
    if checkpoint:
        number, at = checkpoint.values["round"], checkpoint.values["phase"]
        if not 1 <= number <= len(phases) or phases[number - 1] != at:
            raise ConfigError("--resume", f"the checkpoint is of round {number} and phase {at}", "a checkpoint of this run's settings")


def _at_home(config: Config, rank: int, size: int) -> Sequence[int]:
    return [client for client in range(config.clients.count) if home(client, size) == rank]
