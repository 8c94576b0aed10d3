"""Evaluates a model in this process, with the rules by which `fit` reads batches, and with the bits of its evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from delock.data.call import Call, Takes
from delock.data.iterable import Batches, weigher
from delock.data.loader import Loader, call_of, loaded
from delock.data.named_sets import sets_of
from delock.engine.entering import Entering
from delock.execution import Loss, lay_out_input, precision
from delock.options import Execution
from delock.records import Evaluation
from delock.run.history import measured
from delock.run.own_loop.results import Measured, evaluation_of
from delock.run.request import Metric
from delock.tensors import Value, like, tensors


def evaluation(
    model: nn.Module,
    tests: Loader,
    loss: Loss,
    metrics: Mapping[str, Metric],
    taken: Takes,
    execution: Execution,
    weights: Batches | None = None,
) -> Evaluation:
    """Returns the means of loss and metrics over the data. weights: what weighs batches that do not say it themselves."""
    device = next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    entering, measures, found = Entering(weights, 1, device), {"": loss, **metrics}, dict[str, list[Measured]]()
    with _evaluating(model), torch.no_grad(), precision(execution, device):
        for name, test in sets_of(tests).items():
            found[name] = []
            for batch in loaded(test, 0):
                message = entering.evaluated(batch, weigher(test))
                if message.count:
                    outputs = _outputs(model, message.values, call_of(test), taken, execution)
                    own = {one: measured(one, measure, outputs, message.targets) for one, measure in measures.items()}
                    found[name].append((own, message.count, message.samples))
    return evaluation_of(found)


def _outputs(model: nn.Module, values: Value, call: Call | None, taken: Takes, execution: Execution) -> Any:
    """Returns what the model returns; it may write to its arguments, which are copies."""
    entered = [lay_out_input(execution, one.clone()) for one in tensors(values)]
    if taken.chain:
        return model(like(values, entered))
    args, named = (call or Call()).arguments(entered)
    return model(*args, **named)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode within the block."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
