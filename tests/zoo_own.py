"""Networks as people write them: skips, towers, dicts, complex numbers, frozen parts, weights used by hand, LoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from specimens import ADAMW, CLASSES, SGD, WORDS, Specimen, images, labels, scenes, text, vectors, words
from zoo_text import GPT2, transformer

WIDTH = 12
small = partial(images, size=16)


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 8), conv(8, 12, 2), conv(12, 16, 2)])
        self.middle = conv(16, 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)])
        self.join = nn.ModuleList([conv(24, 12), conv(16, 8)])
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(skips.pop())
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.out(x)


class Siamese(nn.Module):
    """One tower, called on both of its inputs: every weight of it has two users."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.tower(left), self.tower(right)
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class TwoInputs(nn.Module):
    """An image and numbers, joined late; the numbers may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(conv(3, 8, 2), conv(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Linear(WIDTH, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, numbers: Tensor | None = None, scale: float = 0.5) -> Tensor:
        h = self.image(image)
        if numbers is not None:
            h = h + scale * self.numbers(numbers)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.out(h)


class Dicts(nn.Module):
    """Takes its arguments by name, and gives a dict of two outputs for two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.ModuleDict({"low": nn.Linear(WIDTH, WIDTH), "high": nn.Linear(WIDTH, WIDTH)})
        self.kind, self.value = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 1)

    def forward(self, *, ids: Tensor, weights: Tensor) -> dict[str, Any]:
        h = (self.table(ids) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        h = h + torch.relu(self.body["low"](h))
        h = h + torch.relu(self.body["high"](h))
        return {"kind": self.kind(h), "more": (self.value(h).squeeze(1), h)}


def both_tasks(out: dict[str, Any], targets: dict[str, Tensor]) -> Tensor:
    return cross_entropy(out["kind"], targets["kind"]) + mse_loss(out["more"][0], targets["value"])


class Fourier(nn.Module):
    """A neural operator: complex weights on the lowest frequencies, and complex tensors wherever it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, 8, 1)
        self.weights = nn.ParameterList(nn.Parameter(0.2 * torch.randn(8, 8, 4, 4, dtype=torch.cfloat)) for _ in range(3))
        self.by = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for weight, by in zip(self.weights, self.by, strict=True):
            spectrum = torch.fft.rfft2(x)
            low = torch.einsum("bihw,iohw->bohw", spectrum[:, :, :4, :4], weight)
            kept = torch.zeros_like(spectrum)
            kept[:, :, :4, :4] = low
            x = torch.relu(torch.fft.irfft2(kept, s=x.shape[-2:]) + by(x))
        return self.out(x.mean((2, 3)))


class Phases(nn.Module):
    """Complex from its first layer to its last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.cfloat) for _ in range(3))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.polar(torch.ones_like(x), x)
        for layer in self.layers:
            z = layer(z)
            z = z / (1 + z.abs())
        return self.out(z.abs())


class Mlp(nn.Module):
    """Residual blocks in a loop, with an option of its configuration; every second gate is never used."""

    def __init__(self, depth: int = 4, gated: bool = True, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.gated = gated
        self.inp = nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": norm(nn.Linear(16, 16)), "gate": nn.Linear(16, 16)}) for _ in range(depth))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for i, block in enumerate(self.blocks):
            y = torch.tanh(block["a"](h))
            if self.gated and i % 2:
                y = y * torch.sigmoid(block["gate"](h))
            h = h + y
        return self.out(h)


def frozen() -> nn.Module:
    """A lower half as after pretraining: neither gradients nor batch statistics."""
    model = nn.Sequential(conv(3, 8), conv(8, 8, 2), conv(8, 12), nn.Sequential(conv(12, 12, 2), nn.AdaptiveAvgPool2d(1)), nn.Flatten())
    model = Encoded(model, nn.Linear(12, CLASSES))
    model.encoder[:2].requires_grad_(False)
    return model


class Encoded(nn.Module):
    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Counting(nn.Module):
    """Writes its buffers in forward: a mean of what it saw, a count, and a memory that it reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.out = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.low(x))
        if self.training:
            self.calls += 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        h = torch.relu(self.high(h - self.mean))
        if self.training:
            self.seen = 0.5 * self.seen + h.detach().amax(0)
        return self.out(h + 0.1 * self.seen)


class SharedNorm(nn.Module):
    """One batch norm and one block, both called twice, at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mix, self.out = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.inp(x)))
        for _ in range(2):
            h = h + torch.relu(self.norm(self.mix(h)))
        return self.out(h.mean((2, 3)))


class Experts(nn.Module):
    """Soft mixtures: every expert sees every sample, so nothing is decided on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(WIDTH, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inp(x)
        shares = self.gate(h).softmax(-1)
        h = h + torch.stack([expert(h) for expert in self.experts], 1).mul(shares[..., None]).sum(1)
        return self.out(h), (shares.mean(0) - 1 / 3).square().sum()


def balanced(out: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(out[0], targets) + 0.1 * out[1]


class OwnLoss(nn.Module):
    """Computes its loss itself, and gives it first in a tuple inside a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.body(x))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def lora(model: nn.Module, *targets: str, **more: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.0, **more))


# Batches --------------------------------------------------------------------------------------------------------------


def pairs(n: int, g: Generator) -> Any:
    return (torch.randn(n, WIDTH, generator=g), torch.randn(n, WIDTH, generator=g)), labels(n, g)


def image_and_numbers(n: int, g: Generator) -> Any:
    image, kinds = images(n, g, 16)
    return (image, torch.randn(n, WIDTH, generator=g)), kinds


def named_tasks(n: int, g: Generator) -> Any:
    inputs = {"ids": words(n, g, 5 + n), "weights": torch.rand(n, 5 + n, generator=g) + 0.1}
    return inputs, {"kind": labels(n, g), "value": torch.randn(n, generator=g)}


def labelled(n: int, g: Generator) -> dict[str, Tensor]:
    x, y = vectors(n, g)
    return {"x": x, "labels": y}


# Specimens ------------------------------------------------------------------------------------------------------------


def own(name: str, make: Any, batch: Any = vectors, loss: Any = cross_entropy, optimizer: Any = SGD) -> Specimen:
    return Specimen(name, "own", make, batch, loss, {"optimizer": optimizer})


SPECIMENS = (
    own("U-Net", UNet, partial(scenes, size=16)),
    own("siamese", Siamese, pairs),
    own("two inputs", TwoInputs, image_and_numbers),
    own("dicts", Dicts, named_tasks, both_tasks, optimizer=ADAMW),
    own("own loss", OwnLoss, labelled, None),
    own("Fourier operator", Fourier, small, optimizer=ADAMW),
    own("complex", Phases),
    own("residual loop", Mlp),
    own("frozen lower half", frozen, small),
    own("LoRA on own", lambda: lora(Mlp(), "a", "out", modules_to_save=["inp"]), optimizer=ADAMW),
    own("LoRA on GPT-2", lambda: lora(transformer("GPT2LMHeadModel", GPT2), "c_attn", fan_in_fan_out=True), text, None, optimizer=ADAMW),
    own("weight norm", lambda: Mlp(norm=parametrizations.weight_norm)),
    own("old weight norm", lambda: Mlp(norm=weight_norm)),
    own("spectral norm", lambda: Mlp(norm=parametrizations.spectral_norm)),
    own("old spectral norm", lambda: Mlp(norm=spectral_norm)),
    own("buffers written", Counting),
    own("shared norm", SharedNorm, small),
    own("soft experts", Experts, loss=balanced),
)
