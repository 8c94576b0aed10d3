"""SOAP, from the package pytorch-optimizer."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.optim.factories import Named, decay_groups
from delock.optim.ranges import check_fields


@dataclass(frozen=True, slots=True)
class soap:
    """Makes SOAP: Adam in the eigenbases of Shampoo's preconditioner. For a matrix w of (A, B) with gradient g:

        L <- b L + (1-b) g g^T;   R <- b R + (1-b) g^T g,    b = betas[1];   Q_L, Q_R: their eigenvectors
        m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) (Q_L^T g Q_R)^2
        w <- (1 - lr weight_decay) w - lr Q_L [ m~ / (sqrt(v^) + eps) ] Q_R^T,    m~ = Q_L^T m^ Q_R

    m^ and v^ are corrected for their bias as Adam's. Every `precondition_frequency` updates one step of the power method and a QR
    decomposition bring the eigenvectors up to date. Vectors are updated as by Adam. Decay is that of recipes.AdamW.
    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025.

    The first step changes no weight, as in the authors' code: it only measures the gradient's eigenvectors. The state of a matrix is two
    matrices of its shape and two squares for each of its sides.
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    weight_decay: float = 0.01
    precondition_frequency: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        every = self.precondition_frequency
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UsageError(f"precondition_frequency of soap is a number of updates, at least 1, not {reprlib.repr(every)}")
        if find_spec("pytorch_optimizer") is None:
            raise UsageError("SOAP comes from a package that is not installed: pip install pytorch-optimizer")

    def __call__(self, params: Named) -> Optimizer:
        from pytorch_optimizer import SOAP  # here, as it takes a second

        groups = decay_groups(params, self.weight_decay)
        made: Optimizer = SOAP(groups, self.lr, self.betas, precondition_frequency=self.precondition_frequency)
        return made

    def bytes(self, named: Named) -> tuple[int, int]:
        """Returns bytes of its state, and peak bytes during a step that renews eigenvectors, above that."""
        weights = [w for _, w in named]
        return sum(2 * w.nbytes + 2 * sum(_squares(w)) for w in weights), max(map(_step_bytes, weights), default=0)


def _squares(weight: Tensor) -> list[int]:
    """Returns the bytes of a square matrix for each side of a weight, in ascending order; a vector has none."""
    return sorted(weight.element_size() * side**2 for side in weight.shape) if weight.dim() > 1 else []


def _step_bytes(weight: Tensor) -> int:
    """Five temporaries of a weight's shape live while its longest side is decomposed: two products and Q, R and a copy; others are done."""
    *others, longest = _squares(weight) or [0]
    return 5 * weight.nbytes + 5 * longest + sum(others)
