"""The settings of a run: typed sections, each setting documented once, here. ``settings.py`` reads them from YAML."""

from slora_dist.config.clients import ClientsConfig
from slora_dist.config.comm import CommConfig, Indices, Values, WireConfig
from slora_dist.config.data import DataConfig
from slora_dist.config.method import PRESETS, AnyPhase, DensePhase, LowrankPhase, MethodConfig, Phase, Rule, SparsePhase
from slora_dist.config.model import ModelConfig
from slora_dist.config.network import LinkConfig, NetworkConfig, SharedLinkConfig
from slora_dist.config.run import Config, RunConfig
from slora_dist.config.server import ServerConfig

__all__ = [
    "PRESETS",
    "AnyPhase",
    "ClientsConfig",
    "CommConfig",
    "Config",
    "DataConfig",
    "DensePhase",
    "Indices",
    "LinkConfig",
    "LowrankPhase",
    "MethodConfig",
    "ModelConfig",
    "NetworkConfig",
    "Phase",
    "Rule",
    "RunConfig",
    "ServerConfig",
    "SharedLinkConfig",
    "SparsePhase",
    "Values",
    "WireConfig",
]
