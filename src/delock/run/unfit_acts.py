"""Refuses callbacks and schedules that act on evaluations, in a run where they could not."""

from __future__ import annotations

from delock.engine.agreement import reach
from delock.errors import UsageError
from delock.methods import Method
from delock.optim.rates import monitor_of
from delock.options import monitored
from delock.run.checks import refuse_unknown_measure
from delock.run.request import Request


def refuse_unfit_acts(request: Request) -> None:
    """Raises UsageError for what acts on evaluations in a run without them, or in one whose stages have no common order."""
    if not (what := acting(request)):
        return
    if request.test is None:
        raise UsageError(f"{what} acts on evaluations, but there is no test data: give it, or leave {what} out")
    if not request.method.planned:
        raise UsageError(f"{what} acts at the same batch on every stage, but the stages of {request.method.name} run freely: leave it out")
    for name, given in {
        "captured": request.execution.captured,
        "emulate": request.simulation.emulate,
        "replay": request.simulation.replay is not None,
    }.items():
        if given:
            raise UsageError(f"{what} does not go with {name}: leave one of them out")
    for monitor in (*(one.monitor for one in request.callbacks), monitor_of(request.schedule) or "min:loss"):
        refuse_unknown_measure(request, monitored(monitor)[0], f"{what} goes by")


def refuse_unfit_pace(request: Request, method: Method, K: int) -> None:
    """Raises UsageError if evaluations follow each other so closely that one could not act at the next."""
    least, every = reach(method, K) + 1, request.length().every
    if (what := acting(request)) and every < least:
        raise UsageError(
            f"eval_every is {every}, but {what} acts at an evaluation on what the one before has measured, and in {K} stages of "
            f"{method.name} that is known {least} batches later: evaluate every {least} batches, or less often"
        )


def refuse_restaged_acts(request: Request) -> None:
    """Raises UsageError for what acts on evaluations in a run that goes on in other stages."""
    if what := acting(request):
        raise UsageError(f"{what} goes on only in the stages of the checkpoint: use the same stages and cuts, or leave it out")


def acting(request: Request) -> str:
    """Returns the name of what acts on evaluations; "" if nothing does."""
    if request.callbacks:
        return type(request.callbacks[0]).__name__
    return "a schedule of evaluations" if monitor_of(request.schedule) else ""
