"""Muon for the matrices inside a network, AdamW for all else."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.optim.closures import loss_of
from delock.optim.factories import Named, is_embedding, pairs, two_means
from delock.optim.ranges import check_fields
from delock.optim.several import Several

FUSED = ("qkv", "c_attn", "in_proj_weight", "Wqkv")  # names of matrices that map to queries, keys and values: (3 C, C)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of names: torch.compile and others add them
RATES = ("original", "match_rms_adamw")  # of torch's adjust_lr_fn
TOGETHER = 2**19  # numbers in the matrices that are orthogonalized in one call: larger products gain nothing by it


class SplitMuon(torch.optim.Muon):
    """torch's Muon, which orthogonalizes a matrix piece by piece where its group has a number `split` of pieces along the rows.

    Pieces of one shape, lying or standing, are orthogonalized together: small ones take their time in calls.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every matrix that has a gradient."""
        loss = loss_of(closure)
        pieces = [piece for group in self.param_groups for piece in self._pieces(group)]
        for places in batches([(*piece.weight.shape, piece.iteration) for piece in pieces]):
            _update([pieces[i] for i in places])
        return loss

    def _pieces(self, group: dict[str, Any]) -> Iterator[MatrixPiece]:
        weights, grads, momenta = list[Tensor](), list[Tensor](), list[Tensor]()
        self._init_group(group, weights, grads, momenta)
        for whole in zip(weights, grads, momenta, strict=True):
            for one in zip(*(x.chunk(group.get("split", 1)) for x in whole), strict=True):  # views: written to in place
                weight, grad, momentum = (x.t() if x.shape[0] > x.shape[1] else x for x in one)
                yield MatrixPiece(weight, grad, momentum, _factor(group, one[0].shape), group)


@dataclass(frozen=True, slots=True)
class MatrixPiece:
    """Holds views of a weight, its gradient and its momentum, with no more rows than columns. factor: of the rate."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    factor: float
    group: Mapping[str, Any]

    @property
    def iteration(self) -> tuple[Any, ...]:
        """Returns the settings of the Newton-Schulz iteration."""
        return self.group["ns_coefficients"], self.group["ns_steps"], self.group["eps"]

    def wanted(self) -> Tensor:
        """Brings the momentum up to date, and returns what is to be orthogonalized."""
        b = self.group["momentum"]
        self.momentum.lerp_(self.grad, 1 - b)
        return self.grad.lerp(self.momentum, b) if self.group["nesterov"] else self.momentum

    def change(self, direction: Tensor) -> None:
        """Updates the weight."""
        lr = float(self.group["lr"])
        self.weight.mul_(1 - lr * self.group["weight_decay"])
        self.weight.add_(direction, alpha=-lr * self.factor)


def batches(kinds: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """Returns the places of what is orthogonalized together: of one kind, (rows, columns, ...), with `TOGETHER` numbers at most."""
    found: dict[tuple[Any, ...], list[list[int]]] = {}
    for place, kind in enumerate(kinds):
        own = found.setdefault(kind, [[]])
        if own[-1] and (len(own[-1]) + 1) * kind[0] * kind[1] > TOGETHER:
            own.append([])
        own[-1].append(place)
    return [places for own in found.values() for places in own]


def _factor(group: Mapping[str, Any], shape: Sequence[int]) -> float:
    rows, columns = shape
    return 0.2 * math.sqrt(max(shape)) if group["adjust_lr_fn"] == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def _update(pieces: Sequence[MatrixPiece]) -> None:
    """Updates pieces of one shape."""
    first, *others = (piece.wanted() for piece in pieces)
    made = orthogonalized(torch.stack((first, *others)) if others else first[None], *pieces[0].iteration)
    for piece, direction in zip(pieces, made, strict=True):
        piece.change(direction)


def orthogonalized(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Returns (N, A, B) matrices, A <= B, with singular values near 1, in bfloat16: torch's Newton-Schulz iteration, for all at once."""
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Returns True for a matrix inside a network: it has two dimensions, and by its name it is neither an embedding nor a head.

    The usual names are known, and `heads`, by which a stage names its auxiliary head. A last layer named by a number is taken for inner.
    """
    *owners, _ = [part for part in name.split(".") if part not in WRAPPERS]
    if owners[:1] == ["module"]:  # of DistributedDataParallel
        owners = owners[1:]
    ends = owners[:1] == ["heads"] or owners[-1:] in (["head"], ["lm_head"]) or owners in (["classifier"], ["fc"], ["output"])
    return parameter.dim() == 2 and not is_embedding(name, parameter) and not ends


@dataclass(frozen=True, slots=True)
class muon:
    """Makes Muon for the matrices inside a network, and AdamW for embeddings, heads, vectors and kernels, as one optimizer.

        m <- momentum m + (1-momentum) g;   O = NS((1-momentum) g + momentum m)
        w <- (1 - lr weight_decay) w - lr a O

    g is the gradient of a matrix (A, B). NS: five Newton-Schulz iterations in bfloat16, which bring all singular values near 1. a is
    sqrt(max(1, A / B)) with adjust_lr_fn "original", torch's default; "match_rms_adamw", 0.2 sqrt(max(A, B)), wants its own rates.
    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; torch.optim.Muon, whose state and equation
    this has. Matrices of one shape are orthogonalized together, as small ones take their time in calls.

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
        if self.adjust_lr_fn not in RATES:
            raise UsageError(f"adjust_lr_fn of muon is {' or '.join(RATES)}, not {reprlib.repr(self.adjust_lr_fn)}")
        if not callable(self.matrices):
            raise UsageError(f"matrices of muon is a function of (name, weight), not {reprlib.repr(self.matrices)}")

    def __call__(self, params: Named) -> Optimizer:
        inner, others = self._divide(pairs(params))
        if wrong := [name for name, weight in inner if weight.dim() != 2]:
            raise UsageError(f"Muon takes weights of two dimensions, and matrices of muon gives it {wrong[0]}: leave that one out")
        parts: list[Optimizer] = [self._muon(inner)] if inner else []
        if others:
            parts.append(torch.optim.AdamW(others, self.lr * self.rest, self.betas, weight_decay=0.0, fused=True))
        return parts[0] if len(parts) == 1 else Several(parts)

    def bytes(self, named: Named) -> tuple[int, int]:
        """Returns bytes of its state, and peak bytes during a step, above that: mainly for Newton-Schulz iterations."""
        inner, others = self._divide(list(named))
        shapes = [shape for one in inner for shape in _shapes(*one)]
        step = max((_step_bytes(len(places), *shapes[places[0]]) for places in batches(shapes)), default=0)
        return sum(w.nbytes for _, w in inner) + two_means(others), step

    def _divide(self, named: list[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        return [one for one in named if self.matrices(*one)], [one for one in named if not self.matrices(*one)]

    def _muon(self, named: list[tuple[str, Tensor]]) -> Optimizer:
        whole, fused = [one for one in named if _pieces(*one) == 1], [one for one in named if _pieces(*one) == 3]
        groups = [{"params": whole}] * bool(whole) + [{"params": fused, "split": 3}] * bool(fused)
        return SplitMuon(groups, self.lr, self.weight_decay, self.momentum, adjust_lr_fn=self.adjust_lr_fn)


def _pieces(name: str, matrix: Tensor) -> int:
    return 3 if matrix.shape[0] == 3 * matrix.shape[1] and any(part in FUSED for part in name.split(".")) else 1


def _shapes(name: str, matrix: Tensor) -> list[tuple[int, int, int]]:
    """Returns rows, columns and bytes per number of every piece, lying."""
    pieces = _pieces(name, matrix)
    rows, columns = sorted((matrix.shape[0] // pieces, matrix.shape[1]))
    return [(rows, columns, matrix.element_size())] * pieces


def _step_bytes(count: int, rows: int, columns: int, each: int) -> int:
    """Returns the peak of `count` matrices: what is orthogonalized, and in bfloat16 two of their shape, and two of (rows, rows)."""
    return count * (each * rows * columns + 2 * (2 * rows * columns + 2 * rows**2))
