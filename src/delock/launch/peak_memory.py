"""How much memory this process or device has used at its peak."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from delock.launch import allocator

STATUS = Path("/proc/self/status")  # Linux
CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes held now, free ones returned to the system."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # a stage without weights has put nothing there yet
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    allocator.give_back()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # resets the high-water mark
    return resident() or _highest()


def resident() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """Bytes held at the peak since `reset_peak`: resident memory on the CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _highest()


def handed_out(act: Callable[[], object]) -> int:
    """The most bytes that torch's allocator for the CPU had handed out at one time while `act` ran, of those it was then asked for.

    By torch's profiler, which slows it down and writes a trace to a temporary folder: for checks of a prediction, not for training.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return max(map(int, re.findall(r'"Total Allocated": (\d+)', path.read_text())))


def programs(device: torch.device) -> int:
    """Bytes of program files in resident memory: pages of torch's libraries, which come when they are first run. 0 on a GPU."""
    return 0 if device.type == "cuda" else _status("RssFile")


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines.get(field, "0 kB").split()[0]) * 1024


def _highest() -> int:
    """The highest resident size ever, where the kernel cannot forget it: bytes on macOS, kilobytes elsewhere."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
