"""Keeps on disk what a backward needs, for the time of a proof: beside a large model there is little room in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from delock.tensors import address, fills_memory

LEAST = 1 << 16  # bytes of a tensor that is worth a place on disk


def bears_hooks(call: Callable[[], object]) -> bool:
    """Returns True if a call computes with hooks on what graphs keep; torch.func.grad, for one, does not, and code may forbid them."""
    try:
        with torch.no_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            call()
    except RuntimeError:
        return False
    return True


@contextmanager
def offloaded(model: nn.Module) -> Iterator[None]:
    """Writes, within the block, the activations that graphs keep to a file without a name, and reads them back for the backward.

    Bits and strides stay what they are. Weights and buffers of the model stay in memory, where they are anyway, as do views, which keep the
    memory of others.
    """
    held = {address(one) for one in (*model.parameters(), *model.buffers())}
    with ExitStack() as opened:
        try:
            place = opened.enter_context(TemporaryFile(buffering=0)).fileno()
        except OSError:  # no folder takes one: then memory is what there is
            yield
            return

        def pack(x: Tensor) -> Any:
            if address(x) in held or not _owns_memory(x):
                return x
            begins = os.lseek(place, 0, os.SEEK_END)
            try:
                written = os.pwritev(place, [_bytes(x)], begins)
            except OSError:  # the disk is full
                return x
            return (x.shape, x.stride(), x.dtype, begins) if written == x.numel() * x.itemsize else x

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            shape, stride, dtype, begins = kept
            x = torch.empty_strided(shape, stride, dtype=dtype)
            if os.preadv(place, [_bytes(x)], begins) != x.numel() * x.itemsize:
                raise OSError("a file that activations were written to is shorter now")
            return x

        with saved_tensors_hooks(pack, unpack):
            yield


def _owns_memory(x: Tensor) -> bool:
    """Returns True for a large dense tensor on the CPU that alone fills its memory."""
    if type(x) is not Tensor or x.layout != torch.strided or x.device.type != "cpu" or x.is_conj() or x.is_neg():
        return False
    size = x.numel() * x.itemsize
    return LEAST <= size == x.untyped_storage().nbytes() and fills_memory(x.shape, x.stride())


def _bytes(x: Tensor) -> memoryview:
    flat = x.detach().as_strided((x.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
