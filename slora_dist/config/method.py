"""Settings of methods: kinds of phase, and the presets that are made of them."""

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from slora_dist.errors import ConfigError
from slora_dist.section import NonNegative, Positive, Real, Section, explain

ALL: tuple[Fraction, ...] = (Fraction(1),)
Rule = Literal["fedavg", "ffa", "rolora", "fedex", "stack", "svd", "fedsvd", "fair"]


class Phase(Section):
    """What every phase has."""

    rounds: int = Field(10, ge=1, description="Rounds of the phase.")
    lr: Positive = Field(5e-4, description="Local learning rate in the phase's first round.")
    lr_decay: Positive = Field(1.0, description="Factor on the learning rate from each round to the next.")

    @property
    def portions(self) -> tuple[Fraction, ...]:
        """The shares of every factor's rank that clients have, dealt to them in turn: all of it."""
        return ALL

    def portion(self, client: int) -> Fraction:
        """Return the share of every factor's rank that ``client`` has."""
        return self.portions[client % len(self.portions)]


class SparsePhase(Phase):
    """Fine-tuning of a fixed random share of the weights (SLoRA stage 1, SFT)."""

    kind: Literal["sparse"] = "sparse"
    mask: Literal["random", "rows", "columns", "product", "magnitude", "gradient"] = Field(
        "random",
        description="Which entries of a matrix: single ones (the paper), whole rows or columns, or the crossings of sqrt(density) of both (vectors: single ones); `magnitude`: each tensor's largest pretrained weights; `gradient`: those whose squared gradients are largest on documents of the first round's clients.",
    )
    mask_documents: int = Field(
        32, ge=1, description="With `mask: gradient`: documents of a client whose squared gradients it averages; all when it has fewer."
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

    @property
    def chosen(self) -> bool:
        """Whether the mask follows from what the weights are, so that its positions are not known from shapes alone."""
        return self.mask in ("magnitude", "gradient")


class DensePhase(Phase):
    """Fine-tuning of all weights (FFT, the first stage of primed_fft)."""

    kind: Literal["dense"] = "dense"


class LowrankPhase(Phase):
    """LoRA. After another phase the factors start from the SVD of its update (SLoRA stage 2); alone, A is random and B zero."""

    kind: Literal["lowrank"] = "lowrank"
    init: Literal["svd", "completion", "kaiming", "pissa"] | None = Field(
        None,
        description="Where the factors begin. After another phase: `svd` of its update, or low-rank `completion` of a sparse one. "
        "First: `kaiming` (A random, B zero), or `pissa` (the largest singular values of the pretrained weights, which leave the base; "
        "a method of this phase alone). `kaiming` after another phase forgets it. Empty: `svd` after another phase, else `kaiming`.",
    )
    magnitude: Literal["step", "entries"] = Field(
        "step",
        description="Size of a `completion`: where it is closest to the update itself, or that of the observed entries, up to 1 / density as large.",
    )
    rank: int = Field(8, ge=1, description="Rank of the factors.")
    ranks: dict[str, int] = Field({}, description="Other ranks by module name ending, e.g. `{pooler.dense: 18}`.")
    client_ranks: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="Clients of different ranks, dealt in turn: client i has rank `client_ranks[i mod length]`, up to `rank`, e.g. `[8, 4, 2]`, "
        "and trains and exchanges as many leading rows of A and columns of B; with the rules fedavg, stack and svd. Empty: all have `rank`.",
    )
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
    rule: Rule = Field(
        "fedavg",
        description="How the clients' factors become one: `fedavg` (the paper) averages both; the others mend that the product of averages is not the average of products, see docs/algorithm.md.",
    )
    fair_ridge: NonNegative = Field(
        0.01, description="How small `fair` keeps its correction of B, relative to A's squared singular values."
    )
    split: Literal["us", "sqrt"] = Field(
        "us", description="Where the singular values go: all to B (the paper), or their roots to both (always with `pissa`)."
    )

    @property
    def portions(self) -> tuple[Fraction, ...]:
        """The shares of every factor's rank that clients have, dealt to them in turn."""
        return tuple(Fraction(rank, self.rank) for rank in self.client_ranks) or super().portions


class BitfitPhase(Phase):
    """Fine-tuning of the biases (BitFit)."""

    kind: Literal["bitfit"] = "bitfit"


class HeadPhase(Phase):
    """Training of the head alone (linear probing)."""

    kind: Literal["head"] = "head"


Activation = Literal["relu", "gelu", "silu", "tanh"]
_ACTIVATION = "What stands between an adapter's two projections."


class HoulsbyPhase(Phase):
    """Bottleneck adapters after attention and after the feed-forward part of every layer (Houlsby et al. 2019)."""

    kind: Literal["houlsby"] = "houlsby"
    size: int = Field(64, ge=1, description="Features between an adapter's two projections.")
    activation: Activation = Field("gelu", description=_ACTIVATION)
    norms: bool = Field(True, description="Whether the norms' parameters train, too (as in the paper).")


class PfeifferPhase(Phase):
    """Bottleneck adapters after the feed-forward part of every layer (Pfeiffer et al. 2021)."""

    kind: Literal["pfeiffer"] = "pfeiffer"
    size: int = Field(64, ge=1, description="Features between an adapter's two projections.")
    activation: Activation = Field("relu", description=_ACTIVATION)


AnyPhase = Annotated[
    SparsePhase | DensePhase | LowrankPhase | BitfitPhase | HeadPhase | HoulsbyPhase | PfeifferPhase, Field(discriminator="kind")
]


PRESETS: dict[str, tuple[str, ...]] = {
    "slora": ("sparse", "lowrank"),
    "primed_fft": ("dense", "lowrank"),
    "sft": ("sparse",),
    "lora": ("lowrank",),
    "fft": ("dense",),
    "bitfit": ("bitfit",),
    "head": ("head",),
    "houlsby": ("houlsby",),
    "pfeiffer": ("pfeiffer",),
}


class MethodConfig(Section):
    """A method is a list of phases; the named ones are presets of that form."""

    name: Literal["slora", "primed_fft", "sft", "lora", "fft", "bitfit", "head", "houlsby", "pfeiffer", "custom"] = Field(
        "slora", description="Preset: its phases take their settings from the sections below. `custom` is the list in `method.phases`."
    )
    sparse: SparsePhase = Field(SparsePhase(), description="Settings of sparse phases.")
    dense: DensePhase = Field(DensePhase(), description="Settings of dense phases.")
    lowrank: LowrankPhase = Field(LowrankPhase(), description="Settings of low-rank phases.")
    bitfit: BitfitPhase = Field(BitfitPhase(), description="Settings of BitFit phases.")
    head: HeadPhase = Field(HeadPhase(), description="Settings of phases that train the head alone.")
    houlsby: HoulsbyPhase = Field(HoulsbyPhase(), description="Settings of phases with Houlsby adapters.")
    pfeiffer: PfeifferPhase = Field(PfeifferPhase(), description="Settings of phases with Pfeiffer adapters.")
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
            if phase.kind == "sparse" and phase.mask == "gradient" and at > 0:
                raise ConfigError(f"method.phases.{at}.mask", "gradient after another phase", "gradient in the first phase only")
        kinds = [phase.kind for phase in self.resolved()]
        for at, kind in enumerate(kinds):
            if kind not in ("dense", "lowrank") and not set(kinds[:at]) <= {"head"}:
                raise ConfigError(
                    f"method.phases.{at}.kind",
                    f"a {kind} phase cannot take over what an earlier phase learned",
                    f"{kind} first, or after a phase that trains the head alone; dense or lowrank later",
                )
            if kind in ("houlsby", "pfeiffer") and at + 1 < len(kinds):
                raise ConfigError(f"method.phases.{at}.kind", f"no phase can take over {kind} adapters", f"{kind} last")
            self._init_fits(at)
            self._keep_fits(at)
        return self

    def _init_fits(self, at: int) -> None:
        phases = self.resolved()
        phase, before = phases[at], [earlier.kind for earlier in phases[:at] if earlier.kind != "head"]
        if not isinstance(phase, LowrankPhase):
            return
        setting = f"method.phases.{at}.init" if self.name == "custom" else "method.lowrank.init"
        if phase.init in ("svd", "completion") and not before:
            raise ConfigError(setting, f"{phase.init} with no update before it", "kaiming or pissa, or a method with an earlier phase")
        if phase.init == "svd" and before[-1] == "bitfit":
            raise ConfigError(setting, "svd after a bitfit phase, which moves no matrix", "kaiming or empty; svd after another phase")
        if phase.init == "completion" and before[-1] != "sparse":
            raise ConfigError(setting, f"completion after a {before[-1]} phase", "svd or kaiming; completion after a sparse phase")
        if phase.init == "pissa" and (before or at + 1 < len(phases)):
            raise ConfigError(
                setting, "pissa beside another phase that trains the backbone", "svd, completion or kaiming; pissa with `name: lora`"
            )
        if phase.init == "pissa" and phase.rule in ("fedex", "stack"):
            raise ConfigError(setting, f"pissa with the rule {phase.rule}, which changes the base, too", "kaiming, or another rule")

    def _keep_fits(self, at: int) -> None:
        phases = self.resolved()
        phase, before = phases[at], [earlier.kind for earlier in phases[:at] if earlier.kind != "head"]
        if not isinstance(phase, LowrankPhase):
            return
        for name, value in (("residual", phase.residual), ("remainder", phase.remainder)):
            if value == "keep" and (not before or (name == "residual" and before[-1] == "bitfit")):
                setting = f"method.phases.{at}.{name}" if self.name == "custom" else f"method.lowrank.{name}"
                problem = "keep with no update before it" if not before else "keep after a bitfit phase, which moves no matrix"
                raise ConfigError(setting, problem, "drop; keep after another phase")

    def resolved(self) -> tuple[AnyPhase, ...]:
        """Return the phases in order, every setting filled in."""
        if self.name != "custom":
            return tuple(getattr(self, kind) for kind in PRESETS[self.name])
        return tuple(self._custom(at, entry) for at, entry in enumerate(self.phases))

    def _custom(self, at: int, entry: dict[str, Any]) -> AnyPhase:
        section: AnyPhase | None = getattr(self, str(entry.get("kind")), None)
        if not isinstance(section, Phase):
            kinds = [name for name, value in self if isinstance(value, Phase)]
            raise ConfigError(f"method.phases.{at}.kind", f"{entry.get('kind')!r} is no kind of phase", ", ".join(kinds))
        try:
            return type(section).model_validate(section.model_dump() | entry)
        except ValidationError as error:
            raise explain(error, type(section), f"method.phases.{at}.") from None
