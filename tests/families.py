"""Families of classifiers and of causal language models, tiny and with random weights."""

from typing import Any

import torch

from slora_dist import model
from slora_dist.config import ModelConfig
from slora_dist.model import TaskModel

NAMES = ("art", "sport", "war")
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES | {"model_type": "bert", "max_position_embeddings": 32},
    "roberta": SIZES | {"model_type": "roberta", "max_position_embeddings": 34},
    "albert": SIZES | {"model_type": "albert", "max_position_embeddings": 32, "embedding_size": 8},
    "distilbert": {
        "model_type": "distilbert", "vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "max_position_embeddings": 32,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32,
        "pad_token_id": 0,
    },
    "llama": SIZES | {"model_type": "llama", "max_position_embeddings": 32, "pad_token_id": 0},
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": FAMILIES["gpt2"] | {"bos_token_id": 2, "eos_token_id": 3, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": SIZES | {"model_type": "llama", "max_position_embeddings": 32, "num_key_value_heads": 1},
    "llama, tied": SIZES | {"model_type": "llama", "max_position_embeddings": 32, "tie_word_embeddings": True},
}


def build(family: str, *, seed: int = 0, head: list[str] | None = None) -> TaskModel:
    return model.load(ModelConfig(config=FAMILIES[family], head=head), NAMES, seed)


def build_causal(family: str, *, head: list[str] | None = None) -> TaskModel:
    return model.load(ModelConfig(task="causal_lm", config=CAUSAL[family], head=head), (), 0)


def documents(count: int = 6, length: int = 7) -> dict[str, torch.Tensor]:
    """A batch of random documents of one length."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(4, 50, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(count) % len(NAMES)}
