"""Small habits of those who write networks, each of which a tracer may lose: contexts, orders, modes, weights used from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, linear, nll_loss
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from specimens import ADAMW, CLASSES, Specimen, vectors
from zoo_own import WIDTH, Mlp, conv, small


class WithoutGradients(nn.Module):
    """A pretrained stem under no_grad, whose weights could have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(WIDTH, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.relu(self.stem(x))
        return self.out(torch.relu(self.body(h)))


class Checkpointed(nn.Module):
    """Recomputes its blocks in the backward, as torch.utils.checkpoint does."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.blocks:
            h = h + checkpoint(block, h, use_reentrant=False)
        return self.out(h)


class Flattened(nn.Module):
    """A plain network with sizes of its batch in its reshapes, and with one ReLU for all layers, which are declared in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.out, self.hidden = nn.Linear(24, CLASSES), nn.Linear(12 * 16, 24)
        self.second, self.first = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[0]
        x = self.relu(self.first(x))
        x = self.relu(self.second(x)).view(B, -1, 16).transpose(1, 2)
        x = self.relu(self.hidden(x.reshape(x.size(0), x.size(1) * x.size(2))))
        return self.out(x)


class Written(nn.Module):
    """Writes a part of an activation in place, and a skip adds in place, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.token, self.mix, self.out = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x.unflatten(1, (3, 4)))
        h[:, 0] = self.token(h[:, 1:].mean(1))
        y = self.mix(h)
        y += h
        y[:, 1:].mul_(0.5)
        return self.out(y.sum(1))


class Residual(nn.Sequential):
    """A Sequential with a forward of its own: called as a chain, it would be another network."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Nested(nn.Module):
    """Holds the next block inside it, around which it adds a skip."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inside = Nested(depth - 1) if depth > 1 else nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.after(self.inside(self.before(x))))


class Classified(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.out = body, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


class TiedCoder(nn.Module):
    """Decodes by the transpose of the weight that encodes; parameters in a dict, a class from the code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(WIDTH, 8), nn.Linear(8, 8)
        self.more = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(WIDTH)), "scale": nn.Parameter(torch.ones(8))})
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.tanh(self.middle(torch.tanh(self.encoder(x)))) * self.more["scale"]
        decoded = linear(code, self.encoder.weight.T, self.more["bias"])
        return self.out(code), (decoded - x).square().mean()


def coded(out: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(out[0], targets) + out[1]


class TwoModes(nn.Module):
    """Gives log-probabilities in training, and the mean of two views in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.out(self.body(x)).log_softmax(-1)
        views = [self.out(self.body(view)).softmax(-1) for view in (x, x.flip(-1))]
        return torch.stack(views).mean(0).log()


class FixedNorms(nn.Module):
    """Keeps its batch norms in evaluation mode, as the fine-tuning of a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([conv(3, 8), conv(8, 8, 2), conv(8, 12, 2)])
        self.out = nn.Linear(12, CLASSES)

    def train(self, mode: bool = True) -> FixedNorms:
        super().train(mode)
        for one in self.modules():
            if isinstance(one, nn.BatchNorm2d):
                one.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return self.out(x.mean((2, 3)))


class Quantized(nn.Module):
    """Rounds its code to the nearest of a codebook, with gradients that pass straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Linear(4, 16)
        self.codes = nn.Embedding(8, 4)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        nearest = self.codes(torch.cdist(h, self.codes.weight).argmin(1))
        commitment = (nearest - h.detach()).square().mean() + 0.25 * (nearest.detach() - h).square().mean()
        return self.out(torch.relu(self.decoder(h + (nearest - h).detach()))), commitment


class Graph(nn.Module):
    """Sums over the neighbours in a graph that is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 12)])
        self.out = nn.Linear(12, CLASSES)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (4, 3))
        start, end = self.edges
        for layer in self.layers:
            y = layer(h)
            h = torch.relu(y.index_add(1, end, y[:, start]))
        return self.out(h.amax(1))


def of_parts() -> nn.Module:
    """A Sequential of Sequentials in which one has a forward of its own."""
    body = Residual(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    return nn.Sequential(nn.Linear(WIDTH, 16), body, nn.Sequential(nn.ReLU(), nn.Linear(16, CLASSES)))


def fives(n: int, g: Generator) -> Any:
    return vectors(n, g, CLASSES)


def doubles(n: int, g: Generator) -> Any:
    x, y = vectors(n, g)
    return x.double(), y


def habit(name: str, make: Any, batch: Any = vectors, loss: Any = cross_entropy, optimizer: Any = ADAMW) -> Specimen:
    return Specimen(name, "own", make, batch, loss, {"optimizer": optimizer})


SPECIMENS = (
    habit("under no_grad", WithoutGradients),
    habit("recomputed", Checkpointed),
    habit("reshaped, declared in another order", Flattened, small),
    habit("written in place", Written),
    habit("Sequential of its own", lambda: Classified(Residual(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH), nn.Tanh()))),
    habit("Sequential of its own, whole", lambda: Residual(nn.Linear(CLASSES, 16), nn.Tanh(), nn.Linear(16, CLASSES)), fives),
    habit("Sequential of its own, inside", of_parts),
    habit("nested", lambda: Classified(Nested())),
    habit("tied coder", TiedCoder, loss=coded),
    habit("two modes", TwoModes, loss=nll_loss),
    habit("fixed norms", FixedNorms, small),
    habit("codebook", Quantized, loss=coded),
    habit("graph", Graph),
    habit("float64", lambda: Mlp().double(), doubles),
    habit("orthogonal", lambda: Mlp(norm=parametrizations.orthogonal)),
)
