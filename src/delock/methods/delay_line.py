"""Defines DelayLine, the one schedule behind all methods whose messages stay on their way for a fixed number of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Literal

from delock.errors import UsageError
from delock.methods.base import Method, Order, in_order, one_of, whole
from delock.ops import NEWEST, At, Backward, Forward, Op, Reduce, Update, Weights

Ahead = Literal["part", "mean"]


IN_PARTS = MappingProxyType({"accumulate": "it adds the gradients of the parts of a batch, so use larger batches in more micro_batches"})
"""The option of other delay lines that is not one of methods which add the gradients of the parts of a batch."""


class DelayLine(Method):
    """Forwards micro-batch s - off_k in slot s, and backwards micro-batch s - off_k - D_k; a tick has a slot for each part of a batch.

        slots s = t M .. t M + M - 1 of tick t, M = micro_batches:   F(s - off_k)   B(s - off_k - D_k)   and U behind a batch's last part

    An update takes N = M accumulate parts: the sum of the gradients of its batches, or their mean (reduce). Part b is forwarded at version
    floor(max(0, b - D_k + e) / N) of stage k. Its gradient is max(0, ceil((D_k - e - j) / N)) updates old, j = b mod N, once warm; on the
    mean of j that is (D_k - e) / N. e = 1 if backward-first and k < K-1, else 0. Replay takes the gradient anew at the weights of now, and
    only its input and error are that old.

    ahead: a Forward takes w + s (w - the weights before the last Update) for w, the weights where the gradient will be applied if the
    updates go on like that; s is the part's own staleness ("part") or the mean over an update ("mean").
    """

    at: At = "stash"
    order: Order = "forward-first"
    beta: float = 1.0
    accumulate: int = 1
    reduce: Reduce = "mean"
    ahead: Ahead | None = None

    def __post_init__(self) -> None:
        whole("micro_batches", self.micro_batches, 1)
        whole("accumulate", self.accumulate, 1)
        one_of("reduce", self.reduce, ("mean", "sum"))
        refuse_ahead(self.ahead)

    @property
    def batches_per_update(self) -> int:
        return self.accumulate

    @property
    def mixed(self) -> bool:
        return self.at == "mixed"

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        M, N = self.micro_batches, self.micro_batches * self.batches_per_update
        offset, delay = self.offset(k, K), self.delay(k, K)
        for s in range(t * M, (t + 1) * M):
            forward, b = s - offset, s - offset - delay
            backward: list[Op] = [Backward(b, loss=K - 1, at=self.at, shrink=self.beta)]
            if (b + 1) % N == 0:
                backward.append(Update(self.reduce) if self.batches_per_update > 1 else Update())  # of one batch both are the same
            yield from in_order(self.order, k == K - 1, Forward(forward, weights=self.weights(forward, delay, k == K - 1)), backward)

    def weights(self, b: int, delay: int, last: bool) -> Weights:
        """Returns the weights that the Forward of micro-batch b uses on a stage with this delay."""
        if self.ahead is None:
            return NEWEST
        N = self.micro_batches * self.batches_per_update
        late = delay - (self.order == "backward-first" and not last)
        updates = late / N if self.ahead == "mean" else max(0, -((b % N - late) // N))
        return Weights(ahead=float(updates)) if updates > 0 else NEWEST

    def capacity(self, k: int, K: int) -> int:
        return 1 + max(self.offset(k + 1, K) - self.offset(k, K), self.delay(k, K) - self.delay(k + 1, K), 1)


def refuse_ahead(ahead: object) -> None:
    """Raises UsageError for a way to draw weights ahead that does not exist."""
    if ahead not in (None, "part", "mean"):
        raise UsageError(f"ahead is {ahead!r}, but it must be one of part, mean, or None")
