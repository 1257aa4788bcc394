"""Feed a parser with bytes until a time is up: ``python -m fuzz.run frames|checkpoints|records [--seconds N] [--corpus FOLDER]``.

It starts from valid ones. Anything but the parser's own error is a finding: atheris ends with the exception, and leaves the bytes in the
working directory.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["slora_dist"]):
    from slora_dist.errors import ConfigError, RunError
    from slora_dist.evaluate import Score
    from slora_dist.runfolder import CHECKSUM, RunFolder, checksum
    from slora_dist.wire import Wire, as_bytes, frame
    from tests.test_hostile import WIRES, body, header, receive

import torch

from fuzz import checkpoint

MEMORY = Path("/dev/shm")
NAMES = tuple(WIRES)
One = Callable[[bytes], None]


def frames(data: bytes) -> None:
    """The first byte chooses a codec and a way: a whole message, a body behind a header that fits it, or a broadcast."""
    if not data:
        return
    way, which = divmod(data[0], len(NAMES))
    wire, message_B = WIRES[NAMES[which]], as_bytes(data[1:])
    try:
        if way % 3 == 2 and isinstance(wire, Wire):
            wire.decode(message_B)
        else:
            receive(wire, message_B if way % 3 == 0 else frame(header(3, wire), message_B))
    except RunError:
        return


def frame_seeds() -> list[bytes]:
    """Return a valid message of every codec, in every way."""
    found = []
    for which, wire in enumerate(WIRES.values()):
        body_B = body(wire, random.Random(which))
        whole_B = frame(header(3, wire), body_B)
        found += [bytes([way * len(NAMES) + which]) + bytes((body_B if way else whole_B).numpy()) for way in range(3)]
    return found


def checkpoints(folder: Path) -> One:
    """Return a reader of checkpoints, which have a checksum that fits: up to the server's next step."""
    run, place = RunFolder(folder), folder / "checkpoint" / "round-00001"
    place.mkdir(parents=True)
    servers = {name: checkpoint.server(name) for name in checkpoint.OPTIMISERS}
    (folder / "checkpoint" / "latest").write_text(place.name, encoding="utf-8")

    def read(data: bytes) -> None:
        optimiser, state, tensors = checkpoint.split(data)
        (place / "state.json").write_bytes(state)
        (place / "state.safetensors").write_bytes(tensors)
        (place / CHECKSUM).write_text(checksum(place), encoding="utf-8")
        try:
            found = run.latest()
            assert found
            servers[optimiser].restore(found.tensors)
        except (ConfigError, RunError):
            return
        servers[optimiser].step(torch.ones(checkpoint.NUMBERS))
        assert found.values["score"] is None or Score(**found.values["score"])
        assert found.values["round"] + found.values["phase"] >= 0 and {"switch", "unjudged"} <= found.values.keys()

    return read


def records(folder: Path) -> One:
    """Return a reader of a run's records that are rewound to round 1."""
    run = RunFolder(folder)

    def read(data: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(data)
        try:
            run.rewind(1)
        except ConfigError:
            return
        assert all(line["round"] <= 1 for line in run.lines("metrics"))

    return read


RECORDS = [b'{"round": 1, "loss": 0.5}\n{"round": 2, "clients": [1, 2]}\n{"rou', b'{"round": 0}\n', b'{"round": 1, "a": {"b": null}}\n']


def main() -> None:
    """Fuzz one parser."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=("frames", "checkpoints", "records"))
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--corpus", default=None, help="a folder that is read, and gets what leads to new lines of code")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.exists() else None) as scratch:  # each input is a file or three
        folder = Path(scratch)
        corpus = Path(given.corpus) if given.corpus else folder / "corpus"
        corpus.mkdir(exist_ok=True)
        one, seeds = _target(given.target, folder)
        for at, seed in enumerate(seeds):
            (corpus / f"seed-{at:02d}").write_bytes(seed)
        options = [f"-max_total_time={given.seconds}", "-max_len=4096", str(corpus)]
        mutator: dict[str, Any] = {"custom_mutator": _damage} if given.target == "checkpoints" else {}
        atheris.Setup([sys.argv[0], *options], one, **mutator)
        atheris.Fuzz()


def _target(name: str, folder: Path) -> tuple[One, list[bytes]]:
    """Return what is fed, and valid inputs."""
    if name == "frames":
        return frames, frame_seeds()
    return (checkpoints(folder), checkpoint.seeds()) if name == "checkpoints" else (records(folder), RECORDS)


def _damage(data: bytes, most: int, seed: int) -> bytes:
    return checkpoint.damage(data, most, seed, atheris.Mutate)


if __name__ == "__main__":
    main()
