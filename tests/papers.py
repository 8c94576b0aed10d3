"""The papers' table: lags, delays, staleness and trainers of every method, in one place, written without the methods' own formulas.

Link j lies between stage j and stage j + 1. An activation goes up it p_j ticks late and an error comes down it q_j ticks late, so that
stage k sees a batch again D_k = sum over j >= k of (p_j + q_j) ticks, and so batches, after its Forward. All else follows from D_k.
Where a batch comes in parts, b counts parts, and so do lags and delays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delock.methods import DGL, DSP, Interlocking, Method
from delock.methods.base import Order

from oracles import delays_of

EARLY, BOTH = (0, 1), (1, 1)
LAGS = {"ddg": EARLY, "fr": EARLY, "2bw": EARLY, "paci": EARLY, "fdg": BOTH, "adl": BOTH}
# (p, q) of every link; DSP is given its own; all others wait: (0, 0)
DERIVATIVE = {"ddg": "stash", "fr": "replay", "dsp": "replay", "paci": "mixed"}  # FDG and ADL have a choice of stash and mixed
UNEVEN = ((2, 1, 3, 1), (1, 2, 1, 1))  # lags p, q of DSP that no sum or place confuses, for up to five stages
ORDERS: tuple[Order, ...] = ("forward-first", "backward-first")


def uneven_dsp(K: int) -> DSP:
    """DSP with another lag on every link of K stages."""
    p, q = UNEVEN
    return DSP(p=p[: K - 1], q=q[: K - 1])


def lags(method: Method, K: int) -> tuple[Sequence[int], Sequence[int]]:
    """The lags p and q of the K - 1 links."""
    given = (method.p, method.q) if isinstance(method, DSP) else LAGS.get(method.name, (0, 0))
    p, q = ([lag] * (K - 1) if isinstance(lag, int) else lag for lag in given)
    return p, q


def delays(method: Method, K: int) -> list[int]:
    """D_k of every stage."""
    return delays_of(*lags(method, K))


def derivative(method: Method) -> str:
    """The weights at which a delayed method takes its derivatives: stash, replay or mixed."""
    return DERIVATIVE.get(method.name) or str(getattr(method, "at", "stash"))


def early(method: Method, k: int, K: int) -> int:
    """e_k: 1 where a stage's Update of a tick comes before its Forward, which is one version newer for it."""
    return int(getattr(method, "order", "") == "backward-first" and k < K - 1)


def versions(method: Method, b: int, k: int, K: int) -> tuple[int, int]:
    """The version of the weights that stage k's Forward of batch b uses, and the one to which its gradient is applied."""
    if method.name in ("2bw", "bp"):  # by batches, on all stages alike
        behind = 1 if method.name == "2bw" else int(getattr(method, "behind", 0))
        return max(0, b // method.micro_batches - behind), b // method.micro_batches
    N, D = parts_of_update(method), delays(method, K)[k]
    return max(0, b - D + early(method, k, K)) // N, b // N


def parts_of_update(method: Method) -> int:
    """The parts of all batches of an update."""
    return method.micro_batches * (1 if method.name == "bp" else int(getattr(method, "accumulate", 1)))


def staleness(method: Method, b: int, k: int, K: int) -> int:
    """Gradient staleness: updates between the two versions; 0 where the derivative is taken anew at the newest weights."""
    used, applied = versions(method, b, k, K)
    return 0 if derivative(method) == "replay" else applied - used


def oracle_options(method: Method, K: int) -> dict[str, Any]:
    """The options that `oracles.delayed` takes for a delayed method."""
    options = {"delays": delays(method, K), "at": derivative(method), "backward_first": getattr(method, "order", "") == "backward-first"}
    options |= {"shrink": getattr(method, "beta", 1.0), "reduce": getattr(method, "reduce", "mean")}
    return options | {"M": getattr(method, "accumulate", 1)}


def trainers(method: Method, k: int, K: int) -> int:
    """Losses that train stage k."""
    return min(method.n_wise, K - k) if isinstance(method, Interlocking) and method.combine != "furthest" else 1


def sent_down(method: Method, k: int, K: int) -> list[int]:
    """The losses whose errors stage k sends down, nearest first."""
    if k == 0 or isinstance(method, DGL):
        return []
    if isinstance(method, Interlocking):
        nearest = max(k, method.n_wise - 1) if method.combine == "furthest" else k
        return [loss for loss in range(nearest, K) if 0 <= loss - (k - 1) < method.n_wise]
    return [K - 1]
