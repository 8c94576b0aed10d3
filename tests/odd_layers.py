"""Small networks with every kind of state, for tests of resumed runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delock.methods import Method

CUTS = (3, 6)
Case = Mapping[str, Any]


class Odd(nn.Module):
    """A layer with a state of some kind, (B, 4, 4, 4) -> the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype


class Volatile(Odd):
    """A running mean in a buffer that no state dict has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("mean", torch.zeros(4, 1, 1, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.8).add_(0.2 * x.detach().mean((0, 2, 3))[:, None, None])
        return x - self.mean


class Replaced(Odd):
    """A buffer that is replaced and not written to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("mean", torch.zeros(4, 1, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.8 * self.mean + 0.2 * x.detach().mean((0, 2, 3))[:, None, None].to(self.dtype)
        return x - self.mean


class Growing(Odd):
    """A buffer that begins as None, and grows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("past", None)

    def forward(self, x: Tensor) -> Tensor:
        new = x.detach().mean((0, 2, 3))[None].to(self.dtype)  # (1, 4)
        if self.training:
            self.past = new if self.past is None else torch.cat([self.past, new])
        return x - self.past.mean(0)[:, None, None]


class Extra(Odd):
    """A count in a plain attribute, which the state dict has as extra state."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.count = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return x * (1 + 0.05 * (self.count % 3))


class Late(Odd):
    """A layer inside it has a buffer that is first written to late in training."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Module()
        self.inner.register_buffer("scale", torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            if self.seen > 4:
                self.inner.scale *= 1.03
        return x * self.inner.scale.clone()


class Numbers(Odd):
    """Whole numbers and truth values in buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("count", torch.zeros(4, dtype=torch.int32))
        self.register_buffer("on", torch.tensor([True, False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += self.on
            self.on.logical_not_()
        return x * torch.where(self.on, 1.1, 0.9)[:, None, None].to(x.dtype) + 0.01 * self.count[:, None, None]


class Frozen(Odd):
    """A weight that does not learn, and one that does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.first, self.second = (nn.Conv2d(4, 4, 1, dtype=dtype) for _ in range(2))
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Tied(Odd):
    """A weight that is used twice, under two names."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.first, self.second = (nn.Conv2d(4, 4, 1, dtype=dtype) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Complex(Odd):
    """Complex weights, and a complex buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        self.weight = nn.Parameter(torch.randn(4, 1, 1, dtype=kind))
        self.register_buffer("turn", torch.ones((), dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.turn *= 0.6 + 0.8j
        return (x.to(self.dtype) * self.weight * self.turn.clone()).real.to(self.dtype)


class SpectralOld(Odd):
    """Spectral norm by a hook."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.inner = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Spectral(Odd):
    """Spectral norm by a parametrization."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WeightNorm(Odd):
    """Weight norm by a parametrization."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.inner = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


ODD: dict[str, type[Odd] | None] = {
    "none": None,
    **{kind.__name__: kind for kind in (Volatile, Replaced, Growing, Extra, Late, Numbers, Frozen, Tied, Complex)},
    **{kind.__name__: kind for kind in (SpectralOld, Spectral, WeightNorm)},
}


class Recomputed(nn.Module):
    """A part whose activations are computed again in the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def network(case: Case) -> nn.Sequential:
    """(B, 2, 4, 4) -> (B, 3) in three stages of three layers, whose second one has what the case asks for."""
    dtype = case["dtype"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        layers: list[nn.Module] = []
        for c, end in ((2, nn.ReLU(inplace=True)), (4, nn.Tanh()), (4, nn.Sequential(nn.Flatten(), nn.Linear(64, 3, dtype=dtype)))):
            layers += [nn.Conv2d(c, 4, 3, padding=1, dtype=dtype), _middle(case), end]
    return nn.Sequential(*layers)


def heads(case: Case, method: Method) -> list[nn.Module] | None:
    """Auxiliary heads of the stages that have a loss of their own."""
    if not method.headed(len(CUTS) + 1):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(6)
        made = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3, dtype=case["dtype"])) for _ in method.headed(len(CUTS) + 1)]
        return [nn.Sequential(nn.BatchNorm2d(4, dtype=case["dtype"]), *head) if case["norm"] else head for head in made]


def _middle(case: Case) -> nn.Module:
    parts: list[nn.Module] = [nn.BatchNorm2d(4, dtype=case["dtype"])] if case["norm"] else []
    if kind := ODD[case["odd"]]:
        parts.append(kind(case["dtype"]))
    if case["dropout"]:
        parts.append(nn.Dropout(0.3))
    made = nn.Sequential(*parts) if parts else nn.Identity()
    return Recomputed(nn.Sequential(made, nn.SiLU())) if case["recompute"] else made
