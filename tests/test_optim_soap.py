"""SOAP from its package: its first step, Adam's equation for vectors, its own for a matrix, a loaded state."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch

from delock.errors import UsageError
from delock.recipes import soap

from walks import DECAYING, SHAPES, assert_close, assert_equals, by_hand, interrupted, start, walk


def test_the_first_step_changes_no_weight() -> None:
    assert_equals(walk(soap(), 1), [w.detach() for _, w in start()])
    assert all(map(torch.ne, map(torch.norm, walk(soap(), 2)), map(torch.norm, walk(soap(), 1))))


def test_it_is_its_equation_between_two_updates_of_the_eigenvectors() -> None:
    """The eigenvectors are those of the first gradient, which beside them leaves no trace."""
    lr, b1, b2, decay = 0.01, 0.9, 0.97, 0.1

    def update(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
        if n == 0:
            memory["Q"] = [np.linalg.eigh(s)[1] for s in (g @ g.T, g.T @ g)] if g.ndim == 2 else None
            return w
        left, right = memory["Q"] or (None, None)

        def turned(x: Any) -> Any:
            return left.T @ x @ right if left is not None else x

        m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * turned(g) ** 2
        d = turned(m) / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + 1e-8 / np.sqrt(1 - b2**n))
        change = left @ d @ right.T if left is not None else d
        w = w - lr * change
        return w * (1 - lr * decay) if name in DECAYING else w

    assert list(SHAPES.values())[1:] == [(4, 4), (4,), (5, 4)]  # of the first, (12, 4), eight eigenvectors are arbitrary
    assert_close(walk(soap(lr, (b1, b2), decay, 50), 12)[1:], by_hand(update, 12)[1:])


def test_a_loaded_state_goes_on_as_the_whole() -> None:
    """The eigenvectors are renewed before and after."""
    factory = pickle.loads(pickle.dumps(soap(precondition_frequency=3)))
    assert_equals(interrupted(factory), walk(factory, dtype=torch.float32))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UsageError, match="pip install pytorch-optimizer"):
        soap()
