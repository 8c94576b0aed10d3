"""Seeds the default random generators for the user's code, so that what it draws is a function of names alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(k: int) -> Iterator[None]:
    """Seeds the default generators of torch (CPU), numpy and Python with `k` within the block, and restores their states after it."""
    torch_state, numpy_state, python_state = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(k)  # not torch.manual_seed, which would seed the GPUs as well
    np.random.seed(k % 2**32)
    random.seed(k)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
