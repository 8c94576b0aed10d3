"""Loads torch, which takes seconds: in the server of the stages' processes, and in this process at the same time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import MappingProxyType

from delock.cli.models.names import HF, TIMM, TORCHVISION
from delock.cli.ranks import ranks

STAGES = ("delock.run.ranks", "delock.nets", "delock.recipes")  # what a stage's process needs
ELSEWHERE = MappingProxyType(
    {TORCHVISION: "torchvision.models", TIMM: "timm", HF: "transformers.modeling_outputs"}
)  # and these models' too


def start_server(words: Sequence[str]) -> None:
    """Starts the server of the stages' processes and returns while it loads torch; reading the words takes a while, too.

    It does nothing if they say that there will be no such processes; if a file says so, the server ends unused with this program.
    """
    if ranks() is None and not set(words) & {"inline", "--workers=inline", "-h", "--help"}:
        from delock.launch.context import context

        named = [word.removeprefix("--model=") for word in words]
        context([*STAGES, *(module for family, module in ELSEWHERE.items() if any(name.startswith(family) for name in named))])


def load_torch() -> None:
    """Imports all modules that a run needs."""
    from delock.launch.collector import uncollected

    with uncollected():
        import delock.api
        import delock.data
        import delock.nets  # noqa: F401

        gc.freeze()  # they are not searched later either
