"""Models with something that a graph may lose without a word: each trains as plain PyTorch does, or is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from specimens import CLASSES, Specimen, labels, vectors
from zoo_own import WIDTH
from zoo_text import MAMBA, fixed, transformer


class Body(nn.Module):
    """Three layers and a classifier, which subclasses use each in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def rest(self, h: Tensor) -> Tensor:
        return self.out(torch.tanh(self.high(torch.tanh(self.middle(h)))))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.5 * grad


class OwnGradient(Body):
    """Has a gradient of its own, which the forward does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(Reversed.apply(torch.tanh(self.low(x))))


class Hooked(Body):
    """Has a hook on a layer that changes its output, and one on a tensor that changes its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.middle.register_forward_hook(doubled)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        if h.requires_grad:
            h.register_hook(halved)
        return self.rest(h)


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def halved(grad: Tensor) -> Tensor:
    return 0.5 * grad


class BackwardHook(Body):
    def __init__(self) -> None:
        super().__init__()
        self.middle.register_full_backward_hook(tenfold)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.low(x)))


def tenfold(module: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(10 * grad for grad in given)


class Counted(Body):
    """Warms up by a count of its calls, which is a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.rest(min(1.0, self.count / 4) * torch.tanh(self.low(x)))


class Remembering(Body):
    """Keeps the mean of the batch before in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        out = self.rest(h + self.memory)
        if self.training:
            self.memory = h.detach().mean(0)
        return out


class Teacher(Body):
    """Follows itself slowly: writes parameters in forward, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(WIDTH, 16)
        self.slow.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if self.training:
                for old, new in zip(self.slow.parameters(), self.low.parameters(), strict=True):
                    old.mul_(0.9).add_(new, alpha=0.1)
            wanted = torch.tanh(self.slow(x))
        h = torch.tanh(self.low(x))
        return self.rest(h), (h - wanted).square().mean()


def taught(out: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(out[0], targets) + out[1]


class BySize(Body):
    """Decides on the size of its batch, as it does not come first."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        if len(x) == 2:
            h = -h
        return self.rest(h)


class ByRest(Body):
    """Decides on the size of its batch in a way that two sizes may not show."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        return self.rest(h * (1.5 if x.shape[0] % 2 else 1.0))


class WritesInput(Body):
    """Normalises what it is given in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(x.mean(1, keepdim=True)).mul_(2)
        return self.rest(torch.tanh(self.low(x)))


class WritesView(Body):
    """Writes through a view late, so that its base has changed in another stage."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        part = h[:, :4]
        y = self.middle(torch.tanh(h))
        y = self.high(y + 1)
        part.mul_(0.5)
        return self.out(torch.relu(y) + h)


class Chosen(Body):
    """Goes on with the rows that a mask chooses, however many these are."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        mask = x[:, 0] > 0
        h = h.index_put((mask,), torch.tanh(self.middle(h[mask])))
        return self.out(torch.tanh(self.high(h)))


class LowPrecision(Body):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.tanh(self.high(torch.tanh(self.middle(h))))
        return self.out(h.float())


def wide(x: Tensor) -> Tensor:
    return gelu(x) * 1.5


class Scripted(Body):
    """Has a function and a layer that are TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.activation, self.middle = torch.jit.script(wide), torch.jit.script(self.middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.activation(self.low(x)))


class Scaled(Body):
    """Computes with a Python number that follows from values."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        scale = h.abs().max().item()
        return self.rest(h / scale)


class Mapped(Body):
    """Calls a layer by torch.func on each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.vmap(lambda row: torch.tanh(self.low(row)))(x))


class Inner(Body):
    """Takes a step of gradient descent in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = torch.tanh(self.low(x)).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.middle(h).square().sum(), h, create_graph=True)
        return self.rest(torch.tanh(self.low(x)) - 0.1 * slope)


class Variadic(Body):
    """Takes any number of inputs."""

    def forward(self, *xs: Tensor, **more: Any) -> Tensor:
        return self.rest(torch.tanh(sum(self.low(x) for x in xs)))


class Rescaled(Body):
    """Resets a weight of its own before it is used, as a constraint on its norm."""

    def forward(self, x: Tensor) -> Tensor:
        self.middle.weight.data.div_(self.middle.weight.data.norm().clamp_min(1.0))
        return self.rest(torch.tanh(self.low(x)))


class Borrowed(Body):
    """Uses a layer that belongs to no module, in a list, so that nobody trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(16, 16)]

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.hidden[0](torch.tanh(self.low(x)))))


class Stateful(Body):
    """Has an LSTM whose state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 16)
        self.register_buffer("h", torch.zeros(1, 16))
        self.register_buffer("c", torch.zeros(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.low(x))
        h, c = self.cell(y, (self.h.expand(len(y), -1), self.c.expand(len(y), -1)))
        if self.training:
            self.h, self.c = h.detach().mean(0, keepdim=True), c.detach().mean(0, keepdim=True)
        return self.rest(h)


class ByCopies(Body):
    """Copies a batch statistic into a buffer by hand, where batch norm would decide by its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("widest", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        self.widest.copy_(torch.maximum(self.widest, h.detach().abs().amax(0)))
        return self.rest(h / (1 + self.widest))


class ByGradMode(Body):
    """Does something else where gradients are off."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        return self.rest(h if torch.is_grad_enabled() else 2 * h)


def rwkv() -> nn.Module:
    """Divides weights when it goes over to evaluation, and multiplies them when it goes back."""
    return transformer("RwkvForCausalLM", {**MAMBA, "attention_hidden_size": 16, "context_length": 16})


def two(n: int, g: Generator) -> Any:
    return (torch.randn(n, WIDTH, generator=g), torch.randn(n, WIDTH, generator=g)), labels(n, g)


def odd(name: str, make: Any, batch: Any = vectors, loss: Any = cross_entropy) -> Specimen:
    return Specimen(name, "odd", make, batch, loss)


ODD = (
    odd("gradient of its own", OwnGradient),
    odd("hooks", Hooked),
    odd("a backward hook", BackwardHook),
    odd("a count", Counted),
    odd("a memory", Remembering),
    odd("a slow teacher", Teacher, loss=taught),
    odd("a batch of two", BySize),
    odd("odd batches", ByRest),
    odd("an input written", WritesInput),
    odd("a view written", WritesView),
    odd("rows of a mask", Chosen),
    odd("autocast", LowPrecision),
    odd("a scripted function", Scripted),
    odd("an item", Scaled),
    odd("vmap", Mapped),
    odd("an inner gradient", Inner),
    odd("any number of inputs", Variadic, two),
    odd("a weight rescaled", Rescaled),
    odd("a hidden layer", Borrowed),
    odd("a state that goes on", Stateful),
    odd("a buffer copied", ByCopies),
    odd("gradients on and off", ByGradMode),
    odd("weights by mode", rwkv, fixed, None),
)
