"""The settings of a run: typed sections, each setting documented once, here. ``settings.py`` reads them from YAML."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from slora_dist.errors import ConfigError
from slora_dist.section import NonNegative, Positive, Real, Section, explain


class ModelConfig(Section):
    """The pretrained classifier."""

    name: str | None = Field(
        None,
        description="Model folder, hub name, or a name that `slora-dist fetch` has put into the cache. Empty: random weights from `model.config`.",
    )
    config: dict[str, Any] = Field(
        {},
        description="transformers settings laid over the model's own (`num_hidden_layers: 2`); without `model.name` they define it and `model_type` is needed.",
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer folder or hub name. Empty: the model's; without `model.name`, words of the training texts."
    )
    head: list[str] | None = Field(
        None, description="Modules trained and averaged densely in every phase. Empty: all that stands above the backbone."
    )
    attention: Literal["eager", "sdpa"] = Field("eager", description="Attention kernel; `eager` trains faster on CPUs.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Compute precision of local training: `bfloat16` is autocast, weights and updates stay float32. Evaluation is always float32.",
    )


class DataConfig(Section):
    """The documents, and how they fall to clients."""

    path: str = Field(
        description="csv, json(l) or parquet file, `datasets` folder, hub name (`name:subset`), `toy`, or a fetched name. With `{client}` in it, each client has its own file, that only its rank opens."
    )
    test_path: str | None = Field(None, description="Held-out documents, read by rank 0 alone. Empty: the source's `data.test_split`.")
    split: str = Field("train", description="Split to train on, where the source has several.")
    test_split: str = Field("test", description="Split to evaluate on, where the source has several.")
    text: str = Field("text", description="Column with the document.")
    label: str = Field("label", description="Column with the class: integers from 0, or names.")
    labels: int | list[str] | None = Field(
        None,
        description="Number of classes, or their names in order. Empty: those of the training source; needed when each client has its own file.",
    )
    max_length: int = Field(128, ge=2, description="Tokens of a document that are read.")
    limit: int | None = Field(None, ge=1, description="Training documents used, drawn by the run's seed. Empty: all.")
    test_limit: int | None = Field(None, ge=1, description="Held-out documents used, drawn by the run's seed. Empty: all.")
    partition: Literal["iid", "dirichlet", "pathological", "natural"] = Field(
        "iid",
        description="How one source is split over the clients: at random, by Dirichlet(alpha) over labels, by few labels a client, or by `data.client_column`.",
    )
    alpha: Positive = Field(0.5, description="Dirichlet concentration: small is heterogeneous.")
    shards: int = Field(
        2, ge=1, description="Pathological split: documents sorted by label are cut into clients x shards pieces, `shards` for each client."
    )
    client_column: str | None = Field(None, description="Column that names the client, for `data.partition: natural`.")


class ClientsConfig(Section):
    """Who takes part, and how a client trains."""

    count: int = Field(4, ge=1, description="N, the clients that there are.")
    per_round: int | None = Field(None, ge=1, description="K, the clients sampled each round, without replacement. Empty: all.")
    epochs: int = Field(1, ge=1, description="Local epochs each round.")
    steps: int | None = Field(None, ge=1, description="Local optimiser steps each round, in place of epochs.")
    batch_size: int = Field(32, ge=1, description="Documents in a local step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Local optimiser, made anew each round.")
    weight_decay: NonNegative = Field(0.0, description="Weight decay of the local optimiser; it moves trainable weights only.")


class Phase(Section):
    """What every phase has."""

    rounds: int = Field(10, ge=1, description="Rounds of the phase.")
    lr: Positive = Field(5e-4, description="Local learning rate in the phase's first round.")
    lr_decay: Positive = Field(1.0, description="Factor on the learning rate from each round to the next.")


class SparsePhase(Phase):
    """Fine-tuning of a fixed random share of the weights (SLoRA stage 1, SFT)."""

    kind: Literal["sparse"] = "sparse"
    mask: Literal["random", "rows", "columns", "product"] = Field(
        "random",
        description="Which entries of a matrix: single ones (the paper), whole rows or columns, or the crossings of sqrt(density) of both. Vectors: single ones.",
    )
    density: Real = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of every masked tensor that trains, above 0 and up to 1: exactly round(density x numel) entries, or the nearest whole rows and columns.",
    )
    scope: Literal["all", "targets"] = Field(
        "all", description="What the mask covers: all backbone weights, or only the matrices that `method.lowrank.targets` names."
    )


class DensePhase(Phase):
    """Fine-tuning of all weights (FFT, the first stage of primed_fft)."""

    kind: Literal["dense"] = "dense"


class LowrankPhase(Phase):
    """LoRA. After another phase the factors start from the SVD of its update (SLoRA stage 2); alone, A is random and B zero."""

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(8, ge=1, description="Rank of the factors.")
    ranks: dict[str, int] = Field({}, description="Other ranks by module name ending, e.g. `{pooler.dense: 18}`.")
    alpha: Positive | None = Field(
        None, description="LoRA alpha; the product is scaled by alpha / rank. Empty: each module's rank, so that the scale is 1."
    )
    targets: Literal["all", "attention"] | list[str] = Field(
        "all", description="Every dense layer but embeddings and head, the attention matrices, or a list of module name endings."
    )
    dropout: Real = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    residual: Literal["drop", "keep"] = Field(
        "drop", description="What the SVD cuts off at the switch: forget it (the paper), or fold it into the frozen base."
    )
    remainder: Literal["drop", "keep"] = Field(
        "drop",
        description="The first phase's change of what is no LoRA target (embeddings, biases, norms): forget it, or keep it in the frozen base.",
    )
    split: Literal["us", "sqrt"] = Field("us", description="Where the singular values go: all to B (the paper), or their roots to both.")


AnyPhase = Annotated[SparsePhase | DensePhase | LowrankPhase, Field(discriminator="kind")]
PRESETS: dict[str, tuple[str, ...]] = {
    "slora": ("sparse", "lowrank"),
    "primed_fft": ("dense", "lowrank"),
    "sft": ("sparse",),
    "lora": ("lowrank",),
    "fft": ("dense",),
}


class MethodConfig(Section):
    """A method is a list of phases; the named ones are presets of that form."""

    name: Literal["slora", "primed_fft", "sft", "lora", "fft", "custom"] = Field(
        "slora", description="Preset: its phases take their settings from the sections below. `custom` is the list in `method.phases`."
    )
    sparse: SparsePhase = Field(SparsePhase(), description="Settings of sparse phases.")
    dense: DensePhase = Field(DensePhase(), description="Settings of dense phases.")
    lowrank: LowrankPhase = Field(LowrankPhase(), description="Settings of low-rank phases.")
    phases: list[dict[str, Any]] = Field(
        [], description="For `custom`: each entry has a `kind` and whatever differs from that kind's section."
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> "MethodConfig":
        if (self.name == "custom") != bool(self.phases):
            raise ConfigError(
                "method.phases",
                f"{'empty' if not self.phases else 'given'} with method.name {self.name}",
                "a list of phases with `name: custom`, none with a preset",
            )
        for at, phase in enumerate(self.resolved()):
            if phase.kind == "sparse" and at > 0:
                raise ConfigError(
                    f"method.phases.{at}.kind",
                    "a sparse phase cannot take over what an earlier phase learned",
                    "sparse first; dense or lowrank later",
                )
        return self

    def resolved(self) -> tuple[SparsePhase | DensePhase | LowrankPhase, ...]:
        """Return the phases in order, every setting filled in."""
        if self.name != "custom":
            return tuple(getattr(self, kind) for kind in PRESETS[self.name])
        return tuple(self._custom(at, entry) for at, entry in enumerate(self.phases))

    def _custom(self, at: int, entry: dict[str, Any]) -> SparsePhase | DensePhase | LowrankPhase:
        section: SparsePhase | DensePhase | LowrankPhase | None = getattr(self, str(entry.get("kind")), None)
        if not isinstance(section, Phase):
            raise ConfigError(f"method.phases.{at}.kind", f"{entry.get('kind')!r} is no kind of phase", "sparse, dense or lowrank")
        try:
            return type(section).model_validate(section.model_dump() | entry)
        except ValidationError as error:
            raise explain(error, type(section), f"method.phases.{at}.") from None


class ServerConfig(Section):
    """How rank 0 combines updates and judges the result."""

    optimizer: Literal["sgd", "adam", "yogi"] = Field(
        "sgd", description="Optimiser on the negative mean update: `sgd` with lr 1 is FedAvg, with momentum FedAvgM; FedAdam; FedYogi."
    )
    lr: Positive = Field(1.0, description="Server learning rate.")
    momentum: Real = Field(0.0, ge=0, lt=1, description="Momentum of `sgd`, beta1 of `adam` and `yogi`.")
    beta2: Real = Field(0.99, ge=0, lt=1, description="Second-moment decay of `adam` and `yogi`.")
    eps: Positive = Field(1e-3, description="Adaptivity (tau) of `adam` and `yogi`.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Mean over clients: all alike (the paper), or by number of examples."
    )
    svd: Literal["root", "ranks"] = Field(
        "root", description="Who factors the matrices at a switch: rank 0, or every rank its share, for which the update travels once more."
    )
    eval_every: int = Field(1, ge=0, description="Rounds between evaluations; 0: only at the end of each phase.")


class WireConfig(Section):
    """How numbers become bytes."""

    values: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="Number format of values and factors; `int8` comes with a float32 scale for each block of 128."
    )
    indices: Literal["implicit", "gap", "gap+zstd", "int32"] = Field(
        "implicit",
        description="Masked positions: derived from the seed on every rank, or sent before the values as gaps in bytes, as such gaps through zstandard, or as int32.",
    )


class CommConfig(Section):
    """The transport."""

    backend: Literal["auto", "gloo", "nccl", "mpi"] = Field(
        "auto", description="`auto`: MPI under an MPI launcher, else nccl with CUDA, else gloo; a world of one needs none."
    )
    wire: WireConfig = Field(WireConfig(), description="Number formats on the wire.")
    collective: Literal["gather", "reduce", "auto"] = Field(
        "gather",
        description="Upload: every update to rank 0, added in client order; or summed on the way, in the transport's order (other last bits); `auto` measures both.",
    )
    timeout: Positive = Field(
        1800.0, description="Seconds that a rank waits for another inside one operation; must cover a client's training."
    )


class LinkConfig(Section):
    """One class of clients' links."""

    up_mbit: Positive | None = Field(None, description="Mbit/s from a client to the network, headers included. Empty: no limit.")
    down_mbit: Positive | None = Field(None, description="Mbit/s from the network to a client, headers included. Empty: no limit.")
    latency_ms: NonNegative = Field(0.0, description="Milliseconds of latency, one way.")
    jitter_ms: NonNegative = Field(0.0, description="Standard deviation of the latency, drawn anew for every message.")


class SharedLinkConfig(LinkConfig):
    """One class of links, and how many clients have it."""

    share: Positive = Field(1.0, description="Share of the clients that have such a link, against the other classes' shares.")


class NetworkConfig(LinkConfig):
    """The links of clients, emulated: what the run would cost in time on them. Bytes and bits do not change."""

    mode: Literal["off", "virtual", "sleep"] = Field(
        "off",
        description="`virtual` computes each round's seconds on these links and sleeps nowhere; `sleep` delays the real messages, one client a rank.",
    )
    classes: dict[str, SharedLinkConfig] = Field(
        {}, description="Several kinds of links in place of one: `{phone: {share: 3, up_mbit: 5, down_mbit: 20, latency_ms: 40}, ...}`."
    )
    server_mbit: Positive | None = Field(None, description="Mbit/s of the server's own link, each way. Empty: no limit.")
    routing: Literal["direct", "collective"] = Field(
        "direct",
        description="`direct`: the server sends every client its own copy (phones); `collective`: ranks behind alike links pass copies on (clusters).",
    )


class RunConfig(Section):
    """What belongs to this one run."""

    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models are trained; `auto` takes CUDA when there is one.")
    threads: int = Field(1, ge=1, description="CPU threads of a rank. Part of what fixes the bits: sums depend on it.")


class Config(Section):
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    clients: ClientsConfig = ClientsConfig()
    method: MethodConfig = MethodConfig()
    server: ServerConfig = ServerConfig()
    comm: CommConfig = CommConfig()
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

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        if self.sampled > self.clients.count:
            raise ConfigError(
                "clients.per_round", f"{self.sampled} sampled of {self.clients.count} clients", f"1 to clients.count = {self.clients.count}"
            )
        if self.model.name is None and "model_type" not in self.model.config:
            raise ConfigError("model.name", "no model", "a folder or name, or `model.config` with a `model_type`")
        if self.data.partition == "natural" and not self.data.client_column and not self.client_files:
            raise ConfigError("data.client_column", "missing", "the column that names the client, with `data.partition: natural`")
        if self.comm.collective != "gather" and self.comm.wire != WireConfig():
            raise ConfigError(
                "comm.collective", f"{self.comm.collective} with another wire", "gather, or float32 values with implicit indices"
            )
        if self.client_files and self.data.labels is None:
            raise ConfigError("data.labels", "missing", "the number of classes or their names, when each client has its own file")
        if self.client_files and self.data.test_path is None:
            raise ConfigError("data.test_path", "missing", "a held-out file, when each client has its own file")
        return self
