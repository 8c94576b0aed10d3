"""The four things that a stage does, as frozen values; each is one line of mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

At = Literal["stash", "replay", "mixed"]
"""The place at which a stage differentiates a batch.

stash   at the weights and the activations of the batch's Forward: the equations of DDG, FDG and ADL
replay  at the weights of now, the activations recomputed with them from the stored input: FR, DSP
mixed   at the weights of now with the activations of the Forward: what optimizers did that wrote to weights under a live graph
"""
Part = Literal["both", "input", "weights"]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class Derivative:
    """Says what a stage must do to have a derivative at the place that `at` names."""

    keeps: Literal["graph", "input"]  # from the Forward to the Backward
    copies: bool  # the weights of the Forward, before an Update changes them
    recomputes: bool  # the Forward, with a graph, just before the Backward
    counts_from: Literal["forward", "backward"]  # the op whose version the staleness of the gradient counts from


_NEWEST = Derivative("graph", copies=False, recomputes=False, counts_from="forward")
DERIVATIVES: Mapping[tuple[At, bool], Derivative] = MappingProxyType(
    {
        # (at, the Forward used the weights that are the newest at the Backward): then all three are the same numbers
        ("stash", True): _NEWEST,
        ("replay", True): _NEWEST,
        ("mixed", True): _NEWEST,
        ("stash", False): Derivative("graph", copies=True, recomputes=False, counts_from="forward"),
        ("replay", False): Derivative("input", copies=False, recomputes=True, counts_from="backward"),
        ("mixed", False): Derivative("graph", copies=False, recomputes=False, counts_from="forward"),
    }
)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a Forward uses: w[v - behind] + ahead (w[v - behind] - w[v - behind - 1]).

    w[v] are the stage's newest weights, after v Updates. behind: a whole number of Updates; before there were as many, the first weights.
    ahead: Updates by which the last one is drawn out, a real number. Before the second Update nothing is drawn out.
    """

    behind: int = 0
    ahead: float = 0.0

    def used(self, version: int) -> int:
        """Returns the version that is used where `version` is the newest."""
        return max(0, version - self.behind)

    def draws_out(self, version: int) -> bool:
        """Returns True if the last Update before the version that is used is drawn out; the first Update never is."""
        return self.ahead > 0 and self.used(version) > 1

    def since(self, made: int) -> Weights:
        """Returns the weights that a Forward uses `made` Updates after the beginning of a run, at whatever version it began."""
        return Weights(min(self.behind, made), self.ahead if self.draws_out(made) else 0.0)

    @property
    def banks(self) -> int:
        """Returns the number of older versions that the stage must keep."""
        return self.behind + (self.ahead > 0)


NEWEST = Weights()


@dataclass(frozen=True, slots=True)
class Forward:
    """h_{k+1} = f_k(h_k; w): compute and pass on the activation of one (micro-)batch. `weights` says which weights w are.

    Pairing: on stage k > 0 it consumes the message that the Forward of the same batch on stage k - 1 produced.

    With a replay buffer (asynchronous DGL) `batch` is the stage's own ordinal, and `source` that of the Forward on stage k - 1 (on stage
    0: of the data) whose activation it reads, perhaps not for the first time. train=False then says that the stage has made all its
    updates and goes on, in eval mode, for the others.
    """

    batch: int
    train: bool = True
    source: int | None = None
    weights: Weights = NEWEST


@dataclass(frozen=True, slots=True)
class Evaluate:
    """h_{k+1} = f_k(h_k; w_k) in eval mode, at the stage's newest weights: one batch of an evaluation on its way to the last stage.

    Pairing: on stage k > 0 it consumes the message that Evaluate(batch) on stage k - 1 produced. Batches of evaluations are counted in a
    number space of their own, on from one evaluation to the next.
    """

    batch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """g_k += weight (dh_{k+1}/dw_k)^T d  and  delta_k = (dh_{k+1}/dh_k)^T d, d the error of the batch under the loss of stage `loss`.

    Pairing: for loss > k, d is `shrink` times the message that Backward(batch, loss) on stage k + 1 produced; for loss == k it
    comes from the stage's own head, times the batch's weight (n_i / n for a part of a batch, else 1).
    `at` says where the derivative is taken, `part` which of g_k and delta_k are computed: "input" leaves g_k out, or to the
    Backward(part="weights") of the same batch and loss that follows it. A head's own gradient has weight 1.
    """

    batch: int
    loss: int
    at: At = "stash"
    part: Part = "both"
    shrink: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """w_k <- step(w_k, min(1, clip / |g|) g_k), g_k <- 0. The only op that makes a version.

    reduce="mean" divides g_k by the number of batches (not of their parts) accumulated since the stage's last Update. clip: the largest
    norm |g| that the gradient may keep, over this stage's weights or over the whole network's; None: any. `number` tells the Updates over
    the network apart: number n needs every stage's gradient, and takes place on stage k after it did on stage k - 1, which sends |g| up.
    An Update of a stage that has accumulated nothing does not happen (00-common, warm-up): a plan leaves it out.
    """

    reduce: Reduce = "sum"
    clip: float | None = None
    over: Literal["stage", "network"] = "stage"
    number: int = 0


Op: TypeAlias = Forward | Evaluate | Backward | Update


def label(op: Op) -> str:
    """Returns the op as a chart writes it: F12, E3, B7, U; parts of a Backward as b (input) and w (weights)."""
    match op:
        case Forward(batch):
            return f"F{batch}"
        case Evaluate(batch):
            return f"E{batch}"
        case Backward(batch, _, _, part):
            return {"both": "B", "input": "b", "weights": "w"}[part] + str(batch)
        case Update():
            return "U"
