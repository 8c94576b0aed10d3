"""Writes the records of a run as event files for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from delock.cli.run_folder import BOARD
from delock.records import EvaluationRecord, StepRecord


class TensorBoard:
    """Writes to the folder `tensorboard` of a run folder; x is the number of batches trained.

    after: what was written of later batches is void.
    """

    def __init__(self, run: Path, after: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds to load, and few runs want it

        self._writer = SummaryWriter(str(run / BOARD), purge_step=None if after is None else after + 1)

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        """Adds one record, a curve per figure."""
        match record:
            case StepRecord(loss=loss, lr=lr):
                figures = {"train/loss": loss, "train/lr": lr}
            case EvaluationRecord():
                figures = {"test/loss": record.test_loss, **{f"test/{name}": value for name, value in record.metrics.items()}}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, record.batches)

    def close(self) -> None:
        """Writes the rest and closes."""
        self._writer.close()
