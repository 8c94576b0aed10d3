"""Collects the results of the stages: trained weights go back into the model, records and reports become the Result."""

from __future__ import annotations

from dataclasses import replace

from delock.partition.stages import stages
from delock.records import Result, Started
from delock.run.job import StageResult
from delock.run.request import Request
from delock.stage.loading import load_module


def collect(request: Request, started: Started, results: list[StageResult]) -> Result:
    """Loads the weights of all stages into the request's model and heads, and returns the Result. The results lose theirs on the way."""
    if request.simulation.emulate is None:  # emulated stages have learned nothing
        _load(request, started.cuts, results)
    last = results[-1]
    seconds = max(result.seconds for result in results)  # the lower stages are the last to be done
    return Result(
        started=started,
        losses=last.losses,
        evaluations=last.evaluations,
        stages=[result.report for result in results],
        seconds=seconds,
        samples_per_second=last.samples / seconds if seconds > 0 else 0.0,
        samples=last.samples,
        spans=tuple(tuple(result.spans) for result in results),
    )


def _load(request: Request, cuts: tuple[int | str, ...], results: list[StageResult]) -> None:
    """Loads one stage after the other, and lets go of its weights, which may be read from a file as they are used."""
    given = request.heads if request.heads is not None and not isinstance(request.heads, str) else ()
    heads = dict(zip(request.method.headed(len(results)), given, strict=True)) if given else {}
    for k, module in enumerate(stages(request.network.layers(), cuts)):
        load_module(module, results[k].state, results[k].volatile["module"], f"module of stage {k}")
        if k in heads:
            load_module(heads[k], results[k].head, results[k].volatile["head"], f"head of stage {k}")
        results[k] = replace(results[k], state={}, head={}, volatile={})
