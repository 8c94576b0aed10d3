"""Imported by the fork server before any rank is born: it loads what every rank needs, so that a rank has it from birth.

A process' first optimizer loads torch's compiler, which takes a second, so one takes a step here. All this stays as long as the server
lives. Python's garbage collector would go through it again and again, while it is loaded and in every rank: it is shown none of it.
"""

import gc

gc.disable()

import torch  # noqa: E402

import delock.launch.child  # noqa: E402, F401

_weight = torch.nn.Parameter(torch.zeros(1))
_weight.grad = torch.zeros(1)
torch.optim.SGD([_weight], lr=0.0, fused=True).step()
del _weight

gc.freeze()
gc.enable()
