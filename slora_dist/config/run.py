"""Settings of one run, and all sections together."""

from typing import Literal

from pydantic import Field, model_validator

from slora_dist.config.clients import ClientsConfig
from slora_dist.config.comm import CommConfig
from slora_dist.config.data import DataConfig
from slora_dist.config.method import LowrankPhase, MethodConfig
from slora_dist.config.model import ModelConfig
from slora_dist.config.network import LinkConfig, NetworkConfig
from slora_dist.config.privacy import PrivacyConfig
from slora_dist.config.server import ROBUST, ServerConfig
from slora_dist.errors import ConfigError
from slora_dist.section import Section


class RunConfig(Section):
    """What belongs to this one run."""

    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models are trained; `auto` takes CUDA when there is one.")
    threads: int = Field(1, ge=1, description="CPU threads of a rank. Part of what fixes the bits: sums depend on it.")


RANKED = ("fedavg", "stack", "svd")  # rules of a low-rank phase under which clients may have factors of different ranks
MADE_ANEW = ("stack", "svd", "fedsvd")  # rules whose factors are other coordinates after every round
SUMMED = ("fedavg", "ffa", "rolora", "fedsvd")  # rules of a low-rank phase that need of the updates their sum only


class Config(Section):
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    clients: ClientsConfig = ClientsConfig()
    method: MethodConfig = MethodConfig()
    server: ServerConfig = ServerConfig()
    comm: CommConfig = CommConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    network: NetworkConfig = NetworkConfig()
    run: RunConfig = RunConfig()

    @property
    def sampled(self) -> int:
        """K, the clients of a round."""
        return self.clients.per_round or self.clients.count

    def steps(self, documents: int) -> int:
        """Return the local optimiser steps in a round of a client with as many documents."""
        return self.clients.steps or self.clients.epochs * -(-documents // self.clients.batch_size)

    @property
    def client_files(self) -> bool:
        """Whether each client has a file of its own."""
        return "{client}" in self.data.path

    @property
    def keeps_state(self) -> bool:
        """Whether clients keep something from round to round."""
        return bool(self.clients.keep) or self.clients.scaffold or (self.comm.wire.topk is not None and self.comm.wire.feedback)

    @property
    def at_home(self) -> bool:
        """Whether every client stays on one rank over the whole run, because its data or its state is only there."""
        return self.client_files or self.keeps_state or self.clients.min_clients is not None

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        if self.sampled > self.clients.count:
            raise ConfigError(
                "clients.per_round", f"{self.sampled} sampled of {self.clients.count} clients", f"1 to clients.count = {self.clients.count}"
            )
        if (self.clients.min_clients or 1) > self.clients.count:
            raise ConfigError(
                "clients.min_clients", f"{self.clients.min_clients} of {self.clients.count} clients", f"1 to {self.clients.count}"
            )
        self._away_fits()
        if self.model.name is None and "model_type" not in self.model.config:
            raise ConfigError("model.name", "no model", "a folder or name, or `model.config` with a `model_type`")
        if self.data.partition == "natural" and not self.data.client_column and not self.client_files:
            raise ConfigError("data.client_column", "missing", "the column that names the client, with `data.partition: natural`")
        if self.data.client_column and self.data.partition != "natural":
            problem = f"given with data.partition {self.data.partition}, which does not look at it"
            raise ConfigError("data.client_column", problem, "empty; or data.partition natural")
        self._network_fits()
        if self.comm.wire.topk and self.comm.wire.indices == "implicit":
            raise ConfigError("comm.wire.indices", "implicit with topk, where clients differ", "gap, gap+zstd, int32")
        if self.comm.encrypt and self.comm.collective != "gather":
            raise ConfigError("comm.encrypt", f"true with comm.collective {self.comm.collective}: sums on the way are not sealed", "gather")
        if self.comm.collective != "gather" and (self.comm.wire.up, self.comm.wire.indices) != ("float32", "implicit"):
            raise ConfigError(
                "comm.collective", f"{self.comm.collective} with another wire", "gather, or uploads of float32 values with implicit indices"
            )
        self._aggregate_fits()
        self._clients_fit()
        for phase in self.method.resolved():
            if isinstance(phase, LowrankPhase):
                self._rule_fits(phase)
                self._client_ranks_fit(phase)
        chosen = any(phase.kind == "sparse" and phase.chosen for phase in self.method.resolved())
        if chosen and not self.comm.wire.topk and self.comm.wire.indices != "implicit":
            raise ConfigError("comm.wire.indices", f"{self.comm.wire.indices} with a mask that all ranks know by then", "implicit")
        self._sum_fits()
        self._privacy_fits()
        if self.data.answer is not None and self.model.task != "causal_lm":
            raise ConfigError("data.answer", f"given with model.task {self.model.task}", "`model.task: causal_lm`, or no answer")
        if self.data.template is not None and self.data.answer is None:
            raise ConfigError("data.template", "given without an answer", "the column of answers in `data.answer`, or no template")
        if self.client_files and self.data.labels is None and self.model.task == "classification":
            raise ConfigError("data.labels", "missing", "the number of classes or their names, when each client has its own file")
        if self.client_files and self.data.partition not in ("iid", "natural"):
            raise ConfigError(
                "data.partition", f"{self.data.partition}, where each client has its own file", "iid, which is as good as none"
            )
        if self.client_files and self.data.limit is not None:
            raise ConfigError("data.limit", "given, where each client has its own file, which is read as a whole", "empty")
        if self.client_files and self.data.test_path is None:
            raise ConfigError("data.test_path", "missing", "a held-out file, when each client has its own file")
        return self

    def _network_fits(self) -> None:
        given = [
            name for name, field in NetworkConfig.model_fields.items() if name != "mode" and getattr(self.network, name) != field.default
        ]
        if given and self.network.mode == "off":
            raise ConfigError(
                f"network.{given[0]}", "given with network.mode off, where nothing is emulated", "empty; or network.mode virtual, sleep"
            )
        for name in LinkConfig.model_fields if self.network.classes else ():
            if name in given:
                raise ConfigError(f"network.{name}", "given beside network.classes, which have their own", "empty; or no network.classes")

    def _away_fits(self) -> None:
        """Check what is planned, and that no round is left without the clients that it takes."""
        for client, span in self.clients.away.items():
            if not (0 <= client < self.clients.count and len(span) in (1, 2) and 1 <= span[0] <= span[-1]):
                allowed = f"clients 0 to {self.clients.count - 1}, rounds [first] or [first, last] from 1"
                raise ConfigError("clients.away", f"client {client}: {span}", allowed)
        least = max(self.server.least, 2 if self.comm.secure else 1)
        for number in range(1, 1 + sum(phase.rounds for phase in self.method.resolved())):
            away = len(self.clients.away_in(number))
            if away and self.clients.count - away < least:
                problem = f"round {number} is left with {self.clients.count - away} clients"
                raise ConfigError("clients.away", problem, f"{least} or more in every round")

    def _sum_fits(self) -> None:
        wire, exact = self.comm.wire, self.comm.sum == "exact"
        if self.comm.secure and not exact:
            raise ConfigError("comm.secure", f"with comm.sum {self.comm.sum}", "comm.sum exact: masks cancel in sums of integers only")
        if self.comm.secure and self.sampled < 2:
            raise ConfigError("comm.secure", "a client of its own in a round has nobody to mask with", "clients.per_round of 2 or more")
        if exact and (wire.up, wire.indices, wire.topk) != ("float32", "implicit", None):
            problem = "exact, where integers of comm.sum_bits travel up"
            raise ConfigError("comm.sum", problem, "float; or uploads of float32 values with implicit indices and no topk")
        if exact and not self._needs_sums_only:
            raise ConfigError("comm.sum", "exact with a rule that needs every client's factors", f"float, or rules {', '.join(SUMMED)}")

    @property
    def _needs_sums_only(self) -> bool:
        return all(phase.rule in SUMMED for phase in self.method.resolved() if isinstance(phase, LowrankPhase))

    @property
    def _measured(self) -> bool:
        """Whether clients measure gradients, from which rank 0 chooses a mask."""
        return any(phase.kind == "sparse" and phase.mask == "gradient" for phase in self.method.resolved())

    def _privacy_fits(self) -> None:
        settings = self.privacy
        if self._measured and (self.comm.secure or settings.noise_multiplier):
            problem = "gradient: rank 0 sees what every client measures for it"
            raise ConfigError("method.sparse.mask", problem, "another mask, with comm.secure or privacy.noise_multiplier")
        if settings.noise == "distributed" and not self.comm.secure:
            raise ConfigError("privacy.noise", "distributed, but rank 0 sees every client's update", "central; or comm.secure")
        if not settings.noise_multiplier:
            return
        if settings.clip is None:
            raise ConfigError("privacy.clip", "missing", "the L2 norm that bounds a client's update, with privacy.noise_multiplier")
        if self.server.weighting != "uniform":
            raise ConfigError(
                "server.weighting", "examples: a client's weight would not be bounded", "uniform, with privacy.noise_multiplier"
            )
        if self.server.aggregate != "mean":
            problem = f"{self.server.aggregate} with privacy.noise_multiplier, whose noise is measured for a sum"
            raise ConfigError("server.aggregate", problem, "mean; or privacy.noise_multiplier 0")
        if (self.comm.wire.up, self.comm.wire.topk) != ("float32", None) or not self._needs_sums_only:
            problem = "noise on sums, where updates are changed after they were clipped, or looked at one by one"
            raise ConfigError("privacy.noise_multiplier", problem, f"0; or float32 uploads without topk and rules {', '.join(SUMMED)}")

    def _rule_fits(self, phase: LowrankPhase) -> None:
        plain = (self.server.optimizer, self.server.lr, self.server.momentum) == ("sgd", 1.0, 0.0)
        if phase.rule not in ("fedavg", "ffa") and not plain:
            problem = f"{phase.rule} sets factors that a server optimiser would move again"
            raise ConfigError("method.lowrank.rule", problem, "fedavg, ffa; or server.optimizer sgd with lr 1 and momentum 0")
        if phase.rule not in SUMMED and self.comm.collective != "gather":
            raise ConfigError(
                "comm.collective", f"{self.comm.collective} with rule {phase.rule}, which needs every client's factors", "gather"
            )
        if phase.rule in MADE_ANEW and self.comm.wire.topk and self.comm.wire.feedback:
            problem = f"true with rule {phase.rule}, which makes factors anew: what a client still owes is of those before"
            raise ConfigError("comm.wire.feedback", problem, "false; or method.lowrank.rule fedavg, ffa, rolora, fedex, fair")
        if phase.rule not in SUMMED and self.server.aggregate != "mean":
            problem = f"{self.server.aggregate} with rule {phase.rule}, which takes every client's factors as they are"
            raise ConfigError("server.aggregate", problem, f"mean; or method.lowrank.rule {', '.join(SUMMED)}")

    def _client_ranks_fit(self, phase: LowrankPhase) -> None:
        if not phase.client_ranks:
            return
        setting = "method.lowrank.client_ranks"
        if max(phase.client_ranks) > phase.rank:
            raise ConfigError(setting, f"{max(phase.client_ranks)} of rank {phase.rank}", f"1 to method.lowrank.rank = {phase.rank}")
        if phase.rule not in RANKED:
            raise ConfigError(setting, f"given with rule {phase.rule}", f"empty; or method.lowrank.rule {', '.join(RANKED)}")
        if phase.init == "pissa":
            raise ConfigError(setting, "given with init pissa: smaller clients would lack a part of the pretrained weights", "empty")
        for other, is_set in {
            "comm.collective": self.comm.collective != "gather",
            "comm.sum": self.comm.sum != "float",
            "server.aggregate": self.server.aggregate != "mean",
            "clients.keep": bool(self.clients.keep),
            "clients.scaffold": self.clients.scaffold,
            "privacy.noise_multiplier": bool(self.privacy.noise_multiplier),
        }.items():
            if is_set:
                problem = f"given with {other}, which needs updates that are all of one size"
                raise ConfigError(setting, problem, f"empty; or {other} as it is by default")

    def _aggregate_fits(self) -> None:
        rule, hostile = self.server.aggregate, self.server.hostile
        if rule == "mean":
            if hostile:
                raise ConfigError("server.hostile", f"{hostile} with server.aggregate mean, which bears none", f"0; or {', '.join(ROBUST)}")
            return
        if self._measured:
            problem = f"gradient with server.aggregate {rule}: what clients measure for the mask becomes one by a mean, which bears no hostile one"
            raise ConfigError("method.sparse.mask", problem, "another mask; or server.aggregate mean")
        if self.comm.collective != "gather":
            problem = f"{self.comm.collective} with server.aggregate {rule}, which looks at every update"
            raise ConfigError("comm.collective", problem, "gather")
        if self.comm.sum == "exact":
            raise ConfigError("comm.sum", f"exact with server.aggregate {rule}, which looks at every update", "float")
        if rule in ("median", "trimmed_mean") and self.comm.wire.topk:
            problem = f"{rule} with comm.wire.topk: of a coordinate that fewer than half of the clients send little or nothing is left"
            raise ConfigError("server.aggregate", problem, "mean, krum, multi_krum; or no topk")
        if rule in ("trimmed_mean", "multi_krum") and not hostile:
            raise ConfigError(
                "server.hostile", f"0 with server.aggregate {rule}, which then is the mean", "1 or more; or median, krum, mean"
            )
        least = self.server.least
        if self.sampled < least:
            problem = f"{hostile} hostile of {self.sampled} clients in a round are too many for {rule}"
            raise ConfigError(
                "server.hostile", problem, f"0 to {max(0, (self.sampled - least) // 2 + hostile)}, or more clients in a round"
            )

    def _clients_fit(self) -> None:
        rules = {phase.rule for phase in self.method.resolved() if isinstance(phase, LowrankPhase)}
        if self.clients.keep and rules - {"fedavg"}:
            raise ConfigError(
                "clients.keep", f"{', '.join(self.clients.keep)} with a rule other than fedavg", "empty; or method.lowrank.rule fedavg"
            )
        self._kept_fits()
        if self.clients.eval_every and not self.clients.holdout:
            raise ConfigError("clients.holdout", "0 with clients.eval_every: no client has documents to judge by", "a share above 0")
        if not self.clients.scaffold:
            return
        if self.clients.optimizer != "sgd":
            raise ConfigError(
                "clients.scaffold", f"true with clients.optimizer {self.clients.optimizer}", "false; or clients.optimizer sgd"
            )
        if rules - {"fedavg", "ffa"}:
            problem = "true with a rule under which clients' gradients are not of the same coordinates every round"
            raise ConfigError("clients.scaffold", problem, "false; or method.lowrank.rule fedavg or ffa")
        if self.server.weighting != "uniform":
            raise ConfigError("server.weighting", "examples with clients.scaffold, whose variates are means over clients", "uniform")
        if self.server.aggregate != "mean":
            problem = f"{self.server.aggregate} with clients.scaffold, whose variates are means over clients"
            raise ConfigError("server.aggregate", problem, "mean; or clients.scaffold false")
        if self.privacy.clip is not None:
            raise ConfigError("clients.scaffold", "true with privacy.clip, which bounds updates without their variates", "false")
        if self.clients.keep or self.comm.wire.topk:
            raise ConfigError("clients.scaffold", "true with clients.keep or comm.wire.topk", "false; or neither of them")

    def _kept_fits(self) -> None:
        kinds, keep = {phase.kind for phase in self.method.resolved()}, self.clients.keep
        if len(set(keep)) < len(keep):
            raise ConfigError("clients.keep", f"{', '.join(keep)}: one of them twice", "each of factor_b, head once")
        if "head" in keep and kinds == {"head"}:
            raise ConfigError("clients.keep", "head, where nothing else trains: nothing would travel", "empty; or another method")
        if "head" in keep and "head" in kinds and (self.comm.wire.topk or self.comm.sum == "exact"):
            problem = "head, where a phase trains nothing else: of nothing there is no topk and no exact sum"
            raise ConfigError("clients.keep", problem, "empty; or comm.sum float without comm.wire.topk")
        if "head" in keep and self.model.task == "causal_lm" and not self.model.head:
            raise ConfigError("clients.keep", "head of a causal language model that has none", "factor_b; or its name in model.head")
        if "factor_b" in keep and "lowrank" not in kinds:
            raise ConfigError("clients.keep", f"factor_b with method {self.method.name}, which has no factors", "head; or a low-rank phase")
