"""A federated run on one rank: phases, rounds, and the switch between phases. The only file that uses both transports and methods.

Rank 0 is the server; the other ranks play clients; a world of one does both. Every rank runs these same lines, so that what a message
means is known from where in the program it is sent.

Legend: N coordinates, n a stretch of them, B bytes.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from slora_dist import methods, upload
from slora_dist.aggregate import Server
from slora_dist.agreement import gather_bytes, tell
from slora_dist.client import Recipe, train
from slora_dist.clock import synchronize
from slora_dist.comm.metered import Metered
from slora_dist.config import Config, LowrankPhase
from slora_dist.data.federation import Federation
from slora_dist.data.tokens import Encoded
from slora_dist.ending import Where
from slora_dist.errors import RunError
from slora_dist.evaluate import Score, evaluate
from slora_dist.export import Result
from slora_dist.handover import spread
from slora_dist.journal import Journal, settle
from slora_dist.ledger import Label, Row, totals
from slora_dist.model import Classifier, head_parameters
from slora_dist.network import Network
from slora_dist.roundplan import RoundPlan, home, plan_round
from slora_dist.runfolder import Checkpoint, RunFolder
from slora_dist.seeding import derive
from slora_dist.stage import Stage, switch_record
from slora_dist.svd import Factors
from slora_dist.upload import Received, Upload
from slora_dist.wire import HEADER_BYTES, Header, Wire


class Session:
    """A run as one rank plays it. ``play`` yields the record of every round (the lines of ``metrics.jsonl``; on rank 0 with figures)."""

    def __init__(
        self,
        config: Config,
        comm: Metered,
        classifier: Classifier,
        federation: Federation,
        folder: RunFolder,
        device: torch.device,
        where: Where,
        network: Network,
    ) -> None:
        self.config, self.comm, self.classifier, self.federation, self.folder = config, comm, classifier, federation, folder
        self.is_root = comm.rank == 0
        self.where, self.journal = where, Journal(comm.ledger)
        self.clocks: dict[int, float] = {}  # rank 0: what each rank's monotonic clock lacks to Unix time
        self.clock_error = 0.0  # seconds by which they may be wrong
        self.device, self.network = device, network
        self.net = classifier.net.to(device)
        self.pad = int(federation.tokenizer.pad_token_id or 0)
        self.phases = config.method.resolved()
        self.base: dict[str, Tensor] = {}  # rank 0: the base weights that folds have changed, as they are now
        self.switch: dict[str, Any] | None = None
        self.score: Score | None = None
        self.test: Encoded | None = None  # rank 0: the held-out documents
        self._last: Stage | None = None

    def play(self, resumed: Checkpoint | None, stop_after: int | None) -> Iterator[dict[str, Any]]:
        """Play all rounds that are left after the checkpoint ``resumed`` (rank 0's), or up to round ``stop_after``."""
        position = [resumed.values["phase"], resumed.values["round"]] if resumed else [0, 0]
        self.clocks, self.clock_error = synchronize(self.comm)
        at, done = tell(self.comm, position, Label("start", position[1] + 1, "control", {"position": 16}))
        stage = self._restore(at, done, resumed) if done else self._open(0, None)
        while True:
            last = stage.first + stage.phase.rounds - 1
            for number in range(done + 1, last + 1):
                yield self._round(stage, number)
                if stop_after is not None and stop_after <= number < self.rounds:
                    self.folder.wait()
                    return
            done = last
            if stage.at + 1 == len(self.phases):
                break
            stage = self._open(stage.at + 1, stage)
        self.folder.wait()
        self._last = stage

    def result(self) -> Result | None:
        """Return rank 0's result, the network back at its base weights, or None when ``play`` stopped before the last round."""
        if self._last is None:
            return None
        stage = self._last
        assert stage.server
        stage.coordinates.write(self.net, stage.reference_N)
        offset_N = stage.server.offset_N
        return Result(stage.phase, self.classifier, stage.coordinates, offset_N, bool(self.base), self.federation.tokenizer)

    @property
    def rounds(self) -> int:
        """All rounds of the run."""
        return sum(phase.rounds for phase in self.phases)

    # ---- phases

    def _stage(self, at: int) -> Stage:
        """Enter phase ``at`` on a network that holds the base weights."""
        phase, name = self.phases[at], methods.names(self.config.method)[at]
        coordinates = methods.support(phase, self.classifier, self.config.method, self.config.run.seed)
        methods.enter(phase, self.classifier, coordinates)
        self.net.to(self.device)
        wire = Wire(coordinates, self.config.comm.wire.values, self.config.comm.wire.indices)
        first = 1 + sum(earlier.rounds for earlier in self.phases[:at])
        self.where.phase = name
        return Stage(at, name, phase, first, coordinates, wire, coordinates.reference(self.net), None, self._collective(wire, name, first))

    def _collective(self, wire: Wire, name: str, number: int) -> str:
        self.where.operation = "probe"
        chosen = self.config.comm.collective
        return upload.choose(self.comm, wire, name, number) if chosen == "auto" else chosen

    def _open(self, at: int, previous: Stage | None) -> Stage:
        """Begin phase ``at``: take over what ``previous`` learned, and put the base back to the weights that all ranks know."""
        self.where.operation, began = "switch", time.perf_counter()
        learned: dict[str, Tensor] = {}
        found = None
        if previous:
            offset_N = self._last_offset(previous, self.phases[at])
            if offset_N is not None:
                learned = methods.learned(previous.phase, self.classifier, previous.coordinates, offset_N)
            previous.coordinates.write(self.net, previous.reference_N)
        stage = self._stage(at)
        self._compare_fingerprints(stage, stage.first)
        if previous and self._spreads(stage.phase):
            found = self._spread(previous, stage, learned)
        if self.is_root:
            start = methods.begin(stage.phase, self.classifier, stage.coordinates, learned, self.config.run.seed, found)
            stage.server = Server(self.config.server, start.offset_N)
        if previous and methods.keeps(stage.phase):
            self._fold(previous, stage)
        if previous and self.is_root:
            with self.journal.span("evaluate", stage.name, stage.first):
                before, after = self.score, self._evaluate(stage)
            assert before
            self.switch = switch_record(before, after, start)
        if previous:
            self.journal.note("switch", stage.name, stage.first, began, time.perf_counter() - began)
        return stage

    def _spreads(self, phase: methods.AnyPhase) -> bool:
        return self.config.server.svd == "ranks" and self.comm.size > 1 and isinstance(phase, LowrankPhase)

    def _last_offset(self, previous: Stage, phase: methods.AnyPhase) -> Tensor | None:
        """Return what ``previous`` has learned on rank 0, and on all ranks where all of them will factor it."""
        offset_N = previous.server.offset_N if previous.server else None
        if self._spreads(phase):
            offset_N = torch.empty(previous.coordinates.numel) if offset_N is None else offset_N.contiguous()
            wire_B = offset_N.view(torch.uint8)
            name, number = methods.names(self.config.method)[previous.at + 1], previous.first + previous.phase.rounds
            self.comm.broadcast(wire_B, Label(name, number, "control", {"offset": wire_B.numel()}), clients=1)
        return offset_N

    def _spread(self, previous: Stage, stage: Stage, learned: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Let every rank factor its share of the matrices; rank 0 gets all factors."""
        phase, layers = stage.phase, methods.factorable(stage.phase, self.classifier, previous.coordinates)
        assert isinstance(phase, LowrankPhase)
        label = stage.label(stage.first, "control", {"factors": 0})
        return spread(self.comm, layers, lambda own: methods.factored(phase, self.classifier, learned, own), label)

    def _restore(self, at: int, number: int, resumed: Checkpoint | None) -> Stage:
        """Enter phase ``at`` as it was after round ``number``."""
        self.where.operation = "resume"
        if any(methods.keeps(phase) for phase in self.phases[1 : at + 1]):
            self._restore_base(number, at)
        stage = self._stage(at)
        self._compare_fingerprints(stage, number + 1)
        if resumed:
            stage.server = Server(self.config.server, resumed.tensors["offset"])
            stage.server.restore(resumed.tensors)
            self.switch, self.score = resumed.values["switch"], Score(**resumed.values["score"]) if resumed.values["score"] else None
        return stage

    def _fold(self, previous: Stage, stage: Stage) -> None:
        """Let the frozen base of every rank take over what the factors leave out: the two vectors travel once to every client."""
        label_before = Label(stage.name, stage.first, "down", previous.wire.by_kind())
        before_N = self._send_down(previous.wire, previous.server, label_before, self._hosted())
        after_N = self._send_down(stage.wire, stage.server, stage.label(stage.first, "down"), self._hosted())
        before = methods.learned(previous.phase, self.classifier, previous.coordinates, before_N)
        factors = methods.learned(stage.phase, self.classifier, stage.coordinates, after_N)
        assert isinstance(stage.phase, LowrankPhase)
        change = methods.base_change(stage.phase, before, factors, head_parameters(self.classifier))
        methods.add_to_base(self.classifier, change)
        if self.is_root:
            self.base |= methods.base_weights(self.classifier, change)
            self.folder.save_base(self.base, stage.at)

    def _restore_base(self, number: int, at: int) -> None:
        """Bring every rank's base to where the folds before the checkpoint have brought it: weights, since a sum of folds may round."""
        if self.is_root:
            self.base = self.folder.load_base(max(fold for fold in range(1, at + 1) if methods.keeps(self.phases[fold])))
        weights = {name: self.base.get(name, parameter.detach()).cpu() for name, parameter in self.net.named_parameters()}
        wire_B = torch.cat([weight.reshape(-1) for weight in weights.values()]).view(torch.uint8)
        self.comm.broadcast(wire_B, Label(self.where.phase, number + 1, "control", {"base": wire_B.numel()}), clients=1)
        pieces = torch.split(wire_B.view(torch.float32), [weight.numel() for weight in weights.values()])
        with torch.no_grad():
            for (name, weight), piece in zip(weights.items(), pieces, strict=True):
                self.net.get_parameter(name).copy_(piece.view(weight.shape))

    def _compare_fingerprints(self, stage: Stage, number: int) -> None:
        """Make sure that all ranks mean the same coordinates and start from the same reference."""
        mine = stage.coordinates.fingerprint(stage.reference_N)
        for rank, theirs in gather_bytes(self.comm, mine, stage.label(number, "control", {"fingerprint": len(mine)})).items():
            if theirs != mine:
                raise RunError(f"rank {rank} has other weights or another mask in phase {stage.name}: same model and versions?")

    # ---- rounds

    def _round(self, stage: Stage, number: int) -> dict[str, Any]:
        """Play one round: broadcast, local training, upload, server step, evaluation, checkpoint."""
        began, self.where.round, self.comm.seconds = time.perf_counter(), number, 0.0
        plan = plan_round(self.config, number, self.comm.size, self.federation.sizes)
        self.network.begin(plan, number)
        self.where.operation = "broadcast"
        clients = len(plan.played_by(self.comm.rank))
        offset_N = self._send_down(stage.wire, stage.server, stage.label(number, "down"), clients)
        self.where.operation = "upload"
        received = self._upload(stage, number, plan, offset_N)
        record: dict[str, Any] = {"round": number, "phase": stage.name}
        if received:
            record |= self._judge(stage, number, received)
            nbytes = (stage.wire.nbytes, HEADER_BYTES + stage.wire.nbytes)
            record["network"] = self.network.seconds(plan, number, nbytes, [one.seconds for one in received.headers], received.seconds)
        self.where.operation = "ledger"
        notes = gather_bytes(self.comm, self.journal.take(number), stage.label(number, "control", {"ledger": 0}))
        if self.is_root:
            settled = settle(notes, self.clocks)
            lines = [line for line in settled["ledger"] if line["round"] == number]
            moved, waited = totals(lines), sum(line["wait_seconds"] for line in lines if line["rank"] == 0)
            record["payload_bytes"] = {way: moved[way] for way in ("up", "down")}
            record["seconds"] |= {"communicate": self.comm.seconds, "wait": waited, "total": time.perf_counter() - began}
            self._save(stage, record, settled)
        return record

    def _send_down(self, wire: Wire, server: Server | None, label: Label, clients: int) -> Tensor:
        """Broadcast the server's offset; every rank, the server included, goes on with what the bytes say."""
        wire_B = wire.encode(server.offset_N) if server else torch.empty(wire.nbytes, dtype=torch.uint8)
        self.comm.broadcast(wire_B, label, clients)
        return wire.decode(wire_B)

    def _upload(self, stage: Stage, number: int, plan: RoundPlan, offset_N: Tensor) -> Received | None:
        """Train this rank's clients and bring all updates to rank 0, which moves the global state by their mean."""
        expected = [Header(client, stage.at, number, 1, 0.0, 0.0, stage.wire.nbytes) for client in plan.clients]
        by_examples = self.config.server.weighting == "examples"
        job = Upload(stage.wire, stage.label(number, "up"), expected, plan.ranks, by_examples)
        updates = self._updates(stage, number, plan.played_by(self.comm.rank), offset_N)
        received = (upload.reduce if stage.collective == "reduce" else upload.gather)(self.comm, job, updates)
        if received and stage.server:
            began = time.perf_counter() - received.seconds  # buckets were added as they came: here they stand together, at the end
            stage.server.step(received.mean_N)
            self.journal.note("aggregate", stage.name, number, began, time.perf_counter() - began)
        return received

    def _updates(self, stage: Stage, number: int, clients: list[int], offset_N: Tensor) -> Iterator[tuple[Header, Tensor]]:
        """Train one client after the other, when its update is asked for."""
        if not clients:
            return
        start_N = stage.reference_N + offset_N.to(self.device)
        lr = stage.phase.lr * stage.phase.lr_decay ** (number - stage.first)
        recipe = Recipe(self.config.clients, lr, self.config.model.precision == "bfloat16", self.pad)
        for client in clients:
            self.where.operation = f"training of client {client}"
            seed = derive(self.config.run.seed, "client", number, client)
            documents = self.federation.client(client)
            with self.journal.span("train", stage.name, number, client):
                update = train(self.net, stage.coordinates, start_N, documents, recipe, seed)
            self.where.operation = "upload"
            header = Header(client, stage.at, number, update.num_examples, update.loss, update.seconds, stage.wire.nbytes)
            yield header, update.delta_N

    def _judge(self, stage: Stage, number: int, received: Received) -> dict[str, Any]:
        """Evaluate when it is due, and return the figures of the round."""
        headers = received.headers
        every, last = self.config.server.eval_every, stage.first + stage.phase.rounds - 1
        began = time.perf_counter()
        score = self._evaluate(stage) if number == last or (every and number % every == 0) else None
        evaluating = time.perf_counter() - began
        if score:
            self.score = score
            self.journal.note("evaluate", stage.name, number, began, evaluating)
        examples = sum(header.num_examples for header in headers)
        seconds = {
            "aggregate": received.seconds,
            "train": sum(header.seconds for header in headers),
            "slowest_client": max(header.seconds for header in headers),
            "evaluate": evaluating,
        }
        return {
            "train_loss": sum(header.loss * header.num_examples for header in headers) / examples,
            "accuracy": score.accuracy if score else None,
            "loss": score.loss if score else None,
            "clients": [header.client for header in headers],
            "num_examples": examples,
            "seconds": seconds,
        }

    def _evaluate(self, stage: Stage) -> Score:
        """Score the global model on the held-out documents, which only rank 0 reads."""
        assert stage.server and self.test is not None
        self.where.operation = "evaluate"
        stage.coordinates.write(self.net, stage.reference_N + stage.server.offset_N.to(self.device))
        return evaluate(self.net, self.test, self.pad)

    def _save(self, stage: Stage, record: dict[str, Any], settled: Mapping[str, list[Row]]) -> None:
        """Note the round, then make it the last good state."""
        assert stage.server
        self.where.operation = "checkpoint"
        with self.journal.span("checkpoint", stage.name, record["round"]):
            for name, rows in {**settled, "metrics": [record]}.items():
                self.folder.append(name, rows)
            score = {"accuracy": self.score.accuracy, "loss": self.score.loss} if self.score else None
            values = {"round": record["round"], "phase": stage.at, "switch": self.switch, "score": score}
            self.folder.save_behind(Checkpoint(stage.server.state(), values))

    def _hosted(self) -> int:
        """How many of all clients this rank answers for, where a message goes to all of them and not to a round's sample."""
        return sum(home(client, self.comm.size) == self.comm.rank for client in range(self.config.clients.count))
