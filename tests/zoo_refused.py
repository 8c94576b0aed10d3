"""Models that decide on values, so that no graph of them holds for other data, each with the line that decides."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from specimens import CLASSES, WORDS, Specimen, labels, sorted_by_kind, vectors, words
from zoo_text import BIDIRECTIONAL, MODEL, transformer, translated

WIDTH = 12


class Deciding(nn.Module):
    """Layers that a subclass uses as a value tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)


class Branch(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        if h.mean() > 0:
            h = self.middle(h)
        return self.out(torch.tanh(self.high(h)))


class Number(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        chosen = int(h.sum(0).argmax())
        h = self.middle(h) * (1 + chosen)
        return self.out(torch.tanh(self.high(h)))


class Loop(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        while h.norm() > 1.0:
            h = 0.5 * self.middle(h)
        return self.out(self.high(h))


class Arrays(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(torch.tanh(self.low(x))))
        order = h.detach().numpy().sum(1).argsort()
        ranks = torch.from_numpy(order.copy()).float()
        return self.out(self.high(h + 0.1 * ranks[:, None]))


class Routed(nn.Module):
    """A mixture of experts that sends rows to the experts by a loop over those in use."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(WIDTH, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        share, chosen = self.gate(h).softmax(-1).max(-1)
        mixed = torch.zeros_like(h)
        for e in chosen.unique().tolist():
            rows = (chosen == e).nonzero().squeeze(1)
            mixed = mixed.index_add(0, rows, share[rows, None] * self.experts[e](h[rows]))
        return self.out(h + mixed)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.LSTM(WIDTH, 16, batch_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.body(packed)[0], batch_first=True)
        return self.out(h.sum(1) / lengths[:, None])


class Checked(Deciding):
    """Looks into its labels, as a model does that leaves rows without one out."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(self.high(self.middle(self.low(x))))
        if (labels >= 0).all():
            return {"loss": cross_entropy(logits, labels), "logits": logits}
        return {"loss": cross_entropy(logits, labels, ignore_index=-1), "logits": logits}


def with_layer_drop() -> nn.Module:
    """Draws in training which layers it leaves out."""
    model = transformer("BartForConditionalGeneration", MODEL)
    model.model.encoder.layerdrop = 0.5
    return model


def detector() -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1))
    backbone.out_channels = 32
    return FCOS(backbone, CLASSES, 32, 32, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))


# Batches --------------------------------------------------------------------------------------------------------------


def rows_of_lengths(n: int, g: Generator) -> Any:
    return (words(n, g, 9), torch.randint(2, 10, (n,), generator=g)), labels(n, g)


def labelled(n: int, g: Generator) -> dict[str, Tensor]:
    x, y = vectors(n, g)
    return {"x": x, "labels": y}


def boxes(n: int, g: Generator) -> dict[str, Any]:
    corner = 16 * torch.rand(n, 1, 2, generator=g)
    found = torch.cat([corner, corner + 4 + 8 * torch.rand(n, 1, 2, generator=g)], 2)
    kinds = labels(n, g)
    targets = [{"boxes": found[i], "labels": kinds[i : i + 1]} for i in range(n)]
    return {"images": list(torch.rand(n, 3, 32, 32, generator=g)), "targets": targets}


def refused(name: str, make: Any, line: str, batch: Any = vectors, loss: Any = cross_entropy) -> Specimen:
    return Specimen(name, "refused", make, batch, loss, line=line)


REFUSED = (
    refused("a branch", Branch, "if h.mean() > 0:"),
    refused("a number", Number, "chosen = int(h.sum(0).argmax())"),
    refused("a loop", Loop, "while h.norm() > 1.0:"),
    refused("numpy", Arrays, "order = h.detach().numpy().sum(1).argsort()"),
    refused("experts", Routed, "for e in chosen.unique().tolist():"),
    refused("packed rows", Packed, "pad_packed_sequence(self.body(packed)[0]", rows_of_lengths),
    refused("labels looked into", Checked, "if (labels >= 0).all():", labelled, None),
    refused(
        "rows with labels",
        partial(transformer, "DebertaV2ForSequenceClassification", BIDIRECTIONAL),
        "if label_index.size(0) > 0:",
        sorted_by_kind,
        None,
    ),
    refused("layers left out by chance", with_layer_drop, "if dropout_probability < self.layerdrop:", translated, None),
    refused("detection", detector, "detects objects", boxes, None),
)
