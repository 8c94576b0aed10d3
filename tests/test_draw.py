"""Pictures of timelines and of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from delock.draw import Run, curves, gantt
from delock.errors import UsageError
from delock.methods import DSP
from delock.plan import RunLength, unroll
from delock.records import EvaluationRecord, StepRecord
from delock.timeline import (
    Costs,
    Timeline,
    simulate,
)


def test_gantt_draws_every_kind_and_the_same_bytes_twice(tmp_path: Path) -> None:
    predicted = simulate(unroll(DSP(), 3, RunLength(8, every=4, evaluation=2)), replace(Costs.unit(3), update=(0.3,) * 3))
    late = tuple(tuple(replace(span, start=span.start + 900, end=span.end + 900) for span in column) for column in predicted.columns)
    files = gantt({"predicted": predicted, "measured": Timeline(late)}, tmp_path / "dsp.v1")
    assert [file.name for file in files] == ["dsp.v1.png", "dsp.v1.svg"]
    before = [file.read_bytes() for file in files]
    assert before[0].startswith(b"\x89PNG")
    for colour in (b"#56b4e9", b"#e69f00", b"#d55e00", b"#009e73", b"#f0e442", b"#ededed"):  # F, B, replay, U, evaluation, idle
        assert colour in before[1]
    again = gantt({"predicted": predicted, "measured": Timeline(late)}, tmp_path / "dsp.v1.png")
    assert again == files
    assert [file.read_bytes() for file in again] == before
    gantt({"predicted": predicted}, tmp_path / "part", window=(0.0, 3.5), unit="forward passes")
    assert b"#f0e442" not in (tmp_path / "part.svg").read_bytes()  # no evaluation before 4
    with pytest.raises(UsageError, match="no op to draw"):
        gantt({"empty": Timeline(((), ()))}, tmp_path / "empty")


def test_curves_draw_runs_and_leave_the_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    settings = dict(matplotlib.rcParams)
    steps = [StepRecord(i, i / 10, 2.0 / i, 0.1, 32 * i, i * 0.5) for i in range(1, 31)]
    tests = [EvaluationRecord(10 * e, e, 1.0 / e, 1.1 / e, {"accuracy": 0.5 + 0.1 * e}, 5.0 * e, 320 * e) for e in (1, 2, 3)]
    runs = [("bp", tests, steps), Run("fdg", tests), Run("stopped", [], steps[:3])]
    files = curves(runs, tmp_path / "all")
    first = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in curves(runs, files[1])] == first
    assert dict(matplotlib.rcParams) == settings
    regression = [replace(record, metrics={}) for record in tests]
    assert curves([Run("mlp", regression)], tmp_path / "loss")[0].exists()
    with pytest.raises(UsageError, match="no record"):
        curves([Run("nothing", [])], tmp_path / "none")
