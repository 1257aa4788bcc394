"""slora_dist: federated SLoRA as a distributed program, one client process per rank."""

__version__ = "0.1.0"
