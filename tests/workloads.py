"""Tiny networks, data and optimizers for everybody's tests: seeded, picklable, milliseconds per batch, in any floating dtype.

A network is five pieces, drawn in the same order whatever the number of stages, grouped into K = 1..5 stages:
`nn.Sequential(*net(5))` is the unsplit model, and the initial weights do not depend on K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.nets import MODELS, build

CLASSES, TOKENS, LENGTH, FEATURES = 10, 13, 6, 12
Kind = Literal["image", "token", "vector"]
Net = Callable[..., list[nn.Module]]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Networks -------------------------------------------------------------------------------------------------------------


def conv_net(n_stages: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Module]:
    """(B, 3, 8, 8) -> (B, 10), with batch norm, ReLU in place and dropout. Data: kind "image"; loss: `class_loss`."""
    return _built(_conv_pieces, n_stages, dtype, seed)


def tuple_net(n_stages: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Module]:
    """(B, 6) tokens -> (B, 10). Data: kind "token"; loss: `weighted_loss`.

    Stages pass (h, skip, tokens, keep): two tensors with gradients, integers, and floats that need no gradient; the head reads
    neither `skip` nor `keep`, so zeros come back for them. Dropout, layer norm, batch norm; the third piece (first of a stage
    when K = 3, 4, 5) begins in place on its input.
    """
    return _built(_tuple_pieces, n_stages, dtype, seed)


def mlp(n_stages: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Module]:
    """(B, 12) -> (B, 10), nothing random in it, no buffers. Data: kind "vector"; loss: `class_loss`."""
    return _built(_mlp_pieces, n_stages, dtype, seed)


def _built(pieces: Callable[[], list[nn.Module]], n_stages: int, dtype: torch.dtype, seed: int) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = pieces()  # drawn in float32 whatever the dtype: the networks of two dtypes begin at the same weights
    bounds = [-(-len(made) * k // n_stages) for k in range(n_stages + 1)]
    return [nn.Sequential(*made[a:z]).to(dtype) for a, z in itertools.pairwise(bounds)]


def without_norm_and_dropout(module: nn.Module) -> nn.Module:
    """The module with batch norm left out, and dropout at rate 0: what they do depends on slices, parts and layouts."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for name, inner in child.named_children():
            if isinstance(inner, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(child, name, nn.Identity())
    return module


def _conv_pieces() -> list[nn.Module]:
    def block(c: int, c_out: int, stride: int, *rest: nn.Module) -> nn.Module:
        conv = nn.Conv2d(c, c_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True), *rest)

    return [
        block(3, 4, 1),
        block(4, 4, 1, nn.Dropout(0.2)),
        block(4, 6, 2, nn.Dropout(0.1)),
        block(6, 6, 1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, CLASSES)),
    ]


def _mlp_pieces() -> list[nn.Module]:
    sizes = [FEATURES, 16, 16, 12, 12]
    return [*(nn.Sequential(nn.Linear(a, z), nn.ReLU()) for a, z in itertools.pairwise(sizes)), nn.Linear(12, CLASSES)]


def _tuple_pieces(c: int = 8) -> list[nn.Module]:
    return [Embed(c), Mix(c, nn.LayerNorm(c)), Mix(c, OverChannels(c), first_in_place=True), Mix(c, nn.LayerNorm(c)), Head(c)]


Message = tuple[Tensor, Tensor, Tensor, Tensor]


class Embed(nn.Module):
    """(B, T) tokens -> h (B, T, C), skip (B, T, C), the tokens, keep (B, T, 1): where there is no padding (token 0)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(TOKENS, c), nn.Parameter(torch.randn(LENGTH, c))
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Message:
        e = self.token(tokens) + self.place
        return self.dropout(e), torch.tanh(e), tokens, (tokens != 0).to(e.dtype).unsqueeze(-1)


class Mix(nn.Module):
    """h' = h + dropout(relu(norm(V h keep + W skip))), skip' = (skip + h) / 2."""

    def __init__(self, c: int, norm: nn.Module, first_in_place: bool = False) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True) if first_in_place else nn.Identity()
        self.v, self.w = nn.Linear(c, c), nn.Linear(c, c, bias=False)  # a bias in front of batch norm would have no gradient
        self.norm, self.dropout = norm, nn.Dropout(0.2)

    def forward(self, message: Message) -> Message:
        h, skip, tokens, keep = message
        h = self.first(h)
        new = self.dropout(torch.relu(self.norm(self.v(h) * keep + self.w(skip))))
        return h + new, (skip + h) / 2, tokens, keep


class OverChannels(nn.Module):
    """Batch norm over the last of three dimensions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(c)

    def forward(self, h: Tensor) -> Tensor:
        normed: Tensor = self.norm(h.transpose(1, 2))  # (B, C, T)
        return normed.transpose(1, 2)


class Head(nn.Module):
    """Mean over the tokens that are no padding, then a linear map: (B, 10). Neither skip nor keep is read."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.out = nn.Linear(c, CLASSES)

    def forward(self, message: Message) -> Tensor:
        h, _, tokens, _ = message
        keep = (tokens != 0).to(h.dtype).unsqueeze(-1)  # (B, T, 1)
        logits: Tensor = self.out((h * keep).sum(1) / keep.sum(1))
        return logits


# Losses ---------------------------------------------------------------------------------------------------------------


def class_loss(out: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy: (B, 10) and (B,) classes."""
    return cross_entropy(out, target)


def weighted_loss(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with a weight per sample, targets {"label": (B,), "weight": (B,)}."""
    return (cross_entropy(out, target["label"], reduction="none") * target["weight"]).mean()


# Data -----------------------------------------------------------------------------------------------------------------


class Samples:
    """A loader over `n_samples` made-up samples: a new order each epoch, the last batch as small as it comes."""

    def __init__(self, kind: Kind, n_samples: int, batch_size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(CLASSES, (n_samples,), generator=g)
        self.targets: Any = label
        if kind == "token":
            self.inputs = torch.randint(TOKENS, (n_samples, LENGTH), generator=g)
            self.inputs[:, 0] = label + 1  # something to learn, and no sample is all padding
            self.targets = {"label": label, "weight": torch.rand(n_samples, generator=g).to(dtype) + 0.5}
        else:
            shape = (3, 8, 8) if kind == "image" else (FEATURES,)
            centres = torch.randn(CLASSES, *shape, generator=g)
            self.inputs = (centres[label] + 0.5 * torch.randn(n_samples, *shape, generator=g)).to(dtype)

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def sizes(self) -> list[int]:
        return [min(self.batch_size, self.n_samples - i) for i in range(0, self.n_samples, self.batch_size)]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Any]]:
        order = torch.randperm(self.n_samples, generator=torch.Generator().manual_seed(1000 * self.seed + e))
        for chosen in torch.split(order, self.batch_size):
            targets = self.targets
            targets = {n: x[chosen] for n, x in targets.items()} if isinstance(targets, dict) else targets[chosen]
            yield self.inputs[chosen], targets


def batches(
    n_samples: int, batch_size: int, epochs: int, kind: Kind = "image", dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[tuple[Tensor, Any]]:
    """All batches of a run in order, as the oracles take them; the same as those of `Samples`."""
    samples = Samples(kind, n_samples, batch_size, dtype, seed)
    return [batch for e in range(epochs) for batch in samples.epoch(e)]


WORK: dict[str, tuple[Net, Kind, Callable[..., Tensor]]] = {
    "conv": (conv_net, "image", class_loss),
    "tuple": (tuple_net, "token", weighted_loss),
    "mlp": (mlp, "vector", class_loss),
}
"""Workloads by name: (network, kind of data, loss)."""


def digits(name: str, **more: Any) -> nn.Module:
    """A model of the library's for grey images of 8 x 8 in ten classes."""
    return build(name, **{"classes": 10, "in_channels": 1, "image_size": 8, **more})


LARGE = ("resnet110", "resnet1202", "resnet34-cifar", "wrn-28-10", "vgg19", "dgl-cnn6")
SMALL = [name for name in MODELS if name not in LARGE and not name.startswith("torchvision/")]
"""Models of ours that any test may build."""


# Optimizers -----------------------------------------------------------------------------------------------------------


def sgd(params: Sequence[Tensor], lr: float = 0.02, weight_decay: float = 5e-3, nesterov: bool = False) -> torch.optim.SGD:
    """Momentum 0.9; weight decay strong enough to show where it is missing."""
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov)


def warm(update: int) -> float:
    """Five updates of linear warm-up, then a slow fall."""
    return (update + 1) / 5 if update < 5 else 0.95 ** (update - 4)


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """`warm` as a schedule stepped per update."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
