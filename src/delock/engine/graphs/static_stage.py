"""One stage on static memory: its ops read from slots, and what an op changes can be put back where the op should not have happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from delock.engine.graphs.sgd import CapturedSGD
from delock.engine.graphs.static_messages import StaticMessages
from delock.errors import UsageError
from delock.links.message import Message
from delock.ops import Backward, Update
from delock.plan import Step
from delock.stage import Stage


class StaticStage:
    """A stage with the slots that it reads, its accumulated gradients, and its latest loss; `group`: batches of an Update.

    The stage's schedule is taken over: it is stepped between ticks, on the host.
    """

    def __init__(self, stage: Stage, group: int) -> None:
        self.stage, self.group = stage, group
        self.inputs, self.errors = StaticMessages(), StaticMessages()
        self.loss: Tensor | None = None  # of the latest batch, where this stage computes one
        self.held: list[Tensor | None] = [None] * len(stage.learner.weights)  # gradients of a group that is not complete
        self.schedule, stage.learner.schedule = stage.learner.schedule, None
        for body in (stage.body, stage.head):
            if body is not None:
                body.seeded = False
        self.first = [t.detach().clone() for t in (*self._weights(), *self._buffers())]

    # ---- what is recorded ----------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, slot: int) -> Message:
        """The outputs for the message in the slot; where the plan wants a snapshot of the weights, every slot has its own."""
        self.stage.snapshot = None
        return self.stage.forward(step, self.inputs.get(slot))

    def backward(self, step: Step, slot: int) -> Message | None:
        """The errors of the message in the slot, if anybody listens; the loss and the gradients of an open group stay in fixed memory."""
        op, learner = step.op, self.stage.learner
        assert isinstance(op, Backward)
        place = slot % self.group
        learner.count = place
        learner.grads = list(self.held) if place else [None] * len(self.held)
        self.stage.prepare(step)
        done = self.stage.backward(step, self.errors.get(slot) if op.loss > self.stage.k else None)
        if done.loss is not None:
            self.loss = done.loss.clone() if self.loss is None else self.loss.copy_(done.loss)
        if place + 1 < self.group:
            self._hold(learner.grads)
        return done.error

    def _hold(self, grads: list[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            held = self.held[i]
            if grad is None:
                continue
            if held is None:
                self.held[i] = held = torch.empty_like(grad)
            held.copy_(grad)

    def update(self, op: Update) -> None:
        """One step of the optimizer. Versions are counted between ticks: a replayed graph counts nothing."""
        version = self.stage.version
        self.stage.update(op)
        self.stage.learner.version = version

    # ---- between ticks -------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Put everything back to what it was before the first op, but for the memory itself."""
        for t, was in zip((*self._weights(), *self._buffers()), self.first, strict=True):
            t.data.copy_(was)
        for momentum in self._momenta():
            momentum.zero_()

    def upload_rates(self) -> None:
        """Bring the learning rates of the coming Update to the device."""
        if isinstance(self.stage.optimizer, CapturedSGD):
            self.stage.optimizer.upload_rates()

    def updated(self) -> None:
        """An Update has taken place: count it, and step the schedule."""
        self.stage.learner.version += 1
        if self.schedule:
            self.schedule.step()
        self.upload_rates()

    @contextmanager
    def without(self, forward: bool, backward: bool) -> Iterator[None]:
        """A tick of which this stage does only a part, at the beginning and the end of a run: undo what the other part changes.

        forward: leave out the Forward, which changes buffers (BatchNorm); backward: the Backward with its Update.
        """
        changed: list[Tensor] = list(self.stage.module.buffers()) if forward else []
        if backward:
            head = self.stage.head.module.buffers() if self.stage.head else ()
            changed += [*self._weights(), *head, *self._momenta(), *(g for g in self.held if g is not None)]
        before = [t.detach().clone() for t in changed]
        yield
        for t, was in zip(changed, before, strict=True):
            t.data.copy_(was)

    def _weights(self) -> list[Tensor]:
        return self.stage.learner.weights

    def _buffers(self) -> list[Tensor]:
        bodies = [body for body in (self.stage.body, self.stage.head) if body is not None]
        return [buffer for body in bodies for buffer in body.module.buffers()]

    def _momenta(self) -> list[Tensor]:
        return self.stage.optimizer.momenta() if isinstance(self.stage.optimizer, CapturedSGD) else []


def random_state(device: torch.device) -> Tensor:
    """Of the generator that dropout on that device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def refuse_draws(k: int, before: Tensor, after: Tensor) -> None:
    """Raise UsageError where something was drawn: a replay of a batch could not draw the same again from within a graph."""
    if not torch.equal(before, after):
        raise UsageError(f"stage {k} draws random numbers (dropout?), captured ticks none: set its rate to 0, or leave captured out")
