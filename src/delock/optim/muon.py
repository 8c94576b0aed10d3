"""Muon for the matrices inside a network, AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delock.optim.factories import Named, two_means
from delock.optim.ranges import check_fields
from delock.optim.several import Several

FUSED = ("qkv", "c_attn", "in_proj_weight", "Wqkv")  # names of matrices that map to queries, keys and values: (3 C, C)


class SplitMuon(torch.optim.Muon):
    """torch's Muon, which orthogonalizes a matrix piece by piece where its group has a number `split` of pieces along the rows."""

    def _init_group(self, group: Any, weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> bool:
        is_complex = super()._init_group(group, weights, grads, momenta)
        if pieces := group.get("split"):
            for tensors in (weights, grads, momenta):
                tensors[:] = [piece for whole in tensors for piece in whole.chunk(pieces)]  # views: written to in place
        return is_complex


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Returns True for a matrix inside a network: it has two dimensions, and by its name it is neither an embedding nor a head.

    The usual names are known, and `heads`, by which a stage names its auxiliary head. A last layer named by a number is taken for inner.
    """
    *owners, own = name.split(".")
    embeds = any("embed" in part or part in ("wte", "wpe") for part in (*owners, own))
    ends = owners[:1] == ["heads"] or owners[-1:] in (["head"], ["lm_head"]) or owners in (["classifier"], ["fc"], ["output"])
    return parameter.dim() == 2 and not embeds and not ends


@dataclass(frozen=True, slots=True)
class muon:
    """Makes Muon for the matrices inside a network, and AdamW for embeddings, heads, vectors and kernels, as one optimizer.

        m <- momentum m + (1-momentum) g;   O = NS((1-momentum) g + momentum m)
        w <- (1 - lr weight_decay) w - lr a O

    g is the gradient of a matrix (A, B). NS: five Newton-Schulz iterations in bfloat16, which bring all singular values near 1. a is
    sqrt(max(1, A / B)) with adjust_lr_fn "original", torch's default; "match_rms_adamw", 0.2 sqrt(max(A, B)), wants its own rates.
    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; torch.optim.Muon, which this uses.

    A matrix (3 C, C) with a name such as qkv maps to queries, keys and values, and counts as three. AdamW's rate is `rest` times lr, with
    betas and without weight decay. `matrices` says which weights Muon takes, by name and value; torch's takes two dimensions only.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    adjust_lr_fn: str = "original"
    rest: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    matrices: Callable[[str, Tensor], bool] = is_inner_matrix

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, params: Named) -> Optimizer:
        named = list(params)
        inner, others = self._divide(named)
        parts: list[Optimizer] = [self._muon(inner)] if inner else []
        if others:
            parts.append(torch.optim.AdamW(others, self.lr * self.rest, self.betas, weight_decay=0.0, fused=True))
        return parts[0] if len(parts) == 1 else Several(parts)

    def bytes(self, named: Named) -> tuple[int, int]:
        """Returns bytes of its state, and peak bytes during a step, above that: mainly for Newton-Schulz iterations."""
        inner, others = self._divide(list(named))
        step = max((w.nbytes // _pieces(name, w) + _newton_schulz_bytes(name, w) for name, w in inner), default=0)
        return sum(w.nbytes for _, w in inner) + two_means(others), step

    def _divide(self, named: list[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        return [one for one in named if self.matrices(*one)], [one for one in named if not self.matrices(*one)]

    def _muon(self, named: list[tuple[str, Tensor]]) -> Optimizer:
        whole, fused = [one for one in named if _pieces(*one) == 1], [one for one in named if _pieces(*one) == 3]
        groups = [{"params": whole}] * bool(whole) + [{"params": fused, "split": 3}] * bool(fused)
        return SplitMuon(groups, self.lr, self.weight_decay, self.momentum, adjust_lr_fn=self.adjust_lr_fn)


def _pieces(name: str, matrix: Tensor) -> int:
    return 3 if matrix.shape[0] == 3 * matrix.shape[1] and any(part in FUSED for part in name.split(".")) else 1


def _newton_schulz_bytes(name: str, matrix: Tensor) -> int:
    """Returns the bytes of bfloat16 powers of a gradient: two of its shape, two as wide and high as its shorter side."""
    rows, columns = matrix.shape[0] // _pieces(name, matrix), matrix.shape[1]
    return 2 * (2 * rows * columns + 2 * min(rows, columns) ** 2)
