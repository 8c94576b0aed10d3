"""Runs Delock's methods, by the function that its processes run, on either link; every turn is a run of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from share import Here, Turn, TurnReport

from delock.launch.rank import Rank
from delock.links.stream import another
from delock.methods import ADL, DDG, DGL, FDG, Method
from delock.ops import Backward
from delock.options import Placement
from delock.plan import RunLength
from delock.run.job import StageJob
from delock.run.ranks import run_rank

METHODS: dict[str, Method] = {"FDG": FDG(), "ADL": ADL(accumulate=2), "DDG": DDG(), "DGL": DGL()}
LINKS: tuple[Literal["gloo", "shared"], ...] = ("gloo", "shared")
FROM = 1  # the clock starts when the Backward of this batch has ended


def ours(method: str, link: Literal["gloo", "shared"], here: Here) -> Turn:
    """Builds stage `rank` of the method."""
    job = replace(here.share.jobs[method][here.number], placement=Placement(link=link))
    return partial(_turn, here, job)


def _turn(here: Here, job: StageJob, n: int) -> TurnReport:
    """Returns the seconds per batch between the ends of two Backwards n batches apart.

    The second of them comes before the stage runs out of Forwards: n Forwards, n Backwards and their Updates lie between.
    """
    batches = FROM + n + job.method.delay(0, job.K) + 1
    module, head = copy.deepcopy((job.module, job.head))
    result = run_rank(_for_one_run(here.rank), replace(job, module=module, head=head, length=RunLength(batches)))
    ends = [span.end for span in result.spans if isinstance(span.op, Backward)]
    return TurnReport((ends[FROM + n] - ends[FROM]) / n, result.losses)


def _for_one_run(rank: Rank) -> Rank:
    """Returns the rank with sockets of its own, which a run closes at its end: the next turn is another run."""
    return replace(rank, peers={peer: another(rank.rank, peer, connection) for peer, connection in rank.peers.items()})


OURS: dict[str, Callable[[Here], Turn]] = {f"{method}, {link}": partial(ours, method, link) for method in METHODS for link in LINKS}
