"""Loads all that a rank needs; the fork server imports this before any rank starts, so that a rank has it from its start.

A process' first optimizer loads torch's compiler, which takes a second, so one takes a step here.
"""

import gc

from delock.launch.collector import uncollected

with uncollected():
    import torch

    import delock.launch.child  # noqa: F401

    _weight = torch.nn.Parameter(torch.zeros(1))
    _weight.grad = torch.zeros(1)
    torch.optim.SGD([_weight], lr=0.0, fused=True).step()
    del _weight
    gc.freeze()  # no rank searches these objects either
