"""Builds GPT, a decoder-only transformer for any alphabet, depth and width, as a Sequential that may be cut before every block."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delock.errors import UsageError
from delock.keys import key

STD = 0.02  # of all initial weights (Radford et al., "Language models are unsupervised multitask learners", 2019)
IGNORED = -100  # the target that torch's cross-entropy leaves out


class Embed(nn.Module):
    """Adds the learned embeddings of each token and of its position: (B, T) int64 -> (B, T, width), T at most `context`."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.drop = _drop(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if length > self.context:
            raise UsageError(f"a sequence of {length} tokens is longer than the context of {self.context} that the GPT was made with")
        h: Tensor = self.drop(self.token(tokens) + self.position.weight[:length])  # (B, T, C) + (T, C)
        return h


class Block(nn.Module):
    """Computes h + attention(norm(h)), then h + mlp(norm(h)): (B, T, C) -> (B, T, C). A position sees itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = _drop(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.drop(self.out(self.attend(self.norm1(h))))
        change: Tensor = self.drop(self.down(F.gelu(self.up(self.norm2(h)))))
        return h + change

    def attend(self, x: Tensor) -> Tensor:
        """Returns the causal attention of all heads, concatenated: (B, T, C) -> (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)


def gpt(
    vocabulary: int,
    *,
    depth: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 128,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """Returns a GPT with the layers embed, block0 .. block{depth - 1}, norm, head.

    It maps tokens (B, T) int64 to the logits (B, T, vocabulary) of each next token; T is at most `context`. It has (2 vocabulary + context)
    width + depth (12 width^2 + 13 width) + 2 width parameters. The head is a matrix of its own, without
    bias: if it were tied to the token table, the last stage and the first would have to be updated as one.
    dropout: probability, applied as in GPT-2 to the embedding, the attention weights and both branches of a block.
    seed: initial weights are GPT-2's, normal with standard deviation 0.02, or 0.02 / sqrt(2 depth) for the layers that end a branch; biases
    are
    0. Each weight is a function of (seed, its name, its shape) alone; the global random state is neither read nor changed.
    Raises UsageError for sizes below 1, a width that the heads do not divide, and dropout outside [0, 1).
    """
    sizes = {"vocabulary": vocabulary, "depth": depth, "width": width, "heads": heads, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} of a GPT must be at least 1, not {size}")
    if width % heads:
        raise UsageError(f"{heads} heads cannot share a width of {width}: use a width that is a multiple of the number of heads")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is a probability below 1, not {dropout}")
    with torch.device("meta"):  # neither memory nor random numbers for weights that are overwritten below
        layers: dict[str, nn.Module] = {
            "embed": Embed(vocabulary, context, width, dropout),
            **{f"block{i}": Block(width, heads, dropout) for i in range(depth)},
            "norm": nn.LayerNorm(width),
            "head": nn.Linear(width, vocabulary, bias=False),
        }
        model = nn.Sequential(OrderedDict(layers))
    model.to_empty(device="cpu")
    _initialize(model, depth, seed)
    return model


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of a GPT, the mean cross-entropy over all tokens, a scalar: logits (B, T, vocabulary), targets (B, T) int64.

    A target of -100 does not count.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def tokens(targets: Tensor) -> int:
    """Returns how many targets count in `nats` and `bits`: all but those that are -100. The weight of batches in which some are."""
    return int((targets != IGNORED).sum())


def bits(logits: Tensor, targets: Tensor) -> float:
    """Returns the bits per token, nats / ln 2; if tokens are characters, the bits per character. It takes the arguments of `nats`."""
    return float(nats(logits.detach(), targets)) / math.log(2)


def _drop(dropout: float) -> nn.Module:
    return nn.Dropout(dropout) if dropout else nn.Identity()  # no dropout module: nothing to seed


@torch.no_grad()
def _initialize(model: nn.Sequential, depth: int, seed: int) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        else:
            # 2 * depth branches add up in h: with this scale its variance does not grow with the depth
            std = STD / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else STD
            parameter.normal_(0, std, generator=torch.Generator().manual_seed(key(seed, name)))
