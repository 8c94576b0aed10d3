"""The cost of checkpoints: what is copied and what is not."""

from __future__ import annotations

import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from delock.checkpoints.encoding import encode
from delock.checkpoints.files import CHUNK, save
from delock.engine.engine import run_here
from delock.errors import UsageError
from delock.links.mailbox import Mailbox
from delock.methods import FDG
from delock.plan import windows
from delock.run.worker import Worker

from harness import jobs

pytestmark = pytest.mark.usefixtures("own_random")

CPU = torch.device("cpu")


def test_copies_of_weights_are_not_copied_again() -> None:
    """The current weights are recorded as the copy that the next Forward takes; the optimizer writes to its state, so that is copied."""
    box = Mailbox()
    workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in jobs("mlp", 3, FDG(), evaluate=False)]
    with torch.random.fork_rng(devices=[]):
        for plan in islice(windows(FDG(), 3, workers[0].job.length, 1), 5):
            run_here(plan, [worker.engine for worker in workers])
        engine = workers[0].engine
        seen = engine.record(5).copy["stage"]
    stage = engine.stage
    assert places(seen["module"]) >= places(stage.current())
    assert places([held["weights"] for held in seen["in_flight"].values()]) == places([held.weights for held in stage.in_flight.values()])
    assert not places(seen["module"]) & places(stage.body.weights)
    assert not places(seen["learner"]) & places(stage.learner.state())
    assert places(seen["learner"])
    assert len(seen["in_flight"]) == 4


def places(tree: Any) -> set[int]:
    """The places of the tensors of a tree in memory."""
    return {tensor.data_ptr() for tensor in encode(tree)[1].values()}


def test_a_file_is_as_the_format_says(tmp_path: Path) -> None:
    """Read by the library for it; the sum is that of the bytes on disk."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randn(CHUNK // 4 + 5, 3, generator=draw),
        "odd": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5, generator=draw).bfloat16(),
        "transposed": torch.randn(4, 3, generator=draw).T,
        "number": torch.tensor(7),
        "none": torch.empty(0, 2),
        "complex": torch.randn(3, generator=draw, dtype=torch.complex64),
    }
    path = tmp_path / "tensors.safetensors"
    found = save(path, tensors, {"a": "ü"})
    written = path.read_bytes()
    assert found == (len(written), zlib.crc32(written))
    assert int.from_bytes(written[:8], "little") % 8 == 0  # so that the values are aligned
    again = load_file(path)
    assert again.keys() == tensors.keys()
    for name, one in tensors.items():
        assert again[name].dtype == one.dtype
        assert torch.equal(again[name], one)
    with pytest.raises(UsageError, match="odd one is float4_e2m1fn_x2, which a checkpoint cannot keep"):
        save(path, {"odd one": torch.empty(2, dtype=torch.float4_e2m1fn_x2)}, {})
