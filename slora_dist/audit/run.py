"""What an audit reads: a run's files as far as it got, and the plan and the protocol made anew from its settings."""

from slora_dist.audit.expected import Life, Protocol
from slora_dist.data.federation import Federation, class_names
from slora_dist.ledger import BROKEN
from slora_dist.model import shell, tokenizer
from slora_dist.plan import exchanges, plan
from slora_dist.runfolder import RunFolder

WAYS = ("up", "down")


class Run:
    """A run's files, and what they are held against. Raises ``ConfigError`` when the folder, the model or the data cannot be read."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.config = folder, folder.config()
        self.classifier = shell(self.config.model, class_names(self.config))
        self.plan = plan(self.config, self.classifier, [])
        self.metrics = folder.lines("metrics")
        self.done = len(self.metrics)
        self.finished = (folder.path / "summary.json").exists()
        unwritten = None if self.finished else self.done + 1  # a round without a record: its lines go when the run is resumed
        ledger, self.counters = ([line for line in folder.lines(name) if line["round"] != unwritten] for name in ("ledger", "counters"))
        self.ledger = [line for line in ledger if line["kind"] != BROKEN]  # a round that was broken off obeys no protocol
        ranks, clients = ({one["round"]: one["missing"][who] for one in self.metrics if "missing" in one} for who in ("ranks", "clients"))
        sizes = Federation(self.config, tokenizer(self.config.model)).sizes
        self.protocol = Protocol(self.config, self.plan, exchanges(self.config, self.classifier), sizes, clients)
        self.lives = self.protocol.lives(self.ledger, self.done, ranks)

    def transport(self, life: Life) -> str:
        """Return the transport of a life: a run that goes on may do so over another one."""
        return str(self.metrics[life.first - 1].get("transport", self.folder.transport))

    def life(self, number: int) -> Life:
        """Return the life that played round ``number``."""
        return next((life for life in self.lives if life.first <= number <= life.last), Life(number, number, 1, (0,)))
