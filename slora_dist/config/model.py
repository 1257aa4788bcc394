"""Settings of the model."""

from typing import Any, Literal

from pydantic import Field

from slora_dist.section import Section


class ModelConfig(Section):
    """The pretrained model."""

    task: Literal["classification", "causal_lm"] = Field(
        "classification", description="What the model learns: the class of a document, or to answer a prompt, token by token."
    )
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
        None,
        description="Modules trained and averaged densely in every phase. Empty: all that stands above the backbone; for `causal_lm` nothing.",
    )
    attention: Literal["eager", "sdpa"] = Field("eager", description="Attention kernel; `eager` trains faster on CPUs.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Compute precision of local training: `bfloat16` is autocast, weights and updates stay float32. Evaluation is always float32.",
    )
