"""What stands in for the arithmetic of a stage, and which stages are slow, as the command line writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from delock.errors import UsageError
from delock.timeline.costs import Slowdown

NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"


@dataclass(frozen=True, slots=True)
class Emulation:
    """Every stage waits instead of computing: seconds per batch, each by a share of at most `jitter` longer or shorter."""

    forward: float
    backward: float
    jitter: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Emulation:
        """320:640 or 320:640:0.1, in milliseconds. Raises UsageError for anything else."""
        match = re.fullmatch(rf"{NUMBER}:{NUMBER}(?::{NUMBER})?", text)
        if not match or float(match[3] or 0) >= 1 or float(match[1]) + float(match[2]) <= 0:
            raise UsageError(f"emulate is {text!r}, but it must be F:B or F:B:JITTER, milliseconds and a share below 1: 320:640:0.1")
        return cls(float(match[1]) / 1e3, float(match[2]) / 1e3, float(match[3] or 0))


def straggler(text: str, K: int, seed: int) -> Slowdown:
    """1:0.5, stage 1 always takes half as long again; random:0.5, every stage does in a tick with probability 1/K.

    Raises UsageError for anything else.
    """
    match = re.fullmatch(rf"(\d+|random):{NUMBER}", text)
    if not match:
        raise UsageError(f"straggle is {text!r}, but it must be STAGE:S or random:S, such as 1:0.5: S is by how much a slow tick is longer")
    if match[1] == "random":
        return Slowdown(float(match[2]), 1 / K, seed=seed)
    if int(match[1]) >= K:
        raise UsageError(f"straggle is {text!r}, but the stages are 0 .. {K - 1}")
    return Slowdown(float(match[2]), victim=int(match[1]), seed=seed)
