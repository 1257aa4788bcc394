"""Feed a parser with bytes until a time is up: ``python -m fuzz.run frames|checkpoints [--seconds N] [--corpus FOLDER]``.

Anything but the parser's own error is a finding: atheris ends with the exception, and leaves the bytes in the working directory.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["slora_dist"]):
    from slora_dist.errors import ConfigError, RunError
    from slora_dist.runfolder import Checkpoint, RunFolder
    from slora_dist.wire import Wire, as_bytes, frame
    from tests.test_hostile import WIRES, header, receive

import torch

NAMES = tuple(WIRES)


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


def checkpoints(folder: Path) -> Callable[[bytes], None]:
    """Return a reader of checkpoints whose tensors (first byte even) or values (odd) are the bytes given."""
    run = RunFolder(folder)
    run.save(Checkpoint({"offset": torch.arange(5.0)}, {"round": 1, "phase": 0, "switch": None, "score": None}))
    state = folder / "checkpoint" / "round-00001" / "state.safetensors"
    files = state, state.with_suffix(".json")
    whole = [path.read_bytes() for path in files]

    def read(data: bytes) -> None:
        for path, content in zip(files, whole, strict=True):
            path.write_bytes(content)
        files[data[0] % 2 if data else 0].write_bytes(data[1:])
        try:
            run.latest()
        except ConfigError:
            return

    return read


def main() -> None:
    """Fuzz one parser."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=("frames", "checkpoints"))
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--corpus", default=None, help="a folder that is read, and gets what leads to new lines of code")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one: Any = frames if given.target == "frames" else checkpoints(Path(folder))
        options = [f"-max_total_time={given.seconds}", "-max_len=4096", *([given.corpus] if given.corpus else [])]
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
