"""`delock eval`: evaluates the weights of a run, or of one of its checkpoints, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, is_text, shown
from delock.cli.kept_run import Kept, filled, found, named, read_config, weights
from delock.cli.recording import load_data
from delock.cli.tables import metric_text
from delock.cli.terminal import Terminal
from delock.cli.workload import build_model, goals
from delock.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from delock.cli.models.facts import Loaded
    from delock.options import Execution

ABOUT = """Evaluate the weights of a run on its test data, in one process. RUN is the folder of a run, or of a checkpoint.

What travels between stages is not coded here, so with a codec the figures differ from the run's own.

examples:
  delock eval runs/RUN
  delock eval runs/RUN --checkpoint batch-00000500
  delock eval runs/RUN --checkpoint final --device cpu"""


@dataclass(frozen=True)
class EvalOptions:
    """Holds the options of an evaluation."""

    checkpoint: Annotated[str | None, shown("the latest")] = None
    """Name of a checkpoint, or final for the weights at the run's end."""
    device: Annotated[str | None, shown("the run's")] = None
    """cpu, cuda or cuda:1."""


@dataclass(frozen=True)
class EvalConfig:
    """Holds the options of `delock eval`."""

    evaluation: EvalOptions = field(default_factory=EvalOptions)


def run(words: Sequence[str]) -> int:
    """Parses, evaluates, prints a line as a run does, and returns the exit code."""
    path, rest = named(words, "eval")
    options = parse(EvalConfig, rest, "eval RUN", ABOUT).evaluation
    folder, name = found(path, options.checkpoint, "eval")
    config, screen = read_config(folder), Terminal()
    kept = weights(folder, name)
    config = replace(config, machine=replace(config.machine, device=options.device or config.machine.device))
    for note in kept.notes:
        screen.line(note)
    data = load_data(config, screen)
    if data.test is None:
        raise UsageError(f"{config.dataset.data} has no test data to evaluate on: let the function return some")
    measures = measured(config, data, loaded(config, data, kept), kept)
    screen.end()
    epoch = kept.batches / len(data.train) if kept.batches is not None else None
    screen.line(f"{kept.path}: {described(config, epoch, measures)}")
    return 0


def described(config: TrainConfig, epoch: float | None, measures: Mapping[str, float]) -> str:
    """Returns the measures in one line, as a run prints them; "" is the loss."""
    when = [f"epoch {epoch:.4g}"] if epoch is not None else []
    metrics = [metric_text(name, value) for name, value in measures.items() if name]
    return "  ".join([*when, f"test loss {measures['']:.4f}{' nats' if is_text(config) else ''}", *metrics])


def loaded(config: TrainConfig, data: Loaded, kept: Kept) -> nn.Module:
    """Returns the network with the weights. Raises UsageError if they are another network's."""
    return filled(lambda: build_model(config, data), config, kept.path)


def measured(config: TrainConfig, data: Loaded, model: nn.Module, kept: Kept) -> dict[str, float]:
    """Returns the means over the test data, of the loss as "" and of the metrics by name, as a run's evaluation has them.

    Of several test sets they are those of each, as NAME/loss, and "" is the loss of the first.
    """
    from delock.data.call import takes
    from delock.data.iterable import evaluation_loader, train_loader, weigher
    from delock.execution import lay_out_weights
    from delock.launch.rank import backend_for
    from delock.partition.graph.outputs import own_loss
    from delock.run.evaluation import evaluation

    backend_for(config.machine.device, None, 1)
    execution, seed = _execution(config, kept), config.training.seed
    loss, metrics = goals(config, data)
    taken = takes(model, loss=loss is not None)
    train = train_loader(data.train, seed, taken, config.training.batches)
    tests, placed = evaluation_loader(data.test, seed, taken), lay_out_weights(execution, model.to(config.machine.device))
    with _as_a_stage(config.placement.threads):
        found = evaluation(placed, tests, loss or own_loss, metrics, taken, execution, weigher(train))
    return {"": found.loss, **found.metrics}


def _execution(config: TrainConfig, kept: Kept) -> Execution:
    """Returns how the stages computed, uncompiled as their evaluations; a layout "auto" is the one that was faster, where that is known."""
    layout = config.execution.layout
    if layout == "auto":
        layout = kept.manifest.options["layout"] if kept.manifest else "default"
    return replace(config.execution, layout=layout, compile=False)


@contextmanager
def _as_a_stage(threads: int) -> Iterator[None]:
    """Computes with the threads of a stage, on which the last bits of sums depend."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
