"""One stage on static memory, so that its ops can be recorded once and replayed.

What PyTorch does. A CUDA graph records kernels with the addresses that they read and write, and replays exactly these. The Python code
around them runs once, when they are recorded; a replay takes no branch, counts nothing and allocates nothing. Autograd gives new memory to
every activation and gradient, ties a backward to the addresses of its forward, and refuses a backward after a tensor that its graph holds
was written to.

Why that is not enough. A stage keeps several batches in flight, each in new memory. It receives messages, reads the learning rate as a
number, adds gradients up in new memory, counts its updates and steps its schedule in Python. All of this would happen once, at recording.

What we do. The number of batches in flight has a bound that the plan tells: batch b lies in slot b modulo that number.

* Messages are copied into the memory of their slot (`StaticMessages`). The period says when a slot may be overwritten, so the stage reads
  aliases that autograd does not see change.
* Forwards and backwards are recorded once per slot, so the graph of a slot keeps its addresses, and so does its copy of the weights.
* The gradients of a group of batches that is not complete, and the latest loss, are copied into memory of their own.
* The learning rate is a tensor (`CapturedSGD`), written between ticks.
* What Python counts is counted between ticks, on the host (`updated`): versions and steps of the schedule.
* At both ends of a run a stage has nothing to do in some ticks. The whole tick is replayed all the same, and what it changed on that stage
  is put back (`without`).

What remains in Python is the same code as everywhere, `Stage` and `Learner`, with `Execution.captured` set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """A stage with the slots that it reads, its accumulated gradients, and its latest loss; group: batches of an Update."""

    def __init__(self, stage: Stage, group: int) -> None:
        assert stage.execution.captured
        self.stage, self.group = stage, group
        self.inputs, self.errors = StaticMessages(), StaticMessages()
        self.loss: Tensor | None = None  # of the latest batch, where this stage computes one
        self.held: list[Tensor | None] = [None] * len(stage.learner.weights)  # gradients of a group that is not complete
        self.initial = [t.detach().clone() for t in (*self._weights(), *self._buffers())]

    # ---- recorded ------------------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, slot: int) -> Message:
        """Returns the outputs for the message in the slot."""
        return self.stage.forward(step, self.inputs.get(slot))

    def backward(self, step: Step, slot: int) -> Message | None:
        """Returns the errors of the message in the slot, if stage k - 1 listens; loss and open gradients stay in fixed memory."""
        op, learner, place = step.op, self.stage.learner, slot % self.group
        assert isinstance(op, Backward)
        learner.resume(place, self.held if place else [None] * len(self.held))
        self.stage.prepare(step)
        done = self.stage.backward(step, self.errors.get(slot) if op.loss > self.stage.k else None)
        if done.loss is not None:
            self.loss = done.loss.clone() if self.loss is None else self.loss.copy_(done.loss)
        if place + 1 < self.group:
            self._hold(learner.grads)
        return done.error

    def update(self, op: Update) -> None:
        """Takes one step of the optimizer."""
        self.stage.update(op)

    def _hold(self, grads: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            held = self.held[i]
            if grad is None:
                continue
            if held is None:
                self.held[i] = held = torch.empty_like(grad)
            held.copy_(grad)

    # ---- between ticks -------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Puts weights, buffers and momenta back to what they were before the first op."""
        for t, was in zip((*self._weights(), *self._buffers()), self.initial, strict=True):
            t.data.copy_(was)
        for momentum in self._momenta():
            momentum.zero_()

    def upload_rates(self) -> None:
        """Brings the learning rates of the coming Update to the device."""
        if isinstance(self.stage.optimizer, CapturedSGD):
            self.stage.optimizer.upload_rates()

    def updated(self) -> None:
        """Counts an Update that has taken place, with its step of the schedule."""
        self.stage.learner.count_update()
        self.upload_rates()

    @contextmanager
    def without(self, forward: bool, backward: bool) -> Iterator[None]:
        """Undoes, after the block, what a tick has changed that this stage should not do, at the beginning and the end of a run.

        forward: the Forward, which changes buffers (BatchNorm); backward: the Backward with its Update.
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
    """Returns the state of the generator that dropout on that device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def refuse_draws(k: int, before: Tensor, after: Tensor) -> None:
    """Raises UsageError if something was drawn: a replay of a batch could not draw the same again from within a graph."""
    if not torch.equal(before, after):
        raise UsageError(f"stage {k} draws random numbers (dropout?), captured ticks none: set its rate to 0, or leave captured out")
