"""The kinds of phase as choices of coordinates. Other rooms know this one by the names below."""

from slora_dist.config import AnyPhase
from slora_dist.methods.base import add_to_base, base_weights, remove_adapters
from slora_dist.methods.bottleneck import insert as insert_adapters
from slora_dist.methods.lowrank import as_stored, base_change, base_moves, factorable, factored, keeps, lora_settings, pairs, reduce_base
from slora_dist.methods.phase import Start, begin, enter, learned, names, support

__all__ = [
    "AnyPhase",
    "Start",
    "add_to_base",
    "as_stored",
    "base_change",
    "base_moves",
    "base_weights",
    "begin",
    "enter",
    "factorable",
    "factored",
    "insert_adapters",
    "keeps",
    "learned",
    "lora_settings",
    "names",
    "pairs",
    "reduce_base",
    "remove_adapters",
    "support",
]
