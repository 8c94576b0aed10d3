"""Trains a language model of one's own, a list of stages: integers go in, and a tuple of tensors travels from stage to stage.

    python examples/tokens.py
    python examples/tokens.py --method dsp --workers inline

The model is not an nn.Sequential that the library cuts but a list of modules, one per stage. Inputs are int64. Messages are (h, tokens,
real), of which only h is floating, so only h has an error sent back. Some positions of the targets do not count (ignore_index), so batches
weigh as many as do. Parameter groups are made by name. The length of the run is given in batches, with evaluations in between.

The text is the few lines below, a sequence per line. Shorter lines are padded; `real` marks the positions that are not padding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader

import delock
from delock.data import Batches
from delock.records import Result

TEXT = """
the first worker reads the page and hands it to the second worker
the second worker reads the page and hands it to the third worker
the third worker reads the page and says how far the guess was off
the third worker hands the error back to the second worker
the second worker hands the error back to the first worker
the first worker waits for the error of the page that it has read
a worker that waits does no work and that is what the lock is
the first worker reads the next page and does not wait for the error
the second worker reads the next page and does not wait for the error
the error of the first page comes late and the first worker uses it
the error is late but it is not lost and the workers do not wait
a worker that does not wait is never idle and the lock is gone
"""
HELD_OUT = "the third worker reads the next page and the first worker does not wait\n"

VOCABULARY, PADDING, IGNORED = 28, 0, -100  # padding, space, a to z
Message = tuple[Tensor, Tensor, Tensor]
Named = Iterable[tuple[str, nn.Parameter]]


def encode(line: str) -> list[int]:
    """Returns a line as numbers: the space is 1, letters are 2 to 27."""
    return [1 if letter == " " else ord(letter) - ord("a") + 2 for letter in line]


def collate(lines: list[str]) -> tuple[Tensor, Tensor]:
    """Returns inputs (B, T) int64, and the tokens that follow as targets (B, T); T is the longest line's, so batches differ in shape."""
    codes = [encode(line) for line in lines]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(code[:-1]) for code in codes], batch_first=True, padding_value=PADDING)
    targets = nn.utils.rnn.pad_sequence([torch.tensor(code[1:]) for code in codes], batch_first=True, padding_value=IGNORED)
    return tokens, targets


class Block(nn.Module):
    """Computes causal attention and an MLP on h (B, T, C); tokens (B, T) and real (B, 1, T) travel along unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = 4 * width
        inner = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.mlp = nn.Sequential(nn.LayerNorm(width), inner, nn.Dropout(0.1))

    def forward(self, message: Message) -> Message:
        h, tokens, real = message
        q, k, v = self.qkv(self.before(h)).chunk(3, dim=-1)  # (B, T, C) each
        seen = real & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()  # (B, T, T)
        h = h + self.out(scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return h + self.mlp(h), tokens, real


class Entry(nn.Module):
    """Maps tokens (B, T) to (h, tokens, real)."""

    def __init__(self, width: int, longest: int = 128) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)

    def forward(self, tokens: Tensor) -> Message:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.token(tokens) + self.place(places), tokens, (tokens != PADDING).unsqueeze(1)


class Head(nn.Module):
    """Maps (h, tokens, real) to logits (B, T, 28). It looks the tokens up again, in a table of letter pairs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.pairs = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, message: Message) -> Tensor:
        h, tokens, _ = message
        logits: Tensor = self.linear(self.norm(h)) + self.pairs(tokens)
        return logits


def stages(width: int = 32, seed: int = 0) -> list[nn.Module]:
    """Returns the three stages."""
    torch.manual_seed(seed)
    return [nn.Sequential(Entry(width), Block(width)), Block(width), nn.Sequential(Block(width), Head(width))]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the nats per letter that counts, a scalar."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Returns the share of counted letters that the model ranks first."""
    counts = targets != IGNORED
    return float((logits.argmax(-1) == targets)[counts].double().mean())


def counted(targets: Tensor) -> Tensor:
    """Returns the letters that count, the weight of a batch or of a part of one."""
    return (targets != IGNORED).sum()


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Returns True if weight decay acts on a parameter: on matrices, not on biases, norms and tables of tokens."""
    return parameter.dim() == 2 and not any(table in name for table in ("token", "place", "pairs"))


def optimizer(named: Named) -> torch.optim.Optimizer:
    """Makes the optimizer of a stage from its own parameters, under their names in the whole model, such as "2.1.linear.weight"."""
    named = list(named)
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": 0.1},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3)


def main(words: Sequence[str] | None = None) -> Result:
    """Trains, prints, and returns the result of `fit`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ddg", choices=delock.METHODS)
    parser.add_argument("--workers", default="processes", choices=("processes", "inline"))
    parser.add_argument("--batches", type=int, default=160)
    asked = parser.parse_args(words)

    result = delock.fit(
        stages(),
        Batches(DataLoader(TEXT.split("\n")[1:-1], batch_size=4, shuffle=True, collate_fn=collate), weight=counted),
        DataLoader([HELD_OUT.strip()], collate_fn=collate),
        loss=loss,
        metrics={"accuracy": accuracy},
        method=asked.method,
        optimizer=optimizer,
        batches=asked.batches,
        eval_every=asked.batches // 4,
        workers=asked.workers,
    )
    for record in result.evaluations:
        train, test = (nats / math.log(2) for nats in (record.train_loss, record.test_loss))
        right = record.metrics["accuracy"]
        print(f"batch {record.batches:4}: {train:.3f} bits a letter in training, {test:.3f} held out, {right:.0%} of its letters right")
    for stage in result.stages:
        late = max(stage.layer_staleness)
        print(f"stage {stage.stage}: {stage.parameters:,} parameters, {stage.updates} updates, layer-wise staleness {late}")
    return result


if __name__ == "__main__":
    main()
