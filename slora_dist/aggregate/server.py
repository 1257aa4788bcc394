"""The server optimiser: what rank 0 does with the mean update.

FedAvg, FedAvgM, FedAdam and FedYogi are one thing: an optimiser that takes the negative mean update for a gradient (Reddi et al. 2021,
"Adaptive Federated Optimization", Algorithm 2). SGD with learning rate 1 equals averaging bit for bit.

Legend: N coordinates.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slora_dist.config import ServerConfig
from slora_dist.errors import RunError


class Adaptive(torch.optim.Optimizer):
    """Adam and Yogi as FedAdam and FedYogi have them: no bias correction, and v starts at tau^2, which is ``eps`` squared.

    m <- b1 m + (1 - b1) g;  Adam: v <- b2 v + (1 - b2) g^2;  Yogi: v <- v - (1 - b2) g^2 sign(v - g^2);  x <- x - lr m / (sqrt(v) + tau)
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, yogi: bool) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "yogi": yogi})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step."""
        assert closure is None
        for group in self.param_groups:
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, eps**2)
                first, second, square = state["exp_avg"], state["exp_avg_sq"], parameter.grad.square()
                first.lerp_(parameter.grad, 1 - beta1)
                if group["yogi"]:
                    second.addcmul_(torch.sign(second - square), square, value=-(1 - beta2))
                else:
                    second.mul_(beta2).add_(square, alpha=1 - beta2)
                parameter.addcdiv_(first, second.sqrt().add_(eps), value=-lr)


MOMENTS = {torch.optim.SGD: ("momentum_buffer",), Adaptive: ("exp_avg", "exp_avg_sq")}


class Server:
    """The global state of a phase: the offset of every coordinate, the optimiser that moves it, and SCAFFOLD's control variate."""

    def __init__(self, config: ServerConfig, offset_N: Tensor, variates: int = 0) -> None:
        self.variate_n = torch.zeros(variates)
        self._offset = nn.Parameter(offset_N.clone())
        self._optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self._optimizer = torch.optim.SGD([self._offset], lr=config.lr, momentum=config.momentum)
        else:
            betas = (config.momentum, config.beta2)
            self._optimizer = Adaptive([self._offset], config.lr, betas, config.eps, yogi=config.optimizer == "yogi")

    @property
    def offset_N(self) -> Tensor:
        """The current offset, float32 of length N."""
        return self._offset.detach()

    def step(self, mean_N: Tensor) -> None:
        """Move the offset by the mean update of a round, which is used up."""
        self._offset.grad = mean_N.neg_()
        self._optimizer.step()
        self._offset.grad = None

    @torch.no_grad()
    def replace(self, offset_N: Tensor) -> None:
        """Set the offset to what a rule has made of it."""
        self._offset.copy_(offset_N)

    def state(self) -> dict[str, Tensor]:
        """Return all that a checkpoint needs, as named tensors."""
        moments: dict[str, Any] = self._optimizer.state_dict()["state"].get(0, {})
        return {"offset": self.offset_N, "variate": self.variate_n} | {
            f"optimizer.{name}": torch.as_tensor(value) for name, value in moments.items() if value is not None
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned; raises ``RunError`` for what is not of this phase and optimiser."""
        with torch.no_grad():
            self._offset.copy_(take(state, "offset", self.offset_N))
            self.variate_n.copy_(take(state, "variate", self.variate_n))
        moments = {name.removeprefix("optimizer."): value for name, value in state.items() if name.startswith("optimizer.")}
        if moments:
            known = MOMENTS[type(self._optimizer)]
            if moments.keys() != set(known):
                raise RunError(f"the checkpoint has the moments {', '.join(sorted(moments))[:80]}, this optimiser {', '.join(known)}")
            for name in known:
                take(moments, name, self.offset_N)
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": {0: moments}})


def take(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Return a tensor of a checkpoint; raises ``RunError`` when it is not there, or has not the shape and dtype of ``like``."""
    found = state.get(name)
    if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
        has = "missing" if found is None else f"{list(found.shape)} of {found.dtype}"
        raise RunError(f"the checkpoint's {name} is {has}, this run's is {list(like.shape)} of {like.dtype}")
    return found
