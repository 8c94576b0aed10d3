"""The tests on a GPU share this: runs there, and comparisons with runs elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from delock.options import Execution
from delock.run.inline import run_inline
from delock.run.job import StageJob, StageResult

from harness import jobs

GPU = torch.device("cuda")
EXECUTIONS = (Execution(amp="bf16"), Execution(layout="channels-last"), Execution(chunks=2), Execution("bf16", "channels-last", 2))


def on_gpu(made: list[StageJob], captured: bool = False) -> list[StageResult]:
    """Trains all stages in this process, on one GPU."""
    return run_inline([replace(job, execution=replace(job.execution, captured=captured)) for job in made], GPU, lambda event: None)


def without_dropout(made: list[StageJob]) -> list[StageJob]:
    """Returns the same jobs; a GPU draws other masks than a CPU."""
    for job in made:
        for module in (job.module, *([job.head] if job.head else [])):
            for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
                dropout.p = 0.0
    return made


def jobs64(work: str, K: int, method: Any, **options: Any) -> list[StageJob]:
    """Returns jobs in double precision and without dropout: nothing but the order of sums may differ between devices."""
    return without_dropout(jobs(work, K, method, dtype=torch.float64, **options))


def assert_close(ours: list[StageResult], other: list[StageResult], rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Asserts that weights, buffers, losses and evaluations agree, and that what is counted is equal."""
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a.state, b.state, rtol=rtol, atol=atol)
        torch.testing.assert_close(a.head, b.head, rtol=rtol, atol=atol)
        torch.testing.assert_close(a.losses, b.losses, rtol=rtol, atol=atol)
        assert [e.batches for e in a.evaluations] == [e.batches for e in b.evaluations]
        torch.testing.assert_close([e.test_loss for e in a.evaluations], [e.test_loss for e in b.evaluations], rtol=rtol, atol=atol)
        assert a.report.staleness == b.report.staleness
        assert a.report.updates == b.report.updates
