"""A message as bytes and back: every dtype, layout and tree of targets, and the ones that are refused."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import pytest
import torch

from delock.errors import UsageError
from delock.links import Message
from delock.links.mailbox import Mailbox
from delock.links.wire import ALIGN, make_dense, pack, unpack

from harness import same_tree
from messages import CPU, DTYPES, activation, error, numbers, tensors, trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (0,), (4, 0, 2), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_arrives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = numbers(*shape, dtype=dtype)
    arrived = trip(Message(x, numbers(7, dtype=dtype)))  # something behind it, so that its end counts
    for got, sent in ((arrived.values, x), (arrived.targets, numbers(7, dtype=dtype))):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got, sent)


@pytest.mark.parametrize("how", tensors())
def test_tensors_arrive_dense_and_aligned_over_every_link(how: str) -> None:
    """The kernels that read them add in the same order in one process as in many."""
    x = tensors()[how]
    settled, arrived = make_dense(x), trip(Message((numbers(3), x))).values[1]
    for got in (settled, arrived):
        assert torch.equal(got, x)
        assert got.data_ptr() % ALIGN == 0
    assert settled.stride() == arrived.stride()
    dense = x.numel() == 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))  # no gaps, no overlaps
    assert arrived.stride() == (x.stride() if dense else torch.empty(x.shape).stride())
    if how in ("contiguous", "channels_last"):
        assert settled is x, "copied without need"
    assert not arrived.requires_grad


def test_any_tree_of_targets_arrives() -> None:
    targets = {
        "boxes": [numbers(2, 4), (), numbers(0, 4)],
        "pair": (numbers(3, dtype=torch.int64), {"weight": numbers(3), "nothing": None, "empty": {}}),
        "constants": [True, 1, -2.5, 'ünï{"', None, math.inf],
    }
    arrived = trip(Message((numbers(2), numbers(2, dtype=torch.int32)), targets, weight=1 / 3, samples=2**40), error(2**40, 7))
    same_tree(arrived.targets, targets)
    assert isinstance(arrived.values, tuple)
    assert isinstance(arrived.targets["pair"], tuple)
    assert isinstance(arrived.targets["boxes"], list)
    assert arrived.targets["constants"][0] is True
    assert (arrived.weight, arrived.samples) == (1 / 3, 2**40)
    assert trip(Message(None)).values is None
    assert trip(Message(())).values == ()
    assert math.isnan(trip(Message(None, math.nan)).targets)


@pytest.mark.parametrize("targets", [{1: torch.ones(1)}, [{torch.ones(1)}], numbers(2).numpy(), object()], ids=lambda x: type(x).__name__)
def test_what_cannot_travel_is_refused(targets: Any) -> None:
    for send in (pack, Mailbox().end(0).send):
        with pytest.raises(UsageError, match="cannot travel between stages: use tensors in tuples, lists and dicts with string keys"):
            send(*(activation(0), Message(None, targets)) if send is pack else (1, activation(0), Message(None, targets)))


def test_a_packed_message_is_a_copy() -> None:
    x = numbers(5)
    packed, _ = pack(activation(0), Message(x))
    x.zero_()
    assert torch.equal(unpack(packed, CPU)[1].values, numbers(5))


def test_a_named_tuple_is_refused_and_equal_constants_keep_their_types() -> None:
    with pytest.raises(UsageError, match="Point is a named tuple"):
        pack(activation(0), Message(torch.ones(1), namedtuple("Point", "x y")(torch.ones(1), torch.ones(1))))
    for constant in (1, 1.0, True, -0.0, 0.0, None, "1"):  # equal ones must not share a layout
        _, back = unpack(pack(activation(0), Message(torch.ones(1), (constant,)))[0], torch.device("cpu"))
        assert repr(back.targets[0]) == repr(constant)
