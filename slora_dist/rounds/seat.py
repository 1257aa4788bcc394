"""What a rank holds throughout a run, and the few things that it does in every part of it.

Legend: N coordinates, B bytes.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from slora_dist import model
from slora_dist.clientstate import ClientStates
from slora_dist.comm.metered import Metered
from slora_dist.comm.mpi_comm import MpiComm
from slora_dist.comm.sealed import Sealed
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.config import Config
from slora_dist.data.federation import Federation
from slora_dist.data.tokens import Encoded
from slora_dist.ending import Where
from slora_dist.evaluate import Score, evaluate
from slora_dist.journal import Journal
from slora_dist.ledger import Label
from slora_dist.model import TaskModel
from slora_dist.network import Network
from slora_dist.roundplan import home
from slora_dist.runfolder import RunFolder
from slora_dist.stage import Stage
from slora_dist.wire import Wire


class Seat:
    """One rank's place in a run: settings, transport, model, data, files, and what the run has come to so far."""

    def __init__(
        self,
        config: Config,
        comm: Metered,
        classifier: TaskModel,
        federation: Federation,
        folder: RunFolder,
        device: torch.device,
        where: Where,
        network: Network,
        group: TorchComm | MpiComm | None = None,
        sealed: Sealed | None = None,
    ) -> None:
        self.config, self.comm, self.classifier, self.federation, self.folder = config, comm, classifier, federation, folder
        self.is_root = comm.rank == 0
        generations = group.generations if group else None
        self.where, self.journal = where, Journal(comm.ledger, generations.lifeline.sockets if generations else tuple)
        self.device, self.network = device, network
        self.group, self.sealed = group, sealed  # the group of ranks, where it can be formed anew, and the encryption around it
        self.net = classifier.net.to(device)
        self.pad = int(federation.tokenizer.pad_token_id or 0)
        self.phases = config.method.resolved()
        self.states = ClientStates(folder.path)
        self.base: dict[str, Tensor] = {}  # rank 0: the base weights that folds have changed, as they are now
        self.switch: dict[str, Any] | None = None
        self.score: Score | None = None
        self.lost: list[dict[str, Any]] = []  # rank 0: who has died since this start, when and how
        self.lost_before: list[dict[str, Any]] = []  # rank 0: who had died before the run was resumed
        self.breaks = Counter[tuple[int, int, tuple[int, ...]]]()  # rank 0: how often a round has broken, by round, losses and members
        self.test: Encoded | None = None  # rank 0: the held-out documents

    @property
    def hosted(self) -> int:
        """How many of all clients this rank answers for, where a message goes to all of them and not to a round's sample."""
        return sum(home(client, self.comm.size) == self.comm.rank for client in range(self.config.clients.count))

    @property
    def all_lost(self) -> list[dict[str, Any]]:
        """On rank 0: whom the run has lost from its first start on."""
        return [*self.lost_before, *self.lost]

    def start_over(self) -> None:
        """Put the network back to the base weights that every rank begins with, whatever it held."""
        names, words = self.federation.names, self.federation.tokenizer
        self.classifier = model.load(self.config.model, names, self.config.run.seed)
        model.fit(self.classifier, words, self.config.data.max_length)
        self.net, self.base, self.switch, self.score = self.classifier.net.to(self.device), {}, None, None

    def send_down(self, wire: Wire, values_N: Tensor | None, label: Label, clients: int) -> Tensor:
        """Broadcast rank 0's values; every rank, the server included, goes on with what the bytes say."""
        wire_B = torch.empty(wire.nbytes, dtype=torch.uint8) if values_N is None else wire.encode(values_N)
        self.comm.broadcast(wire_B, label, clients)
        return wire.decode(wire_B)

    def evaluate(self, stage: Stage) -> Score:
        """Score the global model on the held-out documents, which only rank 0 reads."""
        assert stage.server and self.test is not None
        self.where.operation = "evaluate"
        stage.coordinates.write(self.net, stage.reference_N + stage.server.offset_N.to(self.device))
        return evaluate(self.net, self.test, self.pad)
