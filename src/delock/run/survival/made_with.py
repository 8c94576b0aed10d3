"""Names what the last bits of a result may depend on beside a run's options: torch, threads, and the kind of processor."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def made_with(device: torch.device) -> dict[str, str | int]:
    """Returns it, for a manifest; the threads are those of the caller."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device.type, "processor": kind}


def _processor() -> str:
    """Returns the processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
