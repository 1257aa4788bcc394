"""Where this rank trains."""

import torch

from slora_dist.errors import ConfigError
from slora_dist.log import say
from slora_dist.world import World


def choose(setting: str, world: World) -> torch.device:
    """Return the device for ``run.device``: a GPU by local rank (several ranks may share one, which is said), or the CPU."""
    count = torch.cuda.device_count()
    if setting == "cpu" or (setting == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("run.device", "cuda, but this machine shows no CUDA device", "auto, cpu")
    if world.local_size > count and world.local_rank == 0:
        own = "; if each sees another one, comm.backend=nccl" if count == 1 else ""
        say(world.rank, f"{world.local_size} ranks share {count} GPU(s) on this machine{own}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda", world.local_rank % count)
