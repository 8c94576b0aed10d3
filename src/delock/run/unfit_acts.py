"""Refuses callbacks and schedules that act on evaluations or on weights, in a run where they could not."""

from __future__ import annotations

from delock.engine.agreement import reach
from delock.errors import UsageError
from delock.methods import Method
from delock.optim.rates import monitor_of
from delock.options import EMA, KeepBest, monitored
from delock.run.checks import refuse_unknown_measure
from delock.run.request import Request


def refuse_unfit_acts(request: Request) -> None:
    """Raises UsageError for what acts on evaluations in a run without them, or in one whose stages have no common order."""
    monitors, simulation = _monitors(request), request.simulation
    beside = {"captured": request.execution.captured, "emulate": simulation.emulate, "replay": simulation.replay is not None}
    for what, _ in monitors:
        if not request.method.planned:
            raise UsageError(f"{what} needs stages that keep one order, but those of {request.method.name} run freely: leave it out")
        for name, given in beside.items():
            if given:
                raise UsageError(f"{what} does not go with {name}: leave one of them out")
    _refuse_two_ends(request)
    for what, monitor in monitors:
        if monitor and request.test is None:
            raise UsageError(f"{what} acts on evaluations, but there is no test data: give it, or leave {what} out")
        if monitor:
            refuse_unknown_measure(request, monitored(monitor)[0], f"{what} goes by")


def refuse_unfit_pace(request: Request, method: Method, K: int) -> None:
    """Raises UsageError if evaluations follow each other so closely that one could not act at the next."""
    what = next((what for what, monitor in _monitors(request) if monitor), "")
    if not what:
        return
    least, every = reach(method, K) + 1, request.length().every
    if every < least:
        raise UsageError(
            f"eval_every is {every}, but {what} acts at an evaluation on what the one before has measured, and in {K} stages of "
            f"{method.name} that is known {least} batches later: evaluate every {least} batches, or less often"
        )


def refuse_restaged_acts(request: Request) -> None:
    """Raises UsageError for what acts in a run that goes on in other stages."""
    for what, _ in _monitors(request):
        raise UsageError(f"{what} goes on only in the stages of the checkpoint: use the same stages and cuts, or leave it out")


def _refuse_two_ends(request: Request) -> None:
    """Raises UsageError for callbacks of which each would put other weights into the model."""
    averages = [one for one in request.callbacks if isinstance(one, EMA)]
    bests = [one for one in request.callbacks if isinstance(one, KeepBest)]
    for own in (averages, bests):
        if len(own) > 1:
            raise UsageError(f"callbacks holds {len(own)} of {type(own[0]).__name__}, and the model can have the weights of one: leave one")
    if bests and averages and not averages[0].evaluate:
        raise UsageError("KeepBest and EMA both put weights into the model, and no evaluation sees those of EMA: let it evaluate them")


def _monitors(request: Request) -> list[tuple[str, str]]:
    """Returns what callbacks and the schedule are called, each with the measure that it goes by; "" for an average, which goes by none."""
    found = [(type(one).__name__, "" if isinstance(one, EMA) else one.monitor) for one in request.callbacks]
    monitor = monitor_of(request.schedule)
    return [*found, *([("a schedule of evaluations", monitor)] if monitor else [])]
