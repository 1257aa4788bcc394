"""The settings of a run: typed sections, each setting documented once, here. ``settings.py`` reads them from YAML."""

from slora_dist.config.clients import ClientsConfig
from slora_dist.config.comm import CommConfig, Indices, SumBits, Values, WireConfig
from slora_dist.config.data import DataConfig
from slora_dist.config.method import (
    PRESETS,
    AnyPhase,
    BitfitPhase,
    DensePhase,
    HeadPhase,
    HoulsbyPhase,
    LowrankPhase,
    MethodConfig,
    PfeifferPhase,
    Phase,
    Rule,
    SparsePhase,
)
from slora_dist.config.model import ModelConfig
from slora_dist.config.network import LinkConfig, NetworkConfig, SharedLinkConfig
from slora_dist.config.privacy import PrivacyConfig
from slora_dist.config.run import Config, RunConfig
from slora_dist.config.server import Aggregate, ServerConfig

__all__ = [
    "PRESETS",
    "Aggregate",
    "AnyPhase",
    "BitfitPhase",
    "ClientsConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "DensePhase",
    "HeadPhase",
    "HoulsbyPhase",
    "Indices",
    "LinkConfig",
    "LowrankPhase",
    "MethodConfig",
    "ModelConfig",
    "NetworkConfig",
    "PfeifferPhase",
    "Phase",
    "PrivacyConfig",
    "Rule",
    "RunConfig",
    "ServerConfig",
    "SharedLinkConfig",
    "SparsePhase",
    "SumBits",
    "Values",
    "WireConfig",
]
