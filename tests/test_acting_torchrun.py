"""Under torchrun evaluations act as in one process: the ranks tell each other through the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from acting import PLATEAU, assert_equal, fit
from test_acting import EARLY

from programs import torchrun

pytestmark = pytest.mark.usefixtures("own_random")
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_acting_torchrun import trained

model, result = trained()
torch.save((model.state_dict(), result.losses, result.stopped), sys.argv[1] + os.environ["RANK"])
"""


def trained() -> Any:
    return fit(method="fdg", K=2, schedule=PLATEAU, callbacks=[EARLY])


def test_ranks_act_as_one_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM)
    done = torchrun(tmp_path / "script.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    model, result = trained()
    assert result.stopped
    for rank in range(2):
        state, losses, stopped = torch.load(tmp_path / f"out{rank}")
        assert (losses, stopped) == (result.losses, result.stopped)
        other, _ = fit(batches=4)
        other.load_state_dict(state)
        assert_equal(model, other)
