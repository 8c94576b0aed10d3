"""Defines DSP: a lag of its own for every link and direction, and features recomputed at the current weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from delock.errors import UsageError
from delock.methods.base import MANY, at_least
from delock.methods.delay_line import Ahead, DelayLine
from delock.ops import Reduce

Lags = int | tuple[int, ...]


@dataclass(frozen=True)
class DSP(DelayLine):
    """Delays activations by p_k ticks and errors by q_k ticks on the link between stages k and k + 1 (diversely stale parameters).

    Source: Xu, Huo, Huang, CVPR 2020, arXiv 1909.02625. Update: w_k <- step(w_k, g), g = [df_k(h_k; w_k now)/dw_k]^T delta_{k+1},
    where h_k is the input as it arrived, computed with older weights of the stages below. Both optimizers of the paper's analysis are
    torch.optim.SGD: with momentum (heavy ball), and with nesterov=True besides.

    symbol in the paper     | here
    p_k                     | p: one lag per link, or one number for all
    m_k = D_k               | sum over k <= j < K-1 of p_j + q_j
    q_k = m_k - m_{k+1} - p_k | q: one lag per link, or one number for all

    `DSP.from_paper(p, m)` takes the paper's DSP(p_0 .. p_{K-1}; m_0 .. m_{K-1}). Deviations: none.
    Staleness of the gradient: 0. Layer-wise staleness: D_k batches.
    Memory of stage k: one graph, no copy of the weights, and (1 + D_k) |h_k| + (2 + p_k + q_k) |h_{k+1}| in the sizes of its input and
    output: D_k + 1 inputs, and the messages under way. In parts (micro_batches), lags count parts; ahead, see DelayLine, acts on the
    Forward alone; accumulate and reduce as in DDG.
    """

    name: ClassVar[str] = "dsp"
    p: Lags = 1
    q: Lags = 1
    micro_batches: int = 1
    ahead: Ahead | None = None
    accumulate: int = 1
    reduce: Reduce = "mean"
    at = "replay"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, lags in (("p", self.p), ("q", self.q)):
            every = lags if isinstance(lags, tuple) else (lags,)
            if not all(isinstance(lag, int) for lag in every):
                raise UsageError(f"dsp's lag {what} is {lags!r}, but it must be a whole number, or a tuple of them, one per link")
            if min(every, default=1) < 1:
                raise UsageError(f"dsp's lag {what} is {lags}, but every lag must be at least 1: a message takes a tick; lag 0 is fr")
            at_least(f"dsp's lag {what}", max(every, default=1), 1, MANY)

    @classmethod
    def from_paper(cls, p: tuple[int, ...], m: tuple[int, ...]) -> DSP:
        """Returns DSP(p; m) as the paper writes it, one p and one m per stage. Raises UsageError if no lags q >= 1 give that m."""
        if len(p) != len(m) or not p or p[-1] != 0 or m[-1] != 0:
            raise UsageError(f"DSP({p}; {m}): p and m need one number per stage, and 0 for the last stage")
        q = tuple(m[k] - m[k + 1] - p[k] for k in range(len(p) - 1))
        if min(q, default=1) < 1:
            raise UsageError(f"DSP({p}; {m}): m_k - m_(k+1) - p_k gives the error lags {q}, but every one must be at least 1: raise m")
        return cls(p[:-1], q)

    def fits(self, K: int) -> None:
        for what, lags in (("p", self.p), ("q", self.q)):
            if isinstance(lags, tuple) and len(lags) != K - 1:
                raise UsageError(
                    f"dsp got {len(lags)} lags {what} = {lags} for {K} stages: "
                    + (f"there are {K - 1} links, so give {K - 1}, or one for all" if K > 2 else f"there is {K - 1 or 'no'} link")
                )

    def delay(self, k: int, K: int) -> int:
        return sum(_lag(self.p, j) + _lag(self.q, j) for j in range(k, K - 1))

    def offset(self, k: int, K: int) -> int:
        return sum(_lag(self.p, j) for j in range(k))


def _lag(lags: Lags, link: int) -> int:
    return lags[link] if isinstance(lags, tuple) else lags
