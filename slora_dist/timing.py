"""What a run will take, from what ``slora-dist doctor CONFIG`` has measured on the ranks that will run it.

The doctor times every verb of the transport at several sizes, and in a rehearsal of a few rounds a local step of every phase, with all
worker ranks at work, and what rank 0 does besides. On emulated links (``network.mode``) these stand in place of the measured verbs.
The world is the doctor's: measure under the launcher that the run will have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from slora_dist import methods
from slora_dist.config import Config
from slora_dist.errors import ConfigError
from slora_dist.links import Passed, passed_on, read_in_order
from slora_dist.model import TaskModel
from slora_dist.network import Network, agreements, parts
from slora_dist.plan import exchanges
from slora_dist.roundplan import RoundPlan, plan_round
from slora_dist.wire import HEADER_BYTES

PARTS = ("broadcast", "train", "upload", "server", "control")
VERBS = ("broadcast", "gather", "reduce")
MEASURED = "a file that `slora-dist doctor CONFIG.yaml --out FILE` wrote"
TIMELESS = ("kind", "rounds", "lr", "lr_decay")  # settings of a phase that make no step longer
NOTES_BYTES = 4096  # about what a rank's notes of a round take


@dataclass(frozen=True)
class _World:
    size: PositiveInt


@dataclass(frozen=True)
class _Verb:
    verb: str
    bytes: NonNegativeInt
    seconds: NonNegativeFloat
    own_seconds: NonNegativeFloat


@dataclass(frozen=True)
class _Local:
    step_seconds: NonNegativeFloat
    server_seconds: NonNegativeFloat


@dataclass(frozen=True)
class _Machine:
    """What a prediction reads of the doctor's file."""

    world: _World
    verbs: list[_Verb]
    documents: list[PositiveInt]
    phases: dict[str, _Local]
    settings: dict[str, Any]


_MACHINE = TypeAdapter(_Machine)


def read_machine(path: Path) -> dict[str, Any]:
    """Read what ``slora-dist doctor CONFIG --out FILE`` wrote. Raises ``ConfigError`` when it is no such file."""
    try:
        machine = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("--machine", f"{path} cannot be read ({error.__class__.__name__})", "a file of `slora-dist doctor`") from None
    if not isinstance(machine, dict) or not {"world", "verbs"} <= set(machine):
        raise ConfigError("--machine", f"{path} holds no measurements", "a file that `slora-dist doctor --out FILE` wrote")
    if "phases" not in machine:
        raise ConfigError("--machine", f"{path} knows no training", MEASURED)
    try:
        _MACHINE.validate_python(machine)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError("--machine", f"{path} is damaged ({place}: {first['msg']})", MEASURED) from None
    return machine


def step_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a client's training depends on, dotted name -> value as JSON has it; phases by their names.

    Those that deal the documents are among them, but for the seed: it moves documents from client to client, and no total.
    """
    clients = {f"clients.{name}": getattr(config.clients, name) for name in ("batch_size", "optimizer", "holdout")}
    found = {f"model.{name}": value for name, value in config.model.model_dump().items()}
    found |= {f"data.{name}": value for name, value in config.data.model_dump().items() if not name.startswith("test_")}
    found |= clients | {"run.threads": config.run.threads}
    for name, phase in zip(methods.names(config.method), config.method.resolved(), strict=True):
        found |= {f"method.{name}.{key}": value for key, value in phase.model_dump().items() if key not in TIMELESS}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def require_fit(config: Config, machine: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` when the file knows no phase of the run, or was measured with other clients or ``step_settings``."""
    documents, own, found = machine["documents"], step_settings(config), machine["settings"]
    if len(documents) != config.clients.count:
        problem = f"measured with {len(documents)} clients, and clients.count is {config.clients.count}"
        raise ConfigError("--machine", problem, "a file measured with this config")
    for name in methods.names(config.method):
        if name not in machine["phases"]:
            raise ConfigError("--machine", f"knows no phase {name}", f"a file measured with this config ({', '.join(machine['phases'])})")
    for name, value in own.items():
        if name not in found or found[name] != value:
            problem = f"measured with {name} {json.dumps(found.get(name))}, and here it is {json.dumps(value)}"
            raise ConfigError("--machine", problem, "a file measured with this config")


def predict(config: Config, classifier: TaskModel, machine: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the mean seconds of a round of every phase, ``{phase: {broadcast, train, upload, server, control, round}}``.

    All are those of the client whose update is there last, ``control`` the notes of the ranks, ``round`` the sum;
    evaluation is not in it. The world is the one that was measured. Raises ``ConfigError`` as ``require_fit`` does, and when a verb lacks.
    """
    size, first, seconds = int(machine["world"]["size"]), 1, {}
    documents = machine["documents"]
    require_fit(config, machine)
    for name, phase in zip(methods.names(config.method), config.method.resolved(), strict=True):
        local = machine["phases"][name]
        messages = exchanges(config, classifier)[name]
        sizes = dict(zip(messages.numbers(), messages.faithful(), strict=True))
        plans = {number: plan_round(config, number, size, documents) for number in range(first, first + phase.rounds)}
        exchange = _emulated if config.network.mode != "off" else _measured
        told = [
            exchange(config, machine, plan, number, _trained(config, plan, documents, local), sizes[number])
            for number, plan in plans.items()
        ]
        mean = {part: float(np.mean([one.get(part, local.get(f"{part}_seconds", 0.0)) for one in told])) for part in PARTS}
        seconds[name] = mean | {"round": sum(mean.values())}
        first += phase.rounds
    return seconds


def _trained(config: Config, plan: RoundPlan, documents: Sequence[int], local: Mapping[str, float]) -> list[float]:
    """Return when each client's update is ready, in seconds after the broadcast: a rank trains its clients one after the other."""
    trained, busy = [], dict.fromkeys(plan.ranks, 0.0)
    for client, rank in zip(plan.clients, plan.ranks, strict=True):
        busy[rank] += config.steps(documents[client]) * local["step_seconds"]
        trained.append(busy[rank])
    return trained


def _measured(
    config: Config, machine: Mapping[str, Any], plan: RoundPlan, number: int, trained: Sequence[float], nbytes: tuple[int, int]
) -> dict[str, float]:
    """Return one round's parts on the transport, those of the client whose update is there last. ``nbytes``: up, down."""
    verbs, (up, down) = _Verbs(machine), nbytes
    root, *_ = ranks = verbs.passed(down)
    passed = [ranks[rank] for rank in plan.ranks]
    ready = [one.through + spent for one, spent in zip(passed, trained, strict=True)]
    through, agreed = root.through, agreements(config, len(plan.clients)).values()
    starts = [max(end, one.free) for end, one in zip(ready, passed, strict=True)]
    if agreed:  # all have trained before the first update leaves
        through = max(ready) + sum(verbs.seconds("gather", up) + verbs.seconds("broadcast", down) for up, down in agreed)
        starts = [through] * len(starts)
    if config.comm.collective == "reduce":
        ends = [max(through, *ready) + verbs.seconds("reduce", up)] * len(ready)
    else:
        size = HEADER_BYTES + up
        message = [verbs.message(size) * part / size for part in parts(size)]
        ends = read_in_order(starts, [message] * len(starts), through)
    last = max(range(len(ends)), key=lambda at: (ends[at], ready[at]))
    told = {"broadcast": passed[last].through, "train": trained[last], "upload": ends[last] - ready[last]}
    return told | {"control": verbs.seconds("gather", NOTES_BYTES)}


def _emulated(
    config: Config, machine: Mapping[str, Any], plan: RoundPlan, number: int, trained: Sequence[float], nbytes: tuple[int, int]
) -> dict[str, float]:
    """Return one round's parts on the emulated links."""
    up, down = nbytes
    record = Network(config, None).seconds(plan, number, (down, HEADER_BYTES + up), trained, 0.0)
    assert record is not None
    return {"broadcast": record["download"], "train": record["train"], "upload": record["upload"], "control": 0.0}


class _Verbs:
    """Seconds of the transport's verbs in the world that was measured."""

    def __init__(self, machine: Mapping[str, Any]) -> None:
        self._size = int(machine["world"]["size"])
        rows = machine["verbs"]
        self._rows = {verb: sorted((row["bytes"], row["seconds"]) for row in rows if row["verb"] == verb) for verb in VERBS}
        self._own = sorted((row["bytes"], row["own_seconds"]) for row in rows if row["verb"] == "broadcast")
        for verb in ("broadcast", "gather") if self._size > 1 else ():
            self._known(verb)

    def seconds(self, verb: str, nbytes: int) -> float:
        """Return the seconds of one call: interpolated between the sizes that were measured, in proportion to the bytes beyond them."""
        if self._size == 1:
            return 0.0
        sizes, times = zip(*self._known(verb), strict=True)
        return float(np.interp(nbytes, sizes, times)) if nbytes <= sizes[-1] else float(times[-1] * nbytes / sizes[-1])

    def _known(self, verb: str) -> list[tuple[int, float]]:
        if not self._rows[verb]:  # sealed messages cannot be summed on the way
            raise ConfigError("--machine", f"knows no {verb}", "a file measured with this config")
        return self._rows[verb]

    def message(self, nbytes: int) -> float:
        """Return the seconds of one message of a gather: the doctor's gathers have one from every rank but rank 0."""
        return self.seconds("gather", nbytes) / max(1, self._size - 1)

    def passed(self, nbytes: int) -> list[Passed]:
        """Return every rank's part of a broadcast: copies as fast as a message of a gather, or faster where the broadcast was."""
        if self._size == 1 or not nbytes:
            return [Passed(0.0, 0.0, 0.0)] * self._size
        share, latencies = self._kernel(nbytes) / nbytes, [0.0] * self._size
        turns = max(one.has for one in passed_on(self._size, 1.0, share, latencies))
        copy = min(self.message(nbytes), self.seconds("broadcast", nbytes) / turns)
        return passed_on(self._size, copy, copy * share, latencies)

    def _kernel(self, nbytes: int) -> float:
        """Return how much of each copy the kernel held when rank 0 was through with its own part of a broadcast."""
        children = (self._size - 1).bit_length()
        taken = [max(0.0, count - count * own / (children * self.message(count))) for count, own in self._own]
        sizes = [count for count, _ in self._own]
        return min(nbytes, float(np.interp(nbytes, sizes, taken)))
