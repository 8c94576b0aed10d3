"""A codec makes few bytes of a tensor, and a tensor of these bytes again. torch is loaded when something is encoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from delock.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Payload: TypeAlias = dict[str, Any]
"""An encoded tensor: tensors, numbers and strings, as a message can carry them and a buffer can keep them. "codec" names the codec."""


class Encoder(Protocol):
    """The sender's half of a codec, for one stream of tensors."""

    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """Returns x encoded; None where it has to travel as it is. `learn`: the codec may adapt to it.

        A tensor with a NaN, an infinity or a number that the codec cannot hold travels as it is, and teaches nothing: so no codec makes
        a number of what is none, nor the reverse.
        """

    def state(self) -> Any:
        """Returns all that the coming payloads depend on."""

    def load(self, state: Any) -> None:
        """Goes on from `state()`."""


class Codec(ABC):
    """A codec for the tensors on a link. A concrete one is a frozen dataclass whose fields, whole numbers, are its settings."""

    name: ClassVar[str]
    """The word that selects the codec on the command line."""
    takes_errors: ClassVar[bool] = True
    """False for a codec that is for activations alone."""

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Says whether the codec shrinks a tensor of that shape. Whole numbers, and what is small already, travel as they are."""
        return dtype.is_floating_point and 0 not in shape

    def predicted(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[float, float]:
        """Returns the bytes of the tensor once encoded, and those of codebooks, each a mean over batches.

        Raises UsageError where the codec does not fit the shape.
        """
        return self.encoded_bytes(shape) if self.takes(shape, dtype) else (prod(shape) * dtype.itemsize, 0.0)

    @abstractmethod
    def encoded_bytes(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Does the work of `predicted` for a tensor that the codec takes."""

    @abstractmethod
    def encoder(self, seed: int) -> Encoder:
        """Returns a new encoder; `seed` is that of what the codec draws."""

    @staticmethod
    @abstractmethod
    def decode(payload: Payload) -> Tensor:
        """Returns the tensor that a payload stands for: without a graph, dense, in its old shape, dtype and, if that was dense, layout."""

    @staticmethod
    @abstractmethod
    def sizes(payload: Payload) -> tuple[int, int, int]:
        """Returns the bytes of the tensor before, of its payload, and of the codebook sent with it."""

    def check(self, outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...], where: str) -> None:
        """Raises UsageError where the codec does not fit such outputs, a (shape, dtype) each; `where` names the stage that sends them."""
        if not any(dtype.is_floating_point for _, dtype in outputs):
            kinds = ", ".join(str(dtype).removeprefix("torch.") for _, dtype in outputs)
            raise UsageError(f"{where} sends {kinds}, and a codec is for floating point numbers: use codec none, or cut elsewhere")
        for shape, dtype in outputs:
            try:
                self.predicted(shape, dtype)
            except UsageError as error:
                raise UsageError(f"{where} sends {tuple(shape)}: {error}") from None


class Memoryless(Codec):
    """A codec that encodes every tensor by itself, and so is its own encoder."""

    @abstractmethod
    def encode(self, x: Tensor, learn: bool) -> Payload | None:
        """Returns x encoded, whatever came before; None as an Encoder does."""

    def encoder(self, seed: int) -> Encoder:
        """Returns the codec itself: it draws nothing."""
        return self

    def state(self) -> None:
        """Returns None: no payload depends on another."""

    def load(self, state: None) -> None:
        """Has nothing to load."""


def within(x: Tensor, largest: float) -> bool:
    """Returns True if all numbers of x, of which there are some, are finite and none is larger in magnitude."""
    low, high = x.detach().aminmax()
    return bool(low >= -largest and high <= largest)


def channel_axis(shape: tuple[int, ...]) -> int:
    """Returns the dimension of the channels: the last of three (batch, place, channel), else the second; there are at least two."""
    return 2 if len(shape) == 3 else 1


def dtype_name(x: Tensor) -> str:
    """Returns the dtype as a payload names it: "float32"."""
    return str(x.dtype).removeprefix("torch.")


def dtype_of(payload: Payload) -> torch.dtype:
    """Returns the dtype that a payload's tensor had."""
    import torch

    dtype: torch.dtype = getattr(torch, payload["dtype"])
    return dtype
