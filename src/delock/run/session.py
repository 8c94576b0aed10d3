"""A session: a run whose batches come from the user's own loop, one after the other, for as long as it likes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from delock.data.handed import Handed
from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch, Loader, loaded
from delock.data.named_sets import sets_of
from delock.engine.entering import refuse_empty
from delock.errors import NonFinite, UsageError, said, users_own
from delock.launch.ambient import refuse_autocast, refuse_inference
from delock.launch.context import context
from delock.records import BatchResult, Evaluation, Result, Started
from delock.run.collect import collect
from delock.run.in_use import trained_alone
from delock.run.job import StageResult
from delock.run.nonfinite import explained
from delock.run.own_loop.apart import StagesApart
from delock.run.own_loop.here import StagesHere
from delock.run.own_loop.results import Measured, evaluation_of
from delock.run.own_loop.turns import LoopedJob
from delock.run.prepare import prepare
from delock.run.prepared import PreparedRun
from delock.run.request import Request
from delock.run.survival.resume import Begin, find, held
from delock.stage.loading import Held, load_module, snapshot


class Session:
    """Trains a network on the batches that `step` is given, between `with` and the end of its block; made by `delock.session`.

    Behind the block the model holds the trained weights, and `result` what `fit` returns. After an exception in the block the model is as
    it was before. No process is left in either case.
    """

    def __init__(self, request: Request, reads: Handed) -> None:
        self.request, self.reads = request, reads
        self.result: Result | None = None
        self.number = 0  # of the next batch
        self.open = False  # batches are in flight, or may be
        self._stages: StagesHere | StagesApart | None = None
        self._prepared: PreparedRun | None = None
        self._started: Started | None = None
        self._why = ""  # it is over, after an error
        self._held = ExitStack()  # the model, and the folder of checkpoints

    def __enter__(self) -> Self:
        """Measures the network on the example batch, cuts it, and starts the stages. Raises UsageError for what does not fit."""
        if self._prepared:
            raise UsageError("a session can be entered once: make another one with delock.session")
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def _start(self) -> None:
        self._held.enter_context(trained_alone(self.request.network.whole))
        begin = self._begin()
        if self.request.workers == "processes":
            context([StagesApart.__module__])  # its server loads while the network is measured
        prepared = self._prepared = prepare(self.request, begin)
        if begin and begin.restages(prepared.places):
            raise UsageError("a session goes on in the stages that it was saved in: give it the same cuts, and as many stages")
        self._started = prepared.started()
        show = self.request.network.on_output(_outputs)
        jobs = [LoopedJob(job, show) for job in prepared.jobs()]
        with self._told():
            if self.request.workers == "inline":
                self._stages = StagesHere(jobs, torch.device(self.request.device))
            else:
                self._stages = StagesApart(jobs, self.request.placement, self.request.device, prepared.patience())
            self.open = begin is not None and not all(self._stages.ask("drained"))

    def _begin(self) -> Begin | None:
        """Returns the checkpoint that the session goes on from; its folder is this session's from now on."""
        options = self.request.checkpoint
        if options is None:
            return None
        begin, _ = find(options)
        self._held.enter_context(held(options))
        if begin:
            self.number = begin.manifest.batches
        return begin

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Lets what is in flight arrive, and puts the trained weights into the model; after an exception it only ends the stages."""
        try:
            if error is None and self._stages:
                self.drain()
                self._collect()
        finally:
            self._stop()

    # ---- training ------------------------------------------------------------------------------------------------------------------

    def step(self, batch: Any, *, outputs: bool = False, wait: bool = False) -> list[BatchResult]:
        """Hands in the next batch, of the form of the example batch, and returns the results of batches that have come by now.

        With a delayed method, or in processes, these are earlier batches, and there may be none. outputs: the result of this batch has the
        outputs of the model, too. wait: waits for all results that need no later batch; then they do not depend on timing. Blocks
        when the pipeline is full. What is in the batch may be written to afterwards. Raises what `fit` raises.
        """
        stages = self._training("step")
        read = self.reads.one(batch, self.number)
        refuse_empty(self.number, read.samples)
        with self._told():
            self.open, self.number = True, self.number + 1
            stages.batch(read, outputs, wait)
            return stages.taken()

    def drain(self) -> list[BatchResult]:
        """Does all that is left to do for the batches so far, every update included, and returns the results that had not come.

        The batches behind it begin with an empty pipeline.
        """
        stages = self._training("drain")
        with self._told():
            if self.open:
                stages.rest()
            self.open = False
            return stages.taken()

    def evaluate(self, batches: Any) -> Evaluation:
        """Evaluates the network on `batches`, as `fit` takes test data, with the weights that its stages have now.

        Nothing in flight is lost, and no batch is waited for. Updates that its batches are still to bring are not in these weights: after
        `drain` they are.
        """
        refuse_autocast("evaluate", self.request.device)
        running, judged = self._running(), dict[str, list[Measured]]()
        once = list(batches) if isinstance(batches, Iterator) else batches
        for name, test in sets_of(self.reads.tests(once)).items():
            try:
                for batch in _weighed(test):
                    with self._told():
                        running.judge(batch)
            finally:  # data that raises does not end the session
                if self._stages:
                    with self._told():
                        judged[name] = running.judged()
        return evaluation_of(judged)

    @property
    def lr(self) -> float:
        """The learning rate of the coming update: that of the first parameter group of the first stage that learns.

        When it is set, all groups of all stages get rates in the proportions in which they were made. Raises UsageError for what is no
        rate, beside a schedule, and where this first rate was made 0.
        """
        return self._rates(None)[0][1]

    @lr.setter
    def lr(self, value: float) -> None:
        if self.request.schedule is not None:
            raise UsageError("the schedule sets the learning rate: leave it out of the session to set lr in the loop")
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise UsageError(f"lr is {value!r}, but it must be a number, 0 or more")
        made = self._rates(None)[0][0]
        if not made:
            raise UsageError("the first parameter group was made with a rate of 0, so the others have no proportion to it: give it another")
        self._rates((float(value), made))

    def _rates(self, change: tuple[float, float] | None) -> list[tuple[float, float]]:
        running = self._running()
        with self._told():
            found: list[tuple[float, float]] = running.ask("rate", change)
        return found

    # ---- weights -------------------------------------------------------------------------------------------------------------------

    def state_dict(self, *, average: bool = False) -> dict[str, Any]:
        """Returns a copy of the weights as the stages have them now, by the names of the model's own `state_dict`.

        average: of their moving average, which `callbacks=[delock.EMA()]` keeps, and of buffers as they are. Raises UsageError without it.
        """
        if average and not self.request.callbacks:
            raise UsageError("the session keeps no average of its weights: give it callbacks=[delock.EMA()]")
        running = self._running()
        with self._told():
            own = running.ask("weights", average)
        before = self._exchanged(own)
        try:
            found = {name: one.clone() if isinstance(one, Tensor) else one for name, one in self.request.network.whole.state_dict().items()}
        finally:
            self._exchanged(before)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the stages have the weights of a `state_dict` of the model, with which an average begins anew.

        Nothing may be in flight: call `drain` before it.
        """
        running = self._training("load_state_dict")
        if self.open:
            raise UsageError("batches are in flight, which have been computed with other weights: call drain() before load_state_dict()")
        with self._told():
            now = running.ask("weights", False)
        before = self._exchanged(now)  # what the state does not say stays as the stages have it
        try:
            self.request.network.whole.load_state_dict(state)
            own = self._exchanged(before)
        except BaseException:
            self._exchanged(before)
            raise
        with self._told():
            running.load(own)

    def save(self) -> Path:
        """Writes a checkpoint of all stages with what is in flight, and returns its folder. No batch is waited for.

        A session with `checkpoint=delock.Checkpoint(FOLDER, resume="newest")` goes on from it, bit for bit, at the batch `number`. Raises
        UsageError if it cannot be written; the session goes on then.
        """
        if self.request.checkpoint is None:
            raise UsageError("the session has no folder for checkpoints: give it checkpoint=delock.Checkpoint(FOLDER)")
        running = self._running()
        with self._told():
            found = running.ask("save")
        if problems := [one.problem for one in found if one.problem]:
            raise UsageError(f"the checkpoint could not be written: {problems[0]}")
        return Path(found[-1].path)

    def _exchanged(self, weights: list[Held] | None) -> list[Held]:
        """Lets the model have the weights of stages, if there are any, and returns copies of those that it had."""
        assert self._prepared
        before = [snapshot(module) for module in self._prepared.modules]
        for k, (module, own) in enumerate(zip(self._prepared.modules, weights or (), strict=False)):
            load_module(module, *own, f"module of stage {k}")
        return before

    # ---- the stages ----------------------------------------------------------------------------------------------------------------

    def _running(self) -> StagesHere | StagesApart:
        if self._stages is None and self._prepared:
            raise UsageError(f"the session is over{self._why}: make another one with delock.session")
        if self._stages is None:
            raise UsageError("the session has not begun: use it in a block, with delock.session(...) as session:")
        return self._stages

    def _training(self, what: str) -> StagesHere | StagesApart:
        """Returns the stages for something that changes weights. Raises UsageError in a mode of torch that not all of them would have."""
        running = self._running()
        refuse_inference(what)
        refuse_autocast(what, self.request.device)
        return running

    def _collect(self) -> None:
        assert self._stages
        assert self._started
        with self._told():
            results: list[StageResult] = self._stages.end()
        self.result = collect(self.request, replace(self._started, batches=self.number, epochs=0.0), results)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Ends the stages if one of them fails within the block, and says what may be the cause."""
        try:
            yield
        except BaseException as error:
            self._stop()
            self._why = f", because of an error: {said(error)}"
            if isinstance(error, NonFinite):
                with explained(self.request):  # the batch cannot be read again
                    raise NonFinite(str(error), part=error.part, parts=error.parts, updates=error.updates) from None
            raise

    def _stop(self) -> None:
        if self._stages:
            self._stages.stop()
        self._stages = None
        self._held.close()


def _outputs(outputs: Any, targets: Any) -> Any:
    """Returns the outputs, as a measure of them."""
    return outputs


def _weighed(test: Loader) -> Iterator[LoadedBatch]:
    """Yields the batches of test data."""
    if weigher(test):
        raise UsageError("test data of a session is weighed as its training data is: leave weight out of its Batches")
    with users_own("the test data"):
        yield from loaded(test, 0)
