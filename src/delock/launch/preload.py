"""Imported by the fork server before any rank is born: a first optimizer loads torch's compiler, which takes seconds."""

import torch

_weight = torch.nn.Parameter(torch.zeros(1))
torch.optim.SGD([_weight], lr=0.0).step()
del _weight
