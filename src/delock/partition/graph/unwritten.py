"""Refuses a model that writes to its own weights in a forward, before it does: a trial would change the user's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from delock.errors import UsageError
from delock.tensors import address


class Unwritten(TorchDispatchMode):
    """Raises UsageError, while it is active, for an operation that would write to a parameter of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = {address(weight): name for name, weight in model.named_parameters() if weight.numel()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, because otherwise torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.is_mutable:
            given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})
            for argument in func._schema.arguments:
                written = argument.alias_info is not None and argument.alias_info.is_write
                self._refuse(given.get(argument.name) if written else None)
        return func(*args, **(kwargs or {}))

    def _refuse(self, written: Any) -> None:
        for one in written if isinstance(written, list | tuple) else (written,):
            if isinstance(one, Tensor) and one.layout == torch.strided and (name := self.places.get(address(one))):
                raise UsageError(
                    f"the model writes to its parameter {name} in its forward, and a stage's weights change in updates alone: make it a "
                    "buffer, or change it in the optimizer"
                )
