"""Collects the results of the stages: trained weights go back into the model, records and reports become the Result."""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import isfinite, isnan

import torch
from torch import nn

from delock.data.iterable import weigher
from delock.data.named_sets import sets_of
from delock.partition.stages import stages
from delock.records import Result, Started
from delock.run.job import StageResult
from delock.run.request import Request
from delock.stage.loading import known, load_module
from delock.tensors import is_floating


def collect(request: Request, started: Started, results: list[StageResult]) -> Result:
    """Loads the weights of all stages into the request's model and heads, and returns the Result. The results lose theirs on the way."""
    if request.simulation.emulate is None:  # emulated stages have learned nothing
        _load(request, started.cuts, results)
    last = results[-1]
    seconds = max(result.seconds for result in results)  # the lower stages are the last to be done
    result = Result(
        started=started,
        losses=last.losses,
        evaluations=last.evaluations,
        stages=[result.report for result in results],
        seconds=seconds,
        samples_per_second=last.samples / seconds if seconds > 0 else 0.0,
        samples=last.samples,
        spans=tuple(tuple(result.spans) for result in results),
        stopped=last.ended,
        best=None if last.best is None else last.evaluations[last.best],
    )
    if request.simulation.emulate is None and (found := _no_numbers(request, result)):
        warnings.warn(f"the run has ended with {found}: lower the learning rate, or take an earlier checkpoint", stacklevel=4)
    elif found := _nothing_counted(request, result):
        warnings.warn(found, stacklevel=4)
    return result


def _nothing_counted(request: Request, result: Result) -> str:
    """Returns in words which data has no mean, as its `Batches` weigh all of it with 0; "" if none is known."""
    if weigher(request.train) and result.losses and all(map(isnan, result.losses)):
        return "nothing counted in training, so no weight has changed: weight(targets) was 0 for every batch"
    if _weighed(request) and result.evaluations and isnan(result.evaluations[-1].test_loss):
        return "the last evaluation has no test loss, as where weight(targets) is 0 for all of the test data"
    return ""


def _weighed(request: Request) -> bool:
    """Returns True if `Batches` say what test data weigh, which may be 0 for all of them."""
    return request.test is not None and any(map(weigher, (request.train, *sets_of(request.test).values())))


def _no_numbers(request: Request, result: Result) -> str:
    """Returns what of a finished run is NaN or infinite; "" if nothing is. Where the loader weighs batches, a loss may be none."""
    bad = [
        f"the weight {name}"
        for name, one in request.network.whole.named_parameters()
        if is_floating(one) and not bool(torch.isfinite(one).all())
    ]
    if bad:
        return f"{bad[0]} NaN or infinite" + (f", and {len(bad) - 1} more" if len(bad) > 1 else "")
    if not result.evaluations or request.test is None or _weighed(request):
        return ""
    last = result.evaluations[-1]
    losses = {"": last.test_loss, **{name: value for name, value in last.metrics.items() if name.endswith("/loss")}}
    return next((f"{name or 'a test loss'} of {value}" for name, value in losses.items() if not isfinite(value)), "")


def _load(request: Request, cuts: tuple[int | str, ...], results: list[StageResult]) -> None:
    """Loads one stage after the other, and lets go of its weights, which may be read from a file as they are used.

    The loss comes first: it may hold the model, with the weights from before the run.
    """
    last = results[-1]
    if isinstance(request.loss, nn.Module):
        # what the loss has made in its first call stays where it is
        own = known(request.loss)
        state, rest = ({name: one for name, one in part.items() if name in own} for part in (last.loss, last.volatile["loss"]))
        load_module(request.loss, state, rest, "loss")
    given = request.heads if request.heads is not None and not isinstance(request.heads, str) else ()
    heads = dict(zip(request.method.headed(len(results)), given, strict=True)) if given else {}
    for k, module in enumerate(stages(request.network.layers(), cuts)):
        load_module(module, results[k].state, results[k].volatile["module"], f"module of stage {k}")
        if k in heads:
            load_module(heads[k], results[k].head, results[k].volatile["head"], f"head of stage {k}")
        results[k] = replace(results[k], state={}, head={}, loss={}, volatile={})
