"""Computes how long the steps of Adam may be where gradients are late: on a quadratic, the only case that can be computed beforehand."""

from __future__ import annotations

from cmath import exp
from collections.abc import Callable, Mapping
from math import inf, pi

ANGLES = 64  # per update of delay, on a half circle: many for each time that the curve winds round
FIRST = 1e-4  # with a momentum near 1 the crossing is at a small angle
HALVINGS = 50


def longest_step(shares: Mapping[int, float], momentum: float, horizon: float = 0.0) -> float:
    """Returns the largest a up to which a quadratic is stable: the roots of the motion's polynomial lie in the unit disc.

        (z-1)(z-b) + a [c (1-b) z + (1-c)(z-b)] sum_j f_j z^(-s_j) = 0,     b = momentum,  c = b^horizon

    This is the motion along one eigenvector, in the coordinates of Adam's preconditioner: a is the learning rate times the curvature, and
    momentum is that of a mean, as Adam's beta1. shares: of all gradients the share f_j that is s_j updates late. horizon: of spike
    compensation, r times the mean of the s_j; 0 without. Source of the form with c: Kosson et al., MLSys 2021, for SGD.

    For a small a the root near 1 lies inside. A root leaves the disc on its edge, where z = e^(i theta) solves the equation with a real a;
    the least such a is the answer. Coefficients are real, so half of the edge is enough.
    """
    kept: float = momentum**horizon

    def moved(z: complex) -> complex:
        return (z - 1) * (z - momentum)

    def pulled(z: complex) -> complex:
        late = sum(share * z**-lag for lag, share in shares.items())
        return (kept * (1 - momentum) * z + (1 - kept) * (z - momentum)) * late

    def askew(theta: float) -> float:
        z = exp(1j * theta)
        return (moved(z) * pulled(z).conjugate()).imag

    count = ANGLES * (max(shares) + 2)
    grid = [FIRST, *(pi * i / count for i in range(1, count))]
    signs = [askew(theta) > 0 for theta in grid]
    crossed = [_root(askew, grid[i], grid[i + 1]) for i in range(count - 1) if signs[i] != signs[i + 1]]
    edge = [exp(1j * theta) for theta in crossed] + [-1 + 0j]
    steps = [-moved(z) / pulled(z) for z in edge if abs(pulled(z)) > 1e-12]
    return min((step.real for step in steps if step.real > 0), default=inf)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Returns where a function changes its sign between two points."""
    positive = function(low) > 0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (function(middle) > 0) == positive else (low, middle)
    return low
