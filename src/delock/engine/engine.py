"""Executes a plan over stages and links: all stages in this process, or one stage of many processes."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from delock.checkpoints.encoding import copied
from delock.engine.agreement import Agreement
from delock.engine.clipping import NetworkNorm
from delock.engine.log import OpTime, StageLog, kind_of
from delock.errors import DelockError, NonFinite, StageFailed, is_users_own
from delock.launch.progress import Progress
from delock.links import Link, Message, MessageKind, MessageName, resumable
from delock.links.message import as_values
from delock.links.recorder import Record
from delock.ops import Backward, Evaluate, Forward, Update, label
from delock.plan import Plan, Step, needs_error, walk
from delock.stage import InFlight, Stage, checkpoint
from delock.timeline import Slowdown


def spin(seconds: float) -> None:
    """Keeps the core busy for that time, as more to compute would."""
    until = perf_counter() + seconds
    while perf_counter() < until:
        pass


class Engine:
    """One stage at work: executes its steps in order over a link.

    feed: answers the Forwards and Evaluates of stage 0.
    progress: takes the op's name and description before every op.
    micro_batches: of a batch, for error messages.
    on_loss: called with (step, loss, stage, the batch in flight) where a loss is computed.
    on_output: called with (step, outputs with labels) on the last stage, for every batch of an evaluation.
    slow: the ticks in which the stage takes longer; delay(seconds) lets that time pass.
    Between two windows `state()` holds everything.
    """

    def __init__(
        self,
        stage: Stage,
        link: Link,
        *,
        feed: Callable[[Forward | Evaluate], Message] | None = None,
        log: StageLog | None = None,
        progress: Progress | None = None,
        micro_batches: int = 1,
        on_loss: Callable[[Step, float, Stage, InFlight], None] | None = None,
        on_output: Callable[[Step, Message], None] | None = None,
        slow: Slowdown | None = None,
        delay: Callable[[float], None] = spin,
    ) -> None:
        self.stage, self.link, self.feed, self.progress = stage, link, feed, progress
        self.log, self.micro_batches = log or StageLog(), micro_batches
        self.on_loss, self.on_output = on_loss, on_output
        self.slow, self.delay = slow, delay
        self.spent = OpTime()
        self.network_norm = NetworkNorm(stage.k, stage.K)
        self.in_flight: Counter[int] = Counter()  # by neighbour: messages sent in the windows so far, and not yet received
        self.window: Plan | None = None  # that is being executed
        self.done = 0  # steps of it
        self.agreement: Agreement | None = None
        self.on_evaluation: Callable[[Step], None] | None = None  # called in front of every Evaluate

    def run(self, plan: Plan, *, again: bool = False) -> None:
        """Executes this stage's column of a plan, or of a window of one. again: steps of this window are done, which was longer."""
        for step in self.enter(plan, again=again):
            self.execute(step)
        self.count_in_flight(plan)

    def enter(self, plan: Plan, *, again: bool = False) -> tuple[Step, ...]:
        """Begins with a window, or goes on in it; returns the steps that are left to do."""
        self.window, self.done = plan, self.done if again else 0
        return plan.columns[self.stage.k][self.done :]

    def execute(self, step: Step) -> None:
        """Executes one step: waits for what it needs, computes, sends what it gives."""
        if self.agreement:
            self.agreement.reached(step)
        if self.on_evaluation and isinstance(step.op, Evaluate):
            self.on_evaluation(step)
        if self.progress:
            self.progress.at(label(step.op), describe(step, self.micro_batches))
        version, start, self.spent = self.stage.version, perf_counter(), OpTime()
        match step.op:
            case Forward() as op:
                self._forward(step, op)
            case Evaluate() as op:
                self._evaluate(step, op)
            case Backward() as op:
                self._backward(step, op)
            case Update() as op:
                self._update(step, op)
        self.log.op(self.stage.k, step, version, start, perf_counter(), self.spent)
        self.done += 1

    def _forward(self, step: Step, op: Forward) -> None:
        message = self._input(op, MessageKind.ACTIVATION, op.batch if op.source is None else op.source)
        if self.agreement:
            message = self.agreement.heard(step, message)
        began = perf_counter()
        outputs = self.stage.forward(step, message)
        self._straggle(step, began)
        if step.up:
            self.send(self.stage.k + 1, MessageName(MessageKind.ACTIVATION, op.batch), outputs)

    def _evaluate(self, step: Step, op: Evaluate) -> None:
        message = self._input(op, MessageKind.EVALUATION, op.batch)
        began = perf_counter()
        outputs = self.stage.evaluate(message)
        self._straggle(step, began)
        if step.up:
            self.send(self.stage.k + 1, MessageName(MessageKind.EVALUATION, op.batch), outputs)
        elif self.on_output:
            self.on_output(step, outputs)

    def _input(self, op: Forward | Evaluate, kind: MessageKind, batch: int) -> Message:
        if self.stage.k > 0:
            return self._take(self.stage.k - 1, MessageName(kind, batch))
        assert self.feed is not None
        return self.feed(op)

    def _straggle(self, step: Step, began: float) -> None:
        """Lets what has been computed since `began` take longer, in a slow tick."""
        if self.slow and (extra := self.slow.extra(step.tick, self.stage.k)):
            self.delay(extra * (perf_counter() - began))

    def _backward(self, step: Step, op: Backward) -> None:
        k, stage = self.stage.k, self.stage
        began = perf_counter()
        stage.prepare(step)  # a replay runs while the error is under way
        self._straggle(step, began)
        error = self._take(k + 1, MessageName(MessageKind.ERROR, op.batch, op.loss)) if needs_error(k, op) else None
        began = perf_counter()
        done = stage.backward(step, error)
        self._straggle(step, began)
        if done.error is not None:
            self.send(k - 1, MessageName(MessageKind.ERROR, op.batch, op.loss), done.error)
        if step.sends_norms:
            self.network_norm.pass_down(stage.version, stage.gradient_norms(), self)
        if step.last and done.message.values is not None:  # an empty part has no gradient that could be old
            self.log.count_staleness(stage.version - done.version, step.slot - done.slot)
        if done.loss is not None:
            self.check_loss(step, op, done.loss, done.batch)

    def _update(self, step: Step, op: Update) -> None:
        norm = self.network_norm.pass_up(op.number, self) if op.over == "network" else None
        began = perf_counter()
        self.stage.update(op, norm, step.banks)
        self._straggle(step, began)

    def check_loss(self, step: Step, op: Backward, loss: Tensor, held: InFlight) -> None:
        """Reports a loss that this stage has computed. Raises NonFinite for one that is no number."""
        value = loss.item()
        if not math.isfinite(value):
            version, (batch, part) = self.stage.version, divmod(op.batch, self.micro_batches)
            which = f"batch {batch}" + (f" (micro-batch {op.batch})" if self.micro_batches > 1 else "")
            what = f"the loss of {which} became {value} at stage {self.stage.k}, after {version} update{'s' if version != 1 else ''}"
            raise NonFinite(what, batch=batch, part=part, parts=self.micro_batches, updates=version)
        if self.on_loss:
            self.on_loss(step, value, self.stage, held)

    def receive(self, source: int, name: MessageName) -> Message:
        """Receives a message; the wait for it and its decoding count as time of the op under way."""
        asked, decoding = perf_counter(), self.link.decoding
        message = self.link.receive(source, name)
        copied = self.link.decoding - decoding
        self.spent.waited += perf_counter() - asked - copied
        self.spent.copied += copied
        return message

    def send(self, to: int, name: MessageName, message: Message) -> None:
        """Sends a message; packing it, and the wait for room in the link, count as time of the op under way."""
        asked = perf_counter()
        full = self.link.send(to, name, message)
        self.spent.waited += full
        self.spent.full += full
        self.spent.copied += perf_counter() - asked - full

    def _take(self, source: int, name: MessageName) -> Message:
        """Receives a message that a window may leave in flight; the norms of an Update are sent and received within its tick."""
        self.in_flight[source] -= 1
        return self.receive(source, name)

    # ---- saving messages in flight -------------------------------------------------------------------------------------------------

    def count_in_flight(self, plan: Plan) -> None:
        """Counts the messages that the neighbours send in a window that has been executed; those received were counted as they came."""
        self.window = None
        self.in_flight.update(self.sent_before(plan, math.inf))

    def sent_before(self, plan: Plan, tick: float) -> dict[int, int]:
        """Returns, by neighbour, the messages that it sends to this stage in a window before a tick."""
        k = self.stage.k
        near = {source: plan.columns[source] for source in (k - 1, k + 1) if 0 <= source < plan.K}
        return {source: sum(step.up if source < k else step.down for step in column if step.tick < tick) for source, column in near.items()}

    def state(self) -> dict[str, Any]:
        """Returns the stage and the messages in flight to it, as plain values and tensors, between two windows.

        All stages of a run must be asked at the same tick.
        """
        link = resumable(self.link)
        in_flight = {source: list(map(_values, link.pull(source, count))) for source, count in self.in_flight.items()}
        return {"stage": checkpoint.state(self.stage), "in_flight": in_flight, "link": link.state()}

    def set_aside(self) -> dict[int, list[tuple[MessageName, Message]]]:
        """Takes the messages in flight to this stage out of the way, between two windows, until they are put back."""
        return {source: resumable(self.link).take(source, count) for source, count in self.in_flight.items()}

    def put_back(self, messages: Mapping[int, list[tuple[MessageName, Message]]]) -> None:
        """Lets the messages that were set aside come next."""
        for source, ahead in messages.items():
            resumable(self.link).push(source, ahead)

    def record(self, tick: int) -> Recorded:
        """Copies the stage as it is, before its first step at this tick or behind it; messages under way are recorded as they come."""
        more = self.sent_before(self.window, tick) if self.window else {}
        late = resumable(self.link).recorder.start(
            {source: self.in_flight[source] + more.get(source, 0) for source in {*self.in_flight, *more}}
        )
        return Recorded(self.copy(), late)

    def copy(self) -> dict[str, Any]:
        """Returns a copy of the stage and of its end of the links as they are, without messages under way."""
        state, lasting = checkpoint.recorded(self.stage)
        found: dict[str, Any] = copied({"stage": state, "link": self.link.state()}, f"stage {self.stage.k}", lasting)
        return found

    def halt(self, tick: int) -> dict[str, Any]:
        """Returns a copy of `state()` of a stage that ends before its first step at this tick, in the midst of a window.

        It waits for messages under way; all stages must end there.
        """
        assert self.window is not None
        self.in_flight.update(self.sent_before(self.window, tick))
        found: dict[str, Any] = copied(self.state(), f"stage {self.stage.k}")
        return found

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`, before the first window."""
        checkpoint.load(self.stage, state["stage"])
        self.link.load(state["link"])
        for source, messages in state["in_flight"].items():
            self.in_flight[source] = len(messages)
            resumable(self.link).push(
                source, [(MessageName(MessageKind(kind), *rest), Message(**values)) for (kind, *rest), values in messages]
            )


@dataclass(frozen=True)
class Recorded:
    """Holds what `Engine.record` has copied."""

    copy: dict[str, Any]
    late: Record

    def state(self) -> dict[str, Any]:
        """Returns the same as `Engine.state`, once the last message under way has come."""
        return {**self.copy, "in_flight": {k: list(map(_values, own)) for k, own in self.late.found.items()}}


def _values(named: tuple[MessageName, Message]) -> tuple[list[int], dict[str, Any]]:
    """Returns a message and its name as plain values and tensors."""
    return [int(one) for one in named[0]], as_values(named[1])


def describe(step: Step, micro_batches: int) -> str:
    """Returns an op in words, for errors: "backward of batch 3, tick 5"; `micro_batches`: of a batch."""
    match step.op:
        case Evaluate(batch):
            what = f"evaluation, batch {batch}"
        case Forward(batch) | Backward(batch):
            what = f"{kind_of(step)} of {f'micro-batch {batch}, batch {batch // micro_batches}' if micro_batches > 1 else f'batch {batch}'}"
        case Update():
            what = "update"
    return f"{what}, tick {step.tick}"


def run_here(plan: Plan, engines: Sequence[Engine], *, again: bool = False) -> None:
    """Executes a plan, or a window of one, over all stages in this process. Raises StageFailed when a stage raises.

    again: they have done steps of this window, which was a longer one.
    What the user's data, metrics, schedule or a callback raise comes out as it is.
    """
    left = tuple(engine.enter(plan, again=again) for engine in engines)
    for k, step in walk(Plan(left)):
        try:
            engines[k].execute(step)
        except DelockError:
            raise
        except Exception as error:
            if is_users_own(error):
                raise
            trace = "".join(traceback.format_exception(error))
            what = "".join(traceback.format_exception_only(error)).strip()
            raise StageFailed(
                f"stage {k} failed in {label(step.op)} ({describe(step, engines[k].micro_batches)}): {what}\n\n{trace}"
            ) from error
    for engine in engines:
        engine.count_in_flight(plan)
