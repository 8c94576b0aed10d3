"""Sequence models as people write them: loops over time, state spaces, attention with masks, a weight with two uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from specimens import ADAMW, CLASSES, WORDS, Specimen, labels, per_word, words

WIDTH = 12
RECURRENT = "state-space or recurrent"


class Recurrent(nn.Module):
    """Words through an LSTM and a GRU of two layers; only what came last is classified."""

    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.first = nn.LSTM(WIDTH, 16, batch_first=True, bidirectional=bidirectional)
        self.second = nn.GRU(16 * (1 + bidirectional), 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        h, (_, cell) = self.first(self.table(ids))
        h, _ = self.second(torch.relu(h))
        return self.out(torch.cat([h[:, -1], cell[-1]], 1))


class Cells(nn.Module):
    """A cell in a loop over time, with the next word to be told at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.cell = nn.GRUCell(WIDTH, 16)
        self.start = nn.Parameter(torch.zeros(16))
        self.out = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.start.expand(ids.shape[0], -1)
        states = []
        for x in self.table(ids).unbind(1):
            h = self.cell(x, h)
            states.append(h)
        return self.out(torch.stack(states, 1))


class StateSpace(nn.Module):
    """A diagonal state space with complex poles, as a convolution by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.decay, self.angle = nn.Parameter(torch.rand(2, WIDTH, 4)), nn.Parameter(torch.rand(2, WIDTH, 4))
        self.c = nn.Parameter(torch.randn(2, WIDTH, 4, dtype=torch.cfloat))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        T = h.shape[1]
        time = torch.arange(T)
        for decay, angle, c, mix in zip(self.decay, self.angle, self.c, self.mix, strict=True):
            poles = torch.complex(-decay.exp(), angle)[..., None] * time
            kernel = (c[..., None] * poles.exp()).sum(1).real
            y = torch.fft.irfft(torch.fft.rfft(h.mT, 2 * T) * torch.fft.rfft(kernel, 2 * T), 2 * T)[..., :T]
            h = h + torch.relu(mix(y.mT))
        return self.out(h)


class ByHand(nn.Module):
    """Weights that belong to no layer, a tied pair, and tokens in front of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.3 * torch.randn(WORDS, WIDTH))
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, ids: Tensor) -> Tensor:
        h = nn.functional.embedding(ids, self.table)
        h = torch.cat([self.token.expand(len(ids), -1, -1), h], 1)
        for block in self.blocks:
            h = self.scale * block(h)
        return h[:, :-1] @ self.table.T + self.bias


class Attentive(nn.Module):
    """nn.MultiheadAttention under a causal mask that is a buffer, and under the padding of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WORDS)
        self.register_buffer("causal", torch.triu(torch.ones(16, 16, dtype=torch.bool), 1), persistent=False)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        T = ids.shape[1]
        h = self.table(ids) + self.places(torch.arange(T, device=ids.device))
        for attend, norm in zip(self.attention, self.norms, strict=True):
            y = norm(h)
            h = h + attend(y, y, y, key_padding_mask=padding, attn_mask=self.causal[:T, :T], need_weights=False)[0]
        return self.out(h)


class Seq2Seq(nn.Module):
    """nn.Transformer: the memory of the encoder goes into every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Transformer(WIDTH, 2, 2, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        h = self.body(self.table(source), self.table(target), tgt_mask=mask)
        return nn.functional.linear(h, self.table.weight)


# Batches --------------------------------------------------------------------------------------------------------------


def sentences(n: int, g: Generator) -> Any:
    return words(n, g, 8), labels(n, g)


def next_words(n: int, g: Generator, length: int = 0) -> Any:
    ids = words(n, g, (length or 5 + n) + 1)
    return ids[:, :-1], ids[:, 1:]


def masked_words(n: int, g: Generator) -> Any:
    ids, targets = next_words(n, g)
    return (ids, torch.arange(ids.shape[1]) >= torch.randint(4, ids.shape[1] + 1, (n, 1), generator=g)), targets


def translations(n: int, g: Generator) -> Any:
    ids = words(n, g, 8)
    return (words(n, g, 5 + n), ids[:, :-1]), ids[:, 1:]


def specimen(name: str, make: Any, batch: Any, loss: Any = per_word, family: str = "own") -> Specimen:
    return Specimen(name, family, make, batch, loss, {"optimizer": ADAMW})


SPECIMENS = (
    specimen("weights by hand", ByHand, next_words),
    specimen("masked attention", Attentive, masked_words),
    specimen("nn.Transformer", Seq2Seq, translations, family="encoder-decoder"),
    specimen("LSTM and GRU", Recurrent, sentences, cross_entropy, RECURRENT),
    specimen("LSTM, both ways", partial(Recurrent, True), sentences, cross_entropy, RECURRENT),
    specimen("GRU cells", Cells, partial(next_words, length=6), family=RECURRENT),
    specimen("state space by FFT", StateSpace, partial(next_words, length=8), family=RECURRENT),
)
