"""Settings of torch that hold for a whole process: read where a run is asked for, and made in every process that computes for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.backends import cuda

from delock.errors import UsageError

FLAGS = (
    "utils.deterministic.fill_uninitialized_memory",
    "backends.fp32_precision",  # first: the others may follow it
    "backends.mkldnn.matmul.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.mkldnn.enabled",
    "backends.cudnn.enabled",
    "backends.cudnn.deterministic",
    "backends.cudnn.benchmark",
)
ATTENTION = ("flash", "mem_efficient", "math", "cudnn")  # kernels of scaled dot-product attention


@dataclass(frozen=True, slots=True)
class Ambient:
    """Holds the settings that change what torch's functions return."""

    dtype: torch.dtype  # of new tensors
    on_device: bool  # new tensors lie on the run's device, where that is not the CPU
    deterministic: bool  # only deterministic algorithms ...
    warn_only: bool  # ... or a warning
    matmul: str  # precision of products of float32; "" where it was set by library, as FLAGS have it
    flushes: bool  # denormal numbers count as 0
    attention: tuple[bool, ...]  # which of ATTENTION are allowed
    flags: tuple[Any, ...]  # the values of FLAGS

    @classmethod
    def here(cls) -> Ambient:
        """Returns the settings of this process."""
        return cls(
            torch.get_default_dtype(),
            torch.get_default_device().type != "cpu",
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _matmul(),
            _flushes(),
            tuple(getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in ATTENTION),
            tuple(map(_flag, FLAGS)),
        )

    def beside(self, other: Ambient) -> str:
        """Returns the settings that differ, each with the value here and there."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in self.__slots__ if name != "flags"]
        pairs += zip(FLAGS, self.flags, other.flags, strict=True)
        return ", ".join(f"{name} {here}, there {there}" for name, here, there in pairs if here != there)

    def enter(self, device: torch.device) -> None:
        """Makes these the settings of this process, which computes on `device`; those that it has are not touched."""
        was = Ambient.here()
        if self == was:
            return
        torch.set_default_dtype(self.dtype)
        torch.set_default_device(device if self.on_device else None)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_flush_denormal(self.flushes)
        if self.matmul and self.matmul != was.matmul:
            torch.set_float32_matmul_precision(self.matmul)
        for kernel, allowed in zip(ATTENTION, self.attention, strict=True):
            getattr(cuda, f"enable_{kernel}_sdp")(allowed)
        for name, value in zip(FLAGS, self.flags, strict=True):
            if _flag(name) != value:
                place, _, last = name.rpartition(".")
                setattr(_flag(place), last, value)


def refuse_modes(device: str) -> None:
    """Raises UsageError for a mode around the caller that stages in other processes would not share, or that does not let them train."""
    refuse_inference("fit")
    refuse_autocast("fit", device)
    kind = torch.device(device).type
    default, own = torch.get_default_device(), torch.device(device)
    if default.type != "cpu" and (default.type != kind or own.index not in (None, default.index)):
        remedy = f'give fit device="{default}", or set no default'
        raise UsageError(f'the default device of torch is "{default}", but that of the run is "{device}": {remedy}')


def refuse_inference(what: str) -> None:
    """Raises UsageError within torch.inference_mode, for a function that trains."""
    if torch.is_inference_mode_enabled():
        raise UsageError(f"{what} is called within torch.inference_mode, in which nothing can be trained: call it outside")


def refuse_autocast(what: str, device: str) -> None:
    """Raises UsageError within torch.autocast."""
    if any(map(torch.is_autocast_enabled, {"cpu", torch.device(device).type})):
        raise UsageError(
            f"{what} is called within torch.autocast, which would not reach the stages' backwards and processes alike: "
            'call it outside, and give execution=delock.Execution(amp="bf16")'
        )


def _matmul() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch does not say once a precision was set by library
        return ""


def _flushes() -> bool:
    """Returns True if denormal numbers are flushed to 0, which torch can set and does not tell."""
    return not (torch.full((), 1e-310, dtype=torch.float64, device="cpu") * 0.5).item()


def _flag(name: str) -> Any:
    return reduce(getattr, name.split("."), torch)
