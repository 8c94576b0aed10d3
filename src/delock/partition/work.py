"""Counts the work of a layer: its multiply-adds, and the bytes that its operations read and write.

Seconds would be the better measure of where to cut, but they differ from run to run, and staleness and results follow the cuts. These
numbers are the same every time. Multiply-adds are those of products of matrices, convolutions and attention, forward and backward, by
torch's own formulas; all other operations cost the time in which memory moves. Views move nothing.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from delock.tensors import tree_tensors

CPU, ACCELERATOR = 32.0, 60.0  # multiply-adds in the time in which a byte moves: of a core, of which 16 to 64 cut alike; of a GPU


class Work(TorchDispatchMode):
    """Adds up, while it is active, the work of every operation, backwards included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # here: it takes a tenth of a second to load, and cuts may be given

        self.formulas = flop_registry
        self.multiply_adds = self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, because otherwise torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(one.nbytes for tree in (args, kwargs, out) for one in tree_tensors(tree) if not one.is_sparse)
        if count := self.formulas.get(func._overloadpacket):
            self.multiply_adds += int(count(*args, **(kwargs or {}), out_val=out)) // 2
        return out

    def total(self, device: str) -> float:
        """Returns the work in multiply-adds on a kind of device."""
        return self.multiply_adds + (CPU if device == "cpu" else ACCELERATOR) * self.bytes
