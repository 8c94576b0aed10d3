"""Refuses a stage whose head does not see all of it: of several tensors that it sends, the head is given the main activation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from delock.errors import UsageError


def refuse_unreached(outputs: Sequence[Tensor], weights: Mapping[str, Tensor], k: int) -> None:
    """Raises UsageError for weights of stage k, by name, on which the first of its outputs does not depend, while another one does.

    Nothing else would train them. The graph is kept.
    """
    main, others = outputs[0], [one for one in outputs[1:] if one.requires_grad]
    beside = dict(zip(weights, _reached(others, weights), strict=True)) if others else {}
    below = dict(zip(weights, _reached([main], weights), strict=True)) if others else {}
    unseen = [name for name in beside if beside[name] and not below[name]]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise UsageError(
            f"the head of stage {k} is given the main activation alone, which does not depend on {unseen[0]}{more}, so nothing would train "
            "that: cut elsewhere, or use a method without local losses"
        )


def _reached(outputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[bool]:
    found = torch.autograd.grad(
        outputs, list(weights.values()), [torch.ones_like(one) for one in outputs], retain_graph=True, allow_unused=True
    )
    return [one is not None for one in found]
