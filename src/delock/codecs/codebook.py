"""Codebooks that learn online: k-means by exponential moving averages, a codebook for every group of channels, no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delock.keys import key

DECAY = 0.99  # r: what a batch's counts keep of those before
SMOOTHING = 1e-5  # Laplace's, of the counts
DEAD = 0.01  # of the mean count: a code that is used less is drawn again
PER_CODE = 64  # vectors of a batch that a code learns from, on average: more would take long and change little
BLOCK = 256  # codes whose indices fit into the last bits of a score
SCORES = 1 << 20  # scores at a time: 4 MB, so that they stay in the cache


class Codebooks:
    """Codebooks of `codes` vectors each for the groups of d channels; `seed` is that of the draws.

    For a batch, with c_j of its vectors nearest to code j of a group, and r = 0.99:

        count_j <- r count_j + (1 - r) c_j        sum_j <- r sum_j + (1 - r) (the sum of these vectors)
        e_j = sum_j / count_j                     both over 1 - r^t after t batches; count Laplace-smoothed with 1e-5

    A code whose count is below a hundredth of the mean is set to a vector drawn from the batch, and starts with just that count. The
    first codes are drawn from the first batch. Of a batch with more than 64 vectors per code, every s-th is taken, with the least s
    that leaves no more, and the first of them another one each time. Source: van den Oord et al., NeurIPS 2017 (arXiv 1711.00937), appendix
    A.1; dead codes as in Dhariwal et al., arXiv 2005.00341.
    """

    def __init__(self, codes: int, seed: int) -> None:
        self.codes, self.seed, self.steps = codes, seed, 0
        self.vectors = self.counts = self.sums = torch.zeros(0)  # (N, K, d), (N, K), (N, K, d), float32

    def learn(self, x: Tensor, d: int) -> None:
        """Makes one step on the vectors of a batch: (M, N d), float32."""
        stride = -(-len(x) // (PER_CODE * self.codes))
        batch = x[self.steps % stride :: stride]
        batch = batch.view(len(batch), -1, d).transpose(0, 1).contiguous()  # (N, m, d)
        fresh = self._draw(batch)
        if self.steps == 0:
            self.vectors, self.sums, self.counts = fresh, torch.zeros_like(fresh), torch.zeros_like(fresh[..., 0])
        self.steps += 1
        counts, sums = zip(*(_assigned(vectors, codes) for vectors, codes in zip(batch, self.vectors, strict=True)), strict=True)
        self.counts = DECAY * self.counts + (1 - DECAY) * torch.stack(counts)
        self.sums = DECAY * self.sums + (1 - DECAY) * torch.stack(sums)
        seen = 1 - DECAY**self.steps
        total = self.counts.sum(1, keepdim=True) / seen
        smooth = (self.counts / seen + SMOOTHING) / (total + self.codes * SMOOTHING) * total
        least = DEAD * total / self.codes
        dead = self.counts / seen < least
        self.vectors = torch.where(dead[..., None], fresh, self.sums / seen / smooth[..., None])
        self.counts = torch.where(dead, least * seen, self.counts)
        self.sums = torch.where(dead[..., None], fresh * self.counts[..., None], self.sums)

    def _draw(self, batch: Tensor) -> Tensor:
        """Draws a vector of every group (N, m, d) for each code, at the same places in all; none twice, if there are enough: (N, K, d)."""
        order = torch.randperm(batch.shape[1], generator=torch.Generator().manual_seed(key(self.seed, self.steps)))
        return batch[:, order[torch.arange(self.codes) % len(order)].to(batch.device)]

    def state(self) -> dict[str, Any]:
        """Returns all there is, as values that can be saved."""
        return {"steps": self.steps, "vectors": self.vectors, "counts": self.counts, "sums": self.sums}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.steps, self.vectors, self.counts, self.sums = (state[name] for name in ("steps", "vectors", "counts", "sums"))


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Returns, for every vector of x (M, d), the index (M,) of the nearest of `codes` (K, d), float32.

    Distances are compared by x.(e - m) - (|e - m|^2 / 2 + m.(e - m)), m the mean code, to 16 significant bits: the code found may be
    farther than the nearest, squared, by |x - m|^2 / 2^15. That makes it twice as fast: the index takes the place of the last bits, so
    that one pass for the maximum finds both.
    """
    K, mean = len(codes), codes.mean(0)
    shifted = codes - mean
    bias = -(0.5 * shifted * shifted + mean * shifted).sum(1)
    blocks = -(-K // BLOCK)
    width = K if blocks == 1 else BLOCK
    spare = blocks * width - K
    bias = torch.nn.functional.pad(bias, (0, spare), value=-1e38)  # codes that fill the last block, and are never the nearest
    table = torch.nn.functional.pad(shifted, (0, 0, 0, spare)).t().contiguous()  # (d, blocks * width)
    last = torch.arange(width, dtype=torch.int32, device=x.device)
    rows = max(1, (SCORES if x.device.type == "cpu" else 64 * SCORES) // (blocks * width))
    room = torch.empty(min(rows, len(x)), blocks * width, device=x.device)
    found = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for part, into in zip(torch.split(x, rows), torch.split(found, rows), strict=True):
        scores = torch.addmm(bias, part, table, out=room[: len(part)])
        scores.view(torch.int32).bitwise_and_(-BLOCK).bitwise_or_(last.repeat(blocks) if blocks > 1 else last)
        best = scores.view(-1, blocks, width).amax(2)
        block = best.argmax(1, keepdim=True)
        index = best.gather(1, block).view(torch.int32).bitwise_and_(BLOCK - 1) + block * BLOCK
        into.copy_(index[:, 0])
    return found


def _assigned(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the vectors x (m, d) nearest to each code, and sums them, always in one order: (K,), (K, d)."""
    chosen = nearest(x, codes)
    sums = torch.zeros_like(codes)
    if x.is_cuda:
        sums.index_put_((chosen,), x, accumulate=True)  # sorts; index_add_ would add in any order
    else:
        sums.index_add_(0, chosen, x)
    return torch.bincount(chosen, minlength=len(codes)).to(x.dtype), sums
