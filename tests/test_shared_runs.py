"""Runs over shared memory: equal to one process, beside other links, under torchrun; nothing is left behind."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.api import fit
from delock.codecs import VQ
from delock.errors import StageFailed, UsageError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import meeting
from delock.links.connect import connect, refuse_link
from delock.links.gloo import DistributedChannel
from delock.links.shared_memory import SharedChannel
from delock.methods import ADL, BP, DGL, DSP, FDG, Interlocking, Method, OneFOneB
from delock.options import Compression, Execution, Placement
from delock.run.job import StageJob, StageResult
from delock.run.ranks import run_rank

from harness import assert_equal, in_processes, in_the_same_processes, inline, jobs
from workloads import Samples, class_loss, mlp, sgd

pytestmark = pytest.mark.skipif(meeting.here() is None, reason="no shared memory between processes here")


# -- between processes -------------------------------------------------------------------------------------------------------------


CASES: list[tuple[str, int, Method]] = [
    ("conv", 2, BP()),
    ("conv", 3, FDG(order="backward-first")),
    ("tuple", 3, FDG(at="mixed")),
    ("tuple", 3, ADL(accumulate=3)),
    ("tuple", 3, DSP(p=(2, 1), q=(1, 2))),
    ("conv", 3, DGL()),
    ("tuple", 4, Interlocking(n_wise=2)),
    ("conv", 3, Interlocking(n_wise=3, combine="sum", send="late")),
    ("conv", 3, OneFOneB(micro_batches=4)),
    ("mlp", 1, FDG()),
]


@pytest.fixture(scope="module")
def over_shared_memory() -> dict[Any, list[StageResult]]:
    return in_the_same_processes({case: jobs(*case, link="shared") for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_processes_equal_one_process(case: tuple[str, int, Method], over_shared_memory: dict[Any, list[StageResult]]) -> None:
    assert_equal(over_shared_memory[case], inline(jobs(*case)))


def test_encoded_and_clipped_and_laid_out_as_in_one_process() -> None:
    """A codebook outlives its message, norms travel between activations, and strides stay."""

    def made(link: str) -> list[StageJob]:
        compression, placement = Compression(VQ(codes=16, dim=2, every=3)), Placement(link=link)
        execution = Execution(layout="channels-last")
        return [
            replace(job, compression=compression, execution=execution, length=replace(job.length, clip=0.1), placement=placement)
            for job in jobs("conv", 2, BP(2), samples=48, epochs=3)
        ]

    assert_equal(in_processes(made("shared")), inline(made("gloo")))


def test_windows_and_long_runs() -> None:
    method = FDG(beta=0.5)
    assert_equal(
        in_processes(jobs("tuple", 3, method, samples=96, epochs=4, window=3, link="auto")),
        inline(jobs("tuple", 3, method, samples=96, epochs=4)),
    )


def places(rank: Rank, kind: str) -> dict[int, str]:
    """The channels of a rank of three, where rank 2 is on another host."""
    link = connect(kind, {peer: 2 for peer in (rank.rank - 1, rank.rank + 1) if 0 <= peer < 3}, far_away(rank))
    link.close()
    return {peer: type(channel).__name__ for peer, channel in link.channels.items()}


def far_away(rank: Rank) -> Rank:
    """The rank as torchrun would start it: neighbours have yet to find each other."""
    rank.open_group()
    if rank.rank == 2:
        meeting.here = lambda: "another host"  # type: ignore[assignment]
    return replace(rank, peers={})


def test_a_rank_may_have_a_neighbour_of_each_kind() -> None:
    near, far = SharedChannel.__name__, DistributedChannel.__name__
    assert run_processes(places, ["auto"] * 3, pin=False) == [{1: near}, {0: near, 2: far}, {1: far}]
    with pytest.raises(UsageError, match=r'link is "shared", but stages 1 and 2 are on different hosts: use link "auto"'):
        run_processes(places, ["shared"] * 3, pin=False)


def train_far_away(rank: Rank, job: StageJob) -> StageResult:
    return run_rank(far_away(rank), job)


def test_training_over_both_kinds() -> None:
    method = ADL(2)
    got = run_processes(train_far_away, jobs("tuple", 3, method, link="auto"), pin=False, patience=60)
    assert_equal(got, inline(jobs("tuple", 3, method)))


def trained(link: str, **more: Any) -> Any:
    model, data = nn.Sequential(*mlp(5, torch.float32)), Samples("vector", 40, 8, torch.float32)
    placement = Placement(link=link)
    result = fit(model, data, data, loss=class_loss, method=FDG(), optimizer=sgd, cuts=[2], epochs=2, placement=placement, **more)
    return result, model.state_dict()


# -- ends --------------------------------------------------------------------------------------------------------------------------


class Look(nn.Module):
    """The identity, which looks in its sixth batch at what its process has mapped; then, if it is to, it is killed."""

    def __init__(self, out: str, kill: bool) -> None:
        super().__init__()
        self.out, self.kill, self.batch = out, kill, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch == 6 and parent_process() is not None:
            Path(self.out).write_text(Path("/proc/self/maps").read_text())
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
        return x


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("kill", [False, True])
def test_nothing_is_left_behind(tmp_path: Path, kill: bool) -> None:
    """Slots are memory without a name: they are gone with the processes that use them."""
    before = set(Path("/dev/shm").iterdir())
    model = nn.Sequential(nn.Linear(12, 64), nn.Linear(64, 64), Look(str(tmp_path / "seen"), kill), nn.Linear(64, 10))
    data = Samples("vector", 120, 8, torch.float32)

    def run() -> None:
        fit(model, data, loss=class_loss, method="fdg", cuts=[2], optimizer=sgd, epochs=1,
                      placement=Placement(link="shared"))  # fmt: skip

    if kill:
        with pytest.raises(StageFailed, match="stage 1 was killed by SIGKILL"):
            run()
    else:
        run()
    seen = (tmp_path / "seen").read_text()
    assert "/memfd:delock (deleted)" in seen
    assert not [line for line in seen.splitlines() if "/dev/shm/" in line and not line.endswith("(deleted)")]
    own = {path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith(("delock", "psm", "torch"))}
    assert not own
    assert "/memfd:delock (deleted)" not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="link is 'mail', but it must be one of auto, gloo, shared"):
        trained("mail")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='link is "shared", but tensors on cuda do not lie in memory that processes share'):
        refuse_link("shared", "cuda")
    monkeypatch.setattr(meeting, "here", lambda: None)
    with pytest.raises(UsageError, match='link is "shared", but this system lacks'):
        trained("shared")
