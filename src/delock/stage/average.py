"""The moving average of a stage's weights, as torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn has it, bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averages the parameters of a module: after the first Update it is what they are, and then decay * average + (1 - decay) * weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.own = dict(module.named_parameters())
        self.take = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.weights: dict[str, Tensor] = {}  # by the parameters' names; none before the first Update

    def update(self) -> None:
        """Takes in the weights behind an Update."""
        if not self.weights:
            self.weights = {name: w.detach().clone() for name, w in self.own.items()}
            return
        alike: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
        for name, w in self.own.items():
            alike[w.device, w.dtype].append(name)
        for names in alike.values():
            self.take([self.weights[name] for name in names], [self.own[name].detach() for name in names], 1)

    def put(self) -> None:
        """Lets the module have the average."""
        with torch.no_grad():
            for name, mean in self.weights.items():
                self.own[name].copy_(mean)

    def state(self) -> list[Tensor]:
        """Returns the average."""
        return [*self.weights.values()]

    def load(self, state: Sequence[Tensor]) -> None:
        """Goes on from `state()`."""
        self.weights = {name: one.to(w.device) for (name, w), one in zip(self.own.items(), state, strict=True)} if state else {}
