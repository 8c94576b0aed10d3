"""Loads torch, which takes seconds: in the server of the stages' processes, and in this process at the same time."""

from __future__ import annotations

from delock.cli.config import TrainConfig
from delock.cli.ranks import ranks

STAGES = ("delock.run.ranks", "delock.nets", "delock.recipes")  # what a stage's process needs


def start_server(config: TrainConfig) -> None:
    """Starts the server of the stages' processes, if there will be any, and returns while it loads torch."""
    if config.machine.workers == "processes" and ranks() is None:
        from delock.launch.context import context

        context(STAGES)


def load_torch() -> None:
    """Imports all modules that a run needs."""
    from delock.launch.collector import uncollected

    with uncollected():
        import delock.api
        import delock.data
        import delock.nets  # noqa: F401
