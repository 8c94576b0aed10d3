"""Measures the memory of this process or device, and its peak."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from delock.launch import allocator

STATUS = Path("/proc/self/status")  # Linux
CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int:
    """Resets the peak, and returns the bytes held now, after free memory has been returned to the system."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # a stage without weights has put nothing there yet
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    allocator.give_back()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # resets the high-water mark
    return resident() or _highest()


def resident() -> int:
    """Returns the bytes of memory that this process holds now; 0 if the system does not say."""
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """Returns the peak of bytes held since `reset_peak`: resident memory on the CPU, memory of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _highest()


def programs(device: torch.device) -> int:
    """Returns the bytes of program files in resident memory, pages of torch's libraries loaded when they first run; 0 on a GPU."""
    return 0 if device.type == "cuda" else _status("RssFile")


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines.get(field, "0 kB").split()[0]) * 1024


def _highest() -> int:
    """Returns the highest resident size ever, if the kernel cannot reset it; the system reports bytes on macOS, kilobytes elsewhere."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
