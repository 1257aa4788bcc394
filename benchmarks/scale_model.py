"""What a round costs at sizes that fit no test machine, from the constants that the other benchmarks have measured (results.json).

Seconds of a round = broadcast + training + upload + server. With messages of S bytes, K clients and links of b bytes a second, the
server's included:

    broadcast  ceil(log2(K + 1)) S / b    a binomial tree
    upload     K S / b                    a star: rank 0 receives every message (``reduce``: about 2 S / b)
    training   tokens x body parameters x seconds of the method, on every client at once
    server     K S / rate of the mean + S / rate of step, encoding and checkpoint + K x seconds of the accounts

Writes two tables into docs/performance.md: ``python -m benchmarks.scale_model``.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.run import PAGE, RESULTS

BEGIN, END = "<!-- model: made by benchmarks/scale_model.py -->", "<!-- end of model -->"
DENSITY, RANK = 0.01, 8
TOKENS = 256 * 64  # of a client's training in a round: 16 batches of 16 documents
MINILM_BODY, MINILM_BYTES, STEP_TOKENS = 10_700_000, 91e6, 16 * 64
CLIENTS = (10, 100, 1000)
RATES = {"1 Mbit/s": 1e6, "10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
DEVICES = {"the measured core": 1.0, "a device 1,000 times as fast": 1000.0}


@dataclass(frozen=True)
class Model:
    """A network by the shapes of its dense layers: ``layers`` times ``matrices`` (O, I), and ``outside`` parameters in embeddings."""

    name: str
    layers: int
    matrices: tuple[tuple[int, int], ...]
    outside: int

    @property
    def body(self) -> int:
        """Parameters of the dense layers."""
        return self.layers * sum(height * width for height, width in self.matrices)

    def message(self, method: str) -> float:
        """Return the float32 bytes of one message."""
        factors = RANK * self.layers * sum(height + width for height, width in self.matrices)
        return 4 * {"full": self.body + self.outside, "sparse": DENSITY * (self.body + self.outside), "LoRA": factors}[method]


MODELS = (
    Model("DistilBERT, 66 M", 6, ((768, 768),) * 4 + ((3072, 768), (768, 3072)), 24_000_000),
    Model("1.1 B", 22, ((2048, 2048),) * 2 + ((256, 2048),) * 2 + ((5632, 2048),) * 3, 131_000_000),
    Model("7 B", 32, ((4096, 4096),) * 4 + ((11008, 4096),) * 3, 262_000_000),
)
METHODS = ("full", "sparse", "LoRA")


@dataclass(frozen=True)
class Constants:
    """What was measured: seconds a token and body parameter by method, bytes a second, seconds a client, seconds a kept entry."""

    train: Mapping[str, float]
    mean: float
    server: float
    accounts: float
    svd: float


def constants(rows: list[dict[str, Any]]) -> Constants:
    """Read the constants from the rows of results.json. Raises ``KeyError`` with the name of a row that has not been measured."""
    by_name = {row["name"]: row for row in rows}
    sparse, lora = by_name["step: 1% random mask, MiniLM, float32"], by_name["step: LoRA on all dense layers, MiniLM"]
    one, ours = sparse["beside"]["seconds"] / (STEP_TOKENS * MINILM_BODY), sparse["beside"]["of a full step on our linear layers"]
    whole = by_name["overhead: gloo, all parameters (91 MB), wall"]["beside"]
    return Constants(
        train={"full": one / ours, "sparse": one, "LoRA": one / sparse["ratio"] * lora["ratio"]},
        mean=1e9 * by_name["mean: 8 updates, a whole MiniLM"]["beside"]["GB/s"],
        server=MINILM_BYTES / max(whole["ours s"] - whole["bare s"], 1e-3),
        accounts=1e-3 * by_name["ledger: share of a short round"]["beside"]["ms"] / 4,
        svd=by_name["svd: 4096 x 11008, 1 %, rank 16"]["ratio"] / (DENSITY * 4096 * 11008),
    )


def parts(model: Model, method: str, clients: int, rate: float, speed: float, known: Constants) -> dict[str, float]:
    """Return the seconds of a round by part; ``rate`` is bits a second, ``speed`` a client's against the measured core."""
    nbytes = model.message(method)
    return {
        "broadcast": math.ceil(math.log2(clients + 1)) * nbytes * 8 / rate,
        "train": TOKENS * model.body * known.train[method] / speed,
        "upload": clients * nbytes * 8 / rate,
        "server": clients * nbytes / known.mean + nbytes / known.server + clients * known.accounts,
    }


def crossing(model: Model, method: str, clients: int, speed: float, known: Constants) -> float:
    """Return the bits a second of the links at which moving a round's bytes takes as long as training."""
    unit = parts(model, method, clients, 1.0, speed, known)
    return (unit["broadcast"] + unit["upload"]) / unit["train"]


def switch(model: Model, known: Constants) -> float:
    """Return the seconds of all SVDs of a 1 % update on one core."""
    return model.body * DENSITY * known.svd


def short(amount: float, units: tuple[tuple[float, str], ...]) -> str:
    """Return two digits in the largest unit that is not above ``amount``."""
    size, unit = next(((size, unit) for size, unit in units if amount >= size), units[-1])
    return f"{float(f'{amount / size:.2g}'):g} {unit}"


def seconds(amount: float) -> str:
    """Return a span of time for people."""
    return short(amount, ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")))


def bits(amount: float) -> str:
    """Return a rate for people."""
    return short(amount, ((1e12, "Tbit/s"), (1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1, "bit/s")))


def crossings(known: Constants) -> str:
    """Return the table of rates above which training dominates."""
    heads = [f"K = {clients}, {device}" for device in DEVICES for clients in CLIENTS]
    lines = ["| network | method | message | switch | " + " | ".join(heads) + " |", "|---|---|---|---|" + "---|" * len(heads)]
    for model in MODELS:
        for method in METHODS:
            cells = [bits(crossing(model, method, clients, speed, known)) for speed in DEVICES.values() for clients in CLIENTS]
            once = seconds(switch(model, known)) if method == "sparse" else ""
            lines.append(
                f"| {model.name} | {method} | {short(model.message(method), ((1e9, 'GB'), (1e6, 'MB')))} | {once} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def rounds(known: Constants, clients: int) -> str:
    """Return the table of a round's time and of the part that takes most of it."""
    lines = ["| network | method | trained by | " + " | ".join(RATES) + " |", "|---|---|---|" + "---|" * len(RATES)]
    for model in MODELS:
        for method in METHODS:
            for device, speed in DEVICES.items():
                found = [parts(model, method, clients, rate, speed, known) for rate in RATES.values()]
                cells = [f"{max(part, key=part.__getitem__)} {seconds(sum(part.values()))}" for part in found]
                lines.append(f"| {model.name} | {method} | {device} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Write the tables between their markers."""
    known = constants(json.loads(RESULTS.read_text(encoding="utf-8")))
    told = (
        f"Constants: {known.train['full']:.2g}, {known.train['sparse']:.2g} and {known.train['LoRA']:.2g} s a token and body parameter "
        f"(full, sparse, LoRA), mean {known.mean / 1e9:.2g} GB/s, server's other work {known.server / 1e9:.2g} GB/s, accounts "
        f"{1e3 * known.accounts:.2g} ms a client, SVD {1e9 * known.svd:.2g} ns a kept entry.\n\n"
        f"Links at which a round's bytes take as long as its training (above them training dominates, below them the upload):\n\n"
        f"{crossings(known)}\n\nA round with K = 100, and the part that takes most of it:\n\n{rounds(known, 100)}"
    )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{told}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
