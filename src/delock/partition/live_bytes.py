"""Counts the bytes of living tensors: up when an operation returns one, down when the last reference to its storage goes.

What PyTorch does. A GPU's allocator counts the bytes in use and their peak. For the CPU torch has no such counter, and tensors on the meta
device have no memory at all. The profiler records allocations, but only afterwards, and without saying which tensor each was for.

Why the size of a tensor is not enough. A view shares the storage of another tensor, and an operation may return its input. A storage
lives as long as the last of the tensors that share it, and autograd may hold the only reference.

What we do. A `TorchDispatchMode` sees the result of every operation, those of a backward included, on any device. The first time that it
sees a storage it adds its bytes and attaches a finalizer, which subtracts them when the storage is freed; so a peak is exact between any
two operations. Within an operation it sees nothing: memory that a kernel takes and gives back for itself is missed, except where
`workspace` knows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from delock.tensors import tree_tensors


class LiveBytes(TorchDispatchMode):
    """Counts, while it is active, the bytes of all storages that operations return.

    `now`: bytes alive; `peak`: the most since the last `from_here`; `bare`: the same peak without storages made while `setting_apart` was
    True. Tensors that exist before must be given to `ignore`, else they are counted once an operation returns them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.apart = self.bare = 0
        self.setting_apart = False
        self.known: dict[int, Any] = {}  # storage -> its finalizer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, because otherwise torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_tensors(out):
            if leaf.layout == torch.strided:
                self._count(leaf)
        self._reach(workspace(func, args))
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves the storages of these tensors uncounted: they were there before."""
        for tensor in tensors:
            self._watch(tensor, partial(_drop, self.known))

    def from_here(self) -> int:
        """Returns the bytes alive now, and starts the peaks again from them."""
        self.peak, self.bare = self.now, self.now - self.apart
        return self.now

    def _count(self, tensor: Tensor) -> None:
        size, apart = storage_bytes(tensor), self.setting_apart
        if not self._watch(tensor, partial(self._gone, size, apart)):
            return
        self.now += size
        self.apart += size if apart else 0
        self._reach(0)

    def _reach(self, more: int) -> None:
        self.peak, self.bare = max(self.peak, self.now + more), max(self.bare, self.now - self.apart + more)

    def _watch(self, tensor: Tensor, end: Any) -> bool:
        key = storage_of(tensor)
        if key in self.known:
            return False
        self.known[key] = weakref.finalize(tensor.untyped_storage(), end, key)
        self.known[key].atexit = False
        return True

    def _gone(self, size: int, apart: bool, key: int) -> None:
        del self.known[key]
        self.now -= size
        self.apart -= size if apart else 0


def workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Returns the bytes that a CPU kernel takes and gives back within one operation, where they are as large as activations; else 0.

    oneDNN computes convolutions in a layout of its own, unless they are channels_last. For the gradient of the weights it reorders error
    and input to that layout. For the gradient of the input it reorders the error, or the result back from it, and both where the
    convolution has strides. The backward of batch norm makes its result twice.
    """
    if func is torch.ops.aten.native_batch_norm_backward.default and args[0].device.type == "cpu":
        return int(args[1].nbytes) if args[9][0] else 0
    if func is torch.ops.aten.convolution_backward.default and args[0].device.type == "cpu":
        error, given, strides, wanted = args[0], args[1], args[4], args[10]
        if not (error.dim() == 4 and any(x.is_contiguous(memory_format=torch.channels_last) for x in (error, given))):
            back = 2 * given.nbytes if max(strides) > 1 else max(given.nbytes, error.nbytes)
            return int(max(back * wanted[0], (given.nbytes + error.nbytes) * wanted[1]))
    return 0


def _drop(known: dict[int, Any], key: int) -> None:
    del known[key]


def storage_of(tensor: Tensor) -> int:
    """Returns a key that is equal for tensors that share memory, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def storage_bytes(tensor: Tensor) -> int:
    """Returns the bytes of the whole storage, of which the tensor may be a part."""
    return tensor.untyped_storage().nbytes()
