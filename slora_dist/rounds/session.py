"""A federated run on one rank: phases and rounds.

Rank 0 is the server; the other ranks play clients; a world of one does both. Every rank runs these same lines, so that what a message
means is known from where in the program it is sent.

Legend: N coordinates, n a stretch of them, B bytes.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from slora_dist import personal, privacy, upload
from slora_dist.aggregate.rules import Fold
from slora_dist.agreement import gather_bytes, tell
from slora_dist.clock import synchronize
from slora_dist.errors import TransportError
from slora_dist.evaluate import figures
from slora_dist.exactsum import exact
from slora_dist.exchange import Message
from slora_dist.export import Result
from slora_dist.journal import settle
from slora_dist.ledger import Label, Row, totals
from slora_dist.log import say
from slora_dist.roundplan import RoundPlan, plan_round, present
from slora_dist.rounds import move, phases, scores, training
from slora_dist.rounds.healing import enough, heal, missing
from slora_dist.rounds.seat import Seat
from slora_dist.runfolder import SUMS, Checkpoint
from slora_dist.stage import Stage
from slora_dist.upload import Received, Upload
from slora_dist.wire import HEADER_BYTES, Header


class Session:
    """A run as one rank plays it. ``play`` yields the record of every round (the lines of ``metrics.jsonl``; on rank 0 with figures)."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.config, self.comm, self.folder, self.journal, self.where = seat.config, seat.comm, seat.folder, seat.journal, seat.where
        self.clocks: dict[int, float] = {}  # rank 0: what each rank's monotonic clock lacks to Unix time
        self.clock_error = 0.0  # rank 0: seconds by which they may be wrong
        self._finished: dict[int, tuple[Header, Tensor]] = {}  # updates of the round in hand, should it have to be played again
        self._finished_in: tuple[int, Tensor | None] = 0, None  # that round, and the mask that its phase has
        self._last: Stage | None = None
        self._unjudged: dict[str, Any] | None = None  # rank 0: the last round's record, while its score is to come in the next one

    @property
    def is_root(self) -> bool:
        """Whether this is the server's rank."""
        return self.seat.is_root

    @property
    def rounds(self) -> int:
        """All rounds of the run."""
        return sum(phase.rounds for phase in self.seat.phases)

    def play(self, resumed: Checkpoint | None, stop_after: int | None) -> Iterator[dict[str, Any]]:
        """Play all rounds that are left after the checkpoint ``resumed`` (rank 0's), or up to round ``stop_after``.

        Where ranks heal, a collective that breaks is no end: the round is played again with those who are left.
        """
        self.seat.lost_before = resumed.values.get("lost", []) if resumed else []
        anew = not (self.seat.group and self.seat.group.generations and self.seat.group.generations.joins)
        while True:
            try:
                yield from self._life(resumed, stop_after, anew)
                if self.seat.group:  # until all are through, a death may make the others play the last round again
                    self.seat.group.barrier()
                return
            except TransportError as error:
                resumed, anew = heal(self.seat, error), False

    def _life(self, resumed: Checkpoint | None, stop_after: int | None, anew: bool) -> Iterator[dict[str, Any]]:
        position = [resumed.values["phase"], resumed.values["round"]] if resumed else [0, 0]
        self.clocks, self.clock_error = synchronize(self.comm)
        self._unjudged = resumed.values["unjudged"] if resumed else None
        at, done = tell(self.comm, position, Label("start", position[1] + 1, "control", {"position": 16}))
        self.journal.recall(done)
        if anew and not done:
            self.seat.states.forget()  # before the phase's fingerprints are gathered, and so before anybody trains
        elif self.config.keeps_state:
            training.recall(self.seat, done, resumed)
        stage = phases.restore(self.seat, at, done, resumed) if done else phases.begin(self.seat, 0, None)
        end = self.rounds if stop_after is None else min(self.rounds, max(done, stop_after))
        while True:
            last = min(end, stage.first + stage.phase.rounds - 1)
            for number in range(done + 1, last + 1):
                yield from self._round(stage, number)
            done = last
            if done == end:
                break
            stage = phases.begin(self.seat, stage.at + 1, stage)
        if end < self.rounds:
            yield from self._catch_up(stage, end)
        else:
            self._last = stage
        self.folder.wait()

    def result(self) -> Result | None:
        """Return rank 0's result, the network back at its base weights, or None when ``play`` stopped before the last round."""
        if self._last is None:
            return None
        stage, seat = self._last, self.seat
        assert stage.server
        stage.coordinates.write(seat.net, stage.reference_N)
        offset_N = stage.server.offset_N
        return Result(stage.phase, seat.classifier, stage.coordinates, offset_N, bool(seat.base or stage.found), seat.federation.tokenizer)

    def _round(self, stage: Stage, number: int) -> list[dict[str, Any]]:
        """Play one round: broadcast, local training, upload, server step, evaluation, checkpoint. Returns the records that are complete."""
        began, self.where.round, self.comm.seconds = time.perf_counter(), number, 0.0
        if self.seat.group and self.seat.group.generations:
            self.seat.group.generations.welcome()
        if self.is_root and self.seat.lost:  # with those who are away as planned, too few may be left in this round alone
            enough(self.seat, number)
        plan = plan_round(self.config, number, self.comm.size, self.seat.federation.sizes, self.comm.members)
        self.seat.network.begin(plan, number)
        self.where.operation = "broadcast"
        down = self._send_down(stage, number, plan)
        sent = time.perf_counter()
        records = self._catch_up(stage, number)
        overlapped = time.perf_counter() - sent
        self.where.operation = "upload"
        received, folded = self._upload(stage, number, plan)
        record: dict[str, Any] = {"round": number, "phase": stage.name, "transport": self.comm.comm.name}
        if self.config.clients.min_clients or self.config.clients.away:
            record["missing"] = missing(self.seat, number)
        record |= self._judge(stage, number, received)
        if received:
            record["privacy"] = privacy.spent(self.config, self.folder.lines(SUMS))
            if self._due(stage, number) == "overlap":
                self._unjudged = record
            nbytes = (down + folded, HEADER_BYTES + stage.exchange.largest(number).up.nbytes)
            trained = [one.seconds for one in received.headers]
            record["network"] = self.seat.network.seconds(plan, number, nbytes, trained, received.seconds)
        self.where.operation = "ledger"
        notes = gather_bytes(self.comm, self.journal.take(number), stage.label(number, "control", {"ledger": 0}))
        if self.is_root:
            settled = settle(notes, self.clocks)
            lines = [line for line in settled["ledger"] if line["round"] == number]
            moved, own = totals(lines), [line for line in lines if line["rank"] == 0 and line["kind"] not in personal.KINDS]
            waited = sum(line["wait_seconds"] for line in own)
            record["payload_bytes"] = {way: moved[way] for way in ("up", "down")}
            spent = {"communicate": self.comm.seconds, "wait": waited, "overlapped": overlapped, "total": time.perf_counter() - began}
            record["seconds"] |= spent
            self._save(stage, record, settled)
        return records if record is self._unjudged else [*records, record]

    def _catch_up(self, stage: Stage, number: int) -> list[dict[str, Any]]:
        """Judge the last round's model if that is still to be done: the server holds it until it moves. The others train meanwhile."""
        if self._unjudged is None:
            return []
        record, self._unjudged = self._unjudged | self._score(stage, number), None
        self.folder.append("metrics", [record])
        return [record]

    def _score(self, stage: Stage, number: int) -> dict[str, float | None]:
        """Return how good the server's model is, as the figures of a record."""
        with self.journal.span("evaluate", stage.name, number):
            self.seat.score = score = self.seat.evaluate(stage)
        return figures(score, self.config.model.task)

    def _send_down(self, stage: Stage, number: int, plan: RoundPlan) -> int:
        """Bring the round's clients what they lack of the offset; returns the bytes of one that lacks everything that is sent."""
        own, sent = set(plan.played_by(self.comm.rank)), 0
        for message in stage.exchange.down(number):
            wire, part = message.wires.down, message.part
            values_n = part.take(stage.server.offset_N) if stage.server else None
            if values_n is not None and message.variates and stage.server:
                values_n = torch.cat([values_n, stage.server.variate_n])
            label = stage.label(number, "down", wire.by_kind())
            values_n = self.seat.send_down(wire, values_n, label, len(own & set(message.clients)))
            stage.held_N = part.merge(stage.held_N, values_n[: part.support.numel])
            stage.variate_n = values_n[part.support.numel :] if message.variates else stage.variate_n
            sent += wire.nbytes
        return sent

    def _upload(self, stage: Stage, number: int, plan: RoundPlan) -> tuple[Received | None, int]:
        """Train this rank's clients and bring all updates to rank 0, which moves the global state by them.

        Returns with what rank 0 received the bytes of what every client's base takes over.
        """
        messages = stage.exchange.up(number)
        arrived = [self._bring(stage, number, message, plan) for message in messages]
        found = [(message.part, one) for message, one in zip(messages, arrived, strict=True) if one]
        received = upload.joined(found, stage.exchange.sends(number).support.numel) if found else None
        folds: dict[str, Fold] = {}
        if received and stage.server:
            began = time.perf_counter() - received.seconds  # buckets were added as they came: here they stand together, at the end
            self._hide(number, received)
            received = move.believe(self.config.server, received)
            folds = move.step(self.seat, stage, number, received)
            self.journal.note("aggregate", stage.name, number, began, time.perf_counter() - began)
        return received, move.fold(self.seat, stage, number, folds)

    def _bring(self, stage: Stage, number: int, message: Message, plan: RoundPlan) -> Received | None:
        """Train this rank's clients of one upload and bring the updates to rank 0."""
        wire, plan, documents = message.wires.up, plan.only(message.clients), self.seat.federation.trains_on
        expected = [Header(client, stage.at, number, documents(client), 0.0, 0.0, wire.nbytes) for client in plan.clients]
        by_examples, holds = self.config.server.weighting == "examples", stage.exchange.holds
        label, noisy = stage.label(number, "up", wire.by_kind()), bool(self.config.privacy.noise_multiplier)
        job = Upload(wire, label, expected, plan.ranks, by_examples, holds, absent_count=noisy)
        updates = self._bounded(number, len(plan.clients), self._updates(stage, number, plan.played_by(self.comm.rank)))
        if self.config.comm.sum == "exact":
            return exact(self.comm, job, updates, stage.collective, self.config.comm.secure)
        return (upload.reduce if stage.collective == "reduce" else upload.gather)(self.comm, job, updates)

    def _updates(self, stage: Stage, number: int, clients: list[int]) -> Iterator[tuple[Header, Tensor]]:
        """Yield what each client sends, trained when it is asked for; where ranks heal, what was finished before a round broke stands.

        It does not where the phase has begun anew and its mask was chosen by those who are left: the coordinates are others then.
        """
        finished_in, mask_B = self._finished_in
        if finished_in != number or not _equal(mask_B, stage.mask_B):
            self._finished, self._finished_in = {}, (number, stage.mask_B)
        for client in clients:
            if client in self._finished:
                self.seat.states.take_back(client, number)
                yield self._finished[client]
                continue
            sent = training.update(self.seat, stage, number, client)
            if self.seat.group:
                self._finished[client] = sent
            yield sent

    def _bounded(self, number: int, clients: int, updates: Iterator[tuple[Header, Tensor]]) -> Iterator[tuple[Header, Tensor]]:
        """Clip updates, and add each client's part of distributed noise."""
        settings = self.config.privacy
        for header, delta_N in updates:
            if settings.clip is not None:
                delta_N = privacy.clip(delta_N, settings.clip)
            if settings.noise_multiplier and settings.noise == "distributed":
                delta_N = delta_N.cpu() + privacy.noise(self.config, delta_N.numel(), 1 / clients, number, 1 + header.client)
            yield header, delta_N

    def _hide(self, number: int, received: Received) -> None:
        """Note that a sum was taken, and add central noise to the mean: that of the sum, divided as the sum was."""
        if not self.config.privacy.noise_multiplier:
            return
        here = present(self.config, number, self.comm.size, self.comm.members)
        self.folder.append(SUMS, [{"round": number, "present": len(here), "drawn": len(received.headers)}])
        if self.config.privacy.noise == "central":
            noise_N = privacy.noise(self.config, received.mean_N.numel(), 1.0, number, 0)
            refused = sum(header.client in received.left_out and not header.reason for header in received.headers)
            received.mean_N.add_(noise_N, alpha=1 / (len(received.headers) - refused))  # who is left out for a reason counts, with zeros

    def _due(self, stage: Stage, number: int) -> str | None:
        """Return how round ``number`` is judged, or None when it is not. A phase ends with its score; alone nothing overlaps."""
        settings, last = self.config.server, stage.first + stage.phase.rounds - 1
        if number == last:
            return "inline"
        if not settings.eval_every or number % settings.eval_every:
            return None
        return settings.evaluate if self.comm.size > 1 else "inline"

    def _judge(self, stage: Stage, number: int, received: Received | None) -> dict[str, Any]:
        """Evaluate when it is due now, rank 0 while the clients do, and return the figures of the round on rank 0.

        The clients' answers are part of the evaluation, not of a round's communication.
        """
        began, communicated = time.perf_counter(), self.comm.seconds
        asked_N = scores.ask(self.seat, stage, number) if personal.due(self.config, number) else None
        record = self._figures(stage, number, received) if received else {}
        if asked_N is not None:
            told, self.comm.seconds = scores.collect(self.seat, stage, number, asked_N), communicated
            if received:
                record["personal"], record["seconds"]["evaluate"] = told, time.perf_counter() - began
        return record

    def _figures(self, stage: Stage, number: int, received: Received) -> dict[str, Any]:
        headers = received.headers
        began = time.perf_counter()
        score = self._score(stage, number) if self._due(stage, number) == "inline" else figures(None, self.config.model.task)
        evaluating = time.perf_counter() - began
        headers = [header for header in headers if header.client not in received.left_out]
        examples = sum(header.num_examples for header in headers)
        left_out = {str(client): reason for client, reason in received.left_out.items()}
        if left_out and (self.comm.size > 1 or not all(header.reason for header in received.headers if str(header.client) in left_out)):
            say(0, f"round {number} is without client {', '.join(f'{client} ({reason})' for client, reason in left_out.items())}")
        for client, reason in received.distrusted.items():
            say(0, f"round {number}: client {client} is distrusted: {reason}")
        seconds = {
            "aggregate": received.seconds,
            "train": sum(header.seconds for header in received.headers),  # of those who are left out, too: they were waited for
            "slowest_client": max(header.seconds for header in received.headers),
            "evaluate": evaluating,
        }
        return {
            "train_loss": sum(header.loss * header.num_examples for header in headers) / examples,
            **score,
            "clients": [header.client for header in received.headers],
            "left_out": left_out,
            "distrusted": {str(client): reason for client, reason in received.distrusted.items()},
            "num_examples": examples,
            "seconds": seconds,
        }

    def _save(self, stage: Stage, record: dict[str, Any], settled: Mapping[str, list[Row]]) -> None:
        """Note the round, then make it the last good state."""
        assert stage.server
        self.where.operation = "checkpoint"
        with self.journal.span("checkpoint", stage.name, record["round"]):
            for name, rows in {**settled, "metrics": [] if record is self._unjudged else [record]}.items():
                self.folder.append(name, rows)
            score = {"accuracy": self.seat.score.accuracy, "loss": self.seat.score.loss} if self.seat.score else None
            values = {"round": record["round"], "phase": stage.at, "switch": self.seat.switch, "score": score, "unjudged": self._unjudged}
            values["collective"] = stage.collective
            values["lost"] = self.seat.all_lost
            held = {} if stage.exchange.stateless else {"held": stage.held_N}
            if stage.exchange.folding:
                held |= {f"base.{name}": weight for name, weight in self.seat.base.items()}
            if stage.mask_B is not None:
                held["mask"] = stage.mask_B
            self.folder.save_behind(Checkpoint(stage.server.state() | held, values))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
