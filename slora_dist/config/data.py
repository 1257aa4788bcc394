"""Settings of the documents."""

from typing import Literal

from pydantic import Field

from slora_dist.section import Positive, Section


class DataConfig(Section):
    """The documents, and how they fall to clients."""

    path: str = Field(
        description="csv, json(l) or parquet file, `datasets` folder, hub name (`name:subset`), `toy`, `toy_qa`, or a fetched name. With `{client}` in it, each client has its own file, that only its rank opens."
    )
    test_path: str | None = Field(None, description="Held-out documents, read by rank 0 alone. Empty: the source's `data.test_split`.")
    split: str = Field("train", description="Split to train on, where the source has several.")
    test_split: str = Field("test", description="Split to evaluate on, where the source has several.")
    text: str = Field(
        "text", description="Column with the document. For `causal_lm`: the prompt, a chat (a list of {role, content}), or a plain text."
    )
    answer: str | None = Field(None, description="Column with the answer to the prompt, for `model.task: causal_lm`: it alone is learned.")
    template: str | None = Field(
        None,
        description='What stands before the answer: text with `{column}` in it, e.g. `"Question: {text}\\nAnswer: "`. Empty: the tokenizer\'s chat template, or the prompt and a new line.',
    )
    label: str = Field(
        "label", description="Column with the class: integers from 0, or names. For `causal_lm` only splits by label read it."
    )
    labels: int | list[str] | None = Field(
        None,
        description="Number of classes, or their names in order. Empty: those of the training source; needed when each client has its own file.",
    )
    max_length: int = Field(128, ge=2, description="Tokens of a document that are read.")
    limit: int | None = Field(None, ge=1, description="Training documents used, drawn by the run's seed. Empty: all.")
    test_limit: int | None = Field(None, ge=1, description="Held-out documents used, drawn by the run's seed. Empty: all.")
    partition: Literal["iid", "dirichlet", "pathological", "quantity", "natural"] = Field(
        "iid",
        description="How one source is split over the clients: at random, by Dirichlet(alpha) over labels, by few labels a client, at random into sizes by Dirichlet(alpha), or by `data.client_column`.",
    )
    alpha: Positive = Field(0.5, description="Dirichlet concentration, of labels or of sizes: small is heterogeneous.")
    shards: int = Field(
        2, ge=1, description="Pathological split: documents sorted by label are cut into clients x shards pieces, `shards` for each client."
    )
    client_column: str | None = Field(None, description="Column that names the client, for `data.partition: natural`.")
