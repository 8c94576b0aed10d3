"""Tests that need a GPU skip where torch sees none, and have cuDNN add in the same order every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

REASON = "needs a GPU, and torch sees none here"


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    """Sums are taken in one order and in full precision, so that runs can be compared."""
    if not torch.cuda.is_available():
        pytest.skip(REASON)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
