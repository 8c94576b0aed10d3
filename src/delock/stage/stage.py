"""One slice of the network with its optimizer and its batches in flight: the exact meaning of Forward, Evaluate, Backward and Update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.execution import PLAIN, Loss, compute_loss, precision
from delock.links.message import Message
from delock.ops import Backward, Forward, Update
from delock.options import Execution
from delock.plan.steps import Step
from delock.recomputation import refuse_with_mixed
from delock.stage.banks import Banks
from delock.stage.in_flight import InFlight
from delock.stage.learner import Learner, OptimizerFactory, ScheduleFactory
from delock.stage.module import ModuleFunction, Weights, copies, refuse_derived_weights
from delock.stage.reached import refuse_unreached
from delock.stage.split_backward import Gradients, gradients, joint_backward, split_backward
from delock.tensors import Tree, Value, floating, leaves_of, like, tensors, with_leaves


class BackwardResult(NamedTuple):
    """A finished Backward, as the engine needs it. It holds the batch until the error is on its way: predicted memory counts on that."""

    error: Message | None  # delta_k, where stage k - 1 listens
    loss: Tensor | None  # of the batch, where it is this stage's own
    batch: InFlight

    @property
    def message(self) -> Message:
        """The batch as it came in."""
        return self.batch.message

    @property
    def version(self) -> int:
        """Version of the weights that the derivative was taken at."""
        return self.batch.version

    @property
    def slot(self) -> int:
        """Slot of the batch's Forward."""
        return self.batch.step.slot


class Stage:
    """Stage k of K: a module, its optimizer and schedule, and the loss if it computes one.

    module: called with one argument, a tensor or a tuple of tensors, as nn.Sequential is; it returns the same.
    head: the auxiliary head of a stage with a loss of its own; it takes the module's outputs, or the first of them alone if they are led by
    their main activation (`main`), and returns what the loss takes.
    alone: no other loss reaches the stage than that of its head.
    learns_below: a stage below has weights that learn; else it is sent zeros for errors, and none are computed.
    names: the parameters' names in the unsplit model, by their names in the module; the head's are called heads.k.*.
    seed: dropout is seeded with key(seed, k, batch) before every Forward and again before its replay, in the head with
    key(seed, k, "head", batch). An optimizer draws from key(seed, k, "update", version).
    mixed: derivatives are taken at="mixed", so the optimizer writes to weights under live graphs.
    micro_batches: of a batch.
    resumable: every graph can be built again from a checkpoint: it keeps the buffers that its Forward writes to, with mixed its weights.
    """

    def __init__(
        self,
        module: nn.Module,
        k: int,
        K: int,
        *,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        loss: Loss | None = None,
        head: nn.Module | None = None,
        main: bool = False,
        alone: bool = False,
        learns_below: bool = True,
        names: Mapping[str, str] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mixed: bool = False,
        resumable: bool = False,
        micro_batches: int = 1,
        execution: Execution = PLAIN,
    ) -> None:
        self.k, self.K, self.loss, self.mixed, self.resumable = k, K, loss, mixed, resumable
        self.device = torch.device(device)
        self.execution = execution
        self.main, self.alone, self.learns_below = main, alone, k > 0 and learns_below
        self.body = ModuleFunction(module, (seed, k), self.device, execution)
        self.head = ModuleFunction(head, (seed, k, "head"), self.device, execution) if head is not None else None
        if mixed:
            refuse_derived_weights(module)
            if execution.amp != "no":
                raise UsageError('at="mixed" does not go with amp: autocast computes with copies of the weights, and graphs keep them')
            if execution.compile:
                raise UsageError('at="mixed" does not go with compile: compiled graphs may keep tensors computed from the weights')
        named = [((names or {}).get(name, name), w) for name, w in self.body.weights.items()]
        named += [(f"heads.{k}.{name}", w) for name, w in self.head.weights.items()] if self.head else []
        self.learner = Learner(named, optimizer, schedule, mixed, micro_batches, k)
        self.in_flight: dict[int, InFlight] = {}  # batch ->
        self.banks = Banks(self.body)

    @property
    def module(self) -> nn.Module:
        """The slice of the network, in training mode."""
        return self.body.module

    @property
    def optimizer(self) -> Optimizer | None:
        """The stage's own optimizer; None if the stage has no weights that learn."""
        return self.learner.optimizer

    @property
    def version(self) -> int:
        """v_k: the Updates made so far."""
        return self.learner.version

    @property
    def lr(self) -> float:
        """Learning rate of the coming Update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    def rehearse(self, values: Value) -> None:
        """Compiles body and head for inputs like `values`."""
        leaves = leaves_of(values, wanted=self.learns_below)
        outputs = self.body.rehearse(values, leaves, f"stage {self.k}")
        if self.head:
            outputs = self._entering_head(outputs)
            entering = leaves_of(outputs, wanted=True)
            self.head.rehearse(like(outputs, with_leaves(outputs, entering)), entering, f"the head of stage {self.k}")

    # ---- Forward -------------------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, message: Message) -> Message:
        """h_{k+1} = f_k(h_k; w_k): returns the outputs, cut off from any graph, with the labels that came along.

        train=False in the op: in eval mode, and nothing is kept.
        """
        op = step.op
        assert isinstance(op, Forward)
        if message.values is None:  # a micro-batch without samples: its Backward has nothing to do
            self.in_flight[op.batch] = InFlight(step, message, self.version)
            return message
        if not op.train:
            return self.evaluate(message)
        held = InFlight(step, message, op.weights.used(self.version), self._wanted(step))
        sent = self._with_graph(held) if step.keep == "graph" else self.body.sent(self._without_graph(held, op.batch))
        if step.keep != "nothing":
            self.in_flight[op.batch] = held
        return replace(message, values=sent)

    def evaluate(self, message: Message) -> Message:
        """h_{k+1} = f_k(h_k; w_k) in eval mode, at the newest weights: returns the outputs with the labels that came along."""
        if message.values is None:  # a batch without samples
            return message
        return replace(message, values=self.body.sent(self.body.evaluate(message.values)))

    def build(self, held: InFlight, weights: Weights | None, *, is_replay: bool = False) -> None:
        """Runs the module forward with a graph, at `weights` or the current ones.

        is_replay: the batch has gone forward before, so BatchNorm's statistics know it already.
        """
        values = held.message.values
        held.leaves = leaves_of(values, wanted=self.learns_below)
        if held.buffers is None:
            held.buffers = self.body.buffers(resumable=self.resumable)
        if self.resumable and not is_replay:
            held.extra = self.body.extra_state()
        with torch.enable_grad():
            held.outputs = self.body(held.step.op.batch, values, held.leaves, weights, is_replay, held.buffers)  # type: ignore[union-attr]
        if self.resumable and not is_replay and held.buffers:
            self.body.note_written(held.buffers)

    def current(self) -> Weights:
        """Returns a copy of the body's weights at the current version: the same one until the next Update, but captured a new one."""
        return copies(self.body.weights) if self.execution.captured else self.banks.of(self.version, self.version)

    def _wanted(self, step: Step) -> Weights | None:
        """Returns the weights that a Forward uses, or None for the current ones where they are."""
        weights = step.op.weights  # type: ignore[union-attr]
        if weights.draws_out(self.version):
            return self.banks.drawn_out(weights.used(self.version), self.version, weights.ahead)
        if weights.used(self.version) < self.version:
            return self.banks.of(weights.used(self.version), self.version)
        return self.current() if step.snapshot else None

    def _with_graph(self, held: InFlight) -> Value:
        """Returns what is sent: of weights that are in place for a while, as they are then."""
        in_place = self.mixed and held.weights is not None
        with self.banks.in_place(held.weights or {}) if in_place else nullcontext():
            self.build(held, None if in_place else held.weights)
            sent = self.body.sent(held.outputs)
        if self.mixed:
            held.weights = (held.weights or self.current()) if self.resumable else None
        return sent

    def _without_graph(self, held: InFlight, batch: int) -> Tree:
        weights, held.weights = held.weights, None  # a replay takes those of its own time
        if not self.execution.compile:
            with torch.no_grad():
                return self.body(batch, held.message.values, weights=weights)
        self.build(held, weights)  # by the code of the replay: code of its own could not be trusted to draw the same dropout masks
        outputs, held.outputs, held.leaves, held.buffers = held.outputs, None, (), None
        return outputs

    # ---- Backward ------------------------------------------------------------------------------------------------------------------

    def prepare(self, step: Step) -> None:
        """Recomputes the graph of a Backward where it was not kept. It needs no incoming error, so it may run before that has come."""
        held = self.in_flight[step.op.batch]  # type: ignore[union-attr]
        if held.outputs is None and held.message.values is not None:
            held.version = self.version
            self.build(held, None, is_replay=True)

    def backward(self, step: Step, error: Message | None) -> BackwardResult:
        """g_k += weight (dh_{k+1}/dw_k)^T d, after `prepare`. Returns delta_k, the loss and the batch.

        `error`: a tensor, or None, per floating output of this stage. Raises UsageError for a loss that is no scalar or has no gradient.
        """
        op = step.op
        assert isinstance(op, Backward)
        held = self.in_flight[op.batch]
        if step.last:
            del self.in_flight[op.batch]
        if held.message.weight == 0:  # nothing in it counts: no gradient, and no loss, which might be NaN
            self.learner.count += op.part != "input"
            own = op.loss == self.k and op.part != "weights"
            return BackwardResult(_no_error(held) if step.down else None, torch.zeros(()) if own else None, held)
        if op.part == "weights":
            later, passed_on = held.deferred.pop(op.loss)
            self._learn(op, later(not step.last), passed_on)
            return BackwardResult(None, None, held)
        loss, roots, seeds = self._roots(op, held, error)
        passed_on = self._differentiate(step, op, held, roots, seeds)
        return BackwardResult(_error(held, passed_on) if step.down else None, loss, held)

    def _differentiate(
        self, step: Step, op: Backward, held: InFlight, roots: Sequence[Tensor], seeds: Sequence[Tensor | None]
    ) -> Gradients:
        """Returns the gradients of the inputs, if stage k - 1 listens; those of the weights are added to g_k, deferred, or left out."""
        leaves = list(held.leaves) if step.down and self.learns_below else []
        weights = list((held.weights if held.weights and held.step.snapshot else self.body.weights).values())
        if op.part == "input" and step.weights_later:
            if self.execution.compile or self.body.recomputes is not False:  # else each part would compute again
                passed_on, later = joint_backward(roots, seeds, leaves, weights, partial(self._gradients, held))
            else:
                passed_on, later = split_backward(roots, seeds, leaves, weights)
            held.deferred[op.loss] = later, passed_on
            return passed_on
        wanted = leaves + (weights if op.part == "both" else [])
        grads = self._gradients(held, roots, wanted, seeds, retain=not step.last)
        if op.part == "both":
            self._learn(op, grads[len(leaves) :], grads[: len(leaves)])
        return grads[: len(leaves)]

    def _gradients(
        self, held: InFlight, roots: Sequence[Tensor], wanted: Sequence[Tensor], seeds: Sequence[Tensor | None], *, retain: bool
    ) -> Gradients:
        """Returns gradients through the graph of a batch; what the module computes again meanwhile, it computes as in the Forward."""
        take = partial(gradients, roots, wanted, seeds, retain=retain)
        if self.body.recomputes is False or not (roots and wanted):
            return take()
        weights, whole = held.weights if held.step.snapshot else None, not self.body.weights or wanted[-1] not in set(held.leaves)
        found = self.body.differentiate(take, weights, held.buffers, whole)
        if self.mixed and self.body.recomputes:
            refuse_with_mixed(f"stage {self.k}")
        return found

    def _learn(self, op: Backward, grads: Gradients, passed_on: Gradients) -> None:
        if op.weight != 1:
            grads = tuple(g if g is None else g * op.weight for g in grads)
        self.learner.add(grads, passed_on=passed_on)
        self.learner.count += 1

    def _roots(self, op: Backward, held: InFlight, error: Message | None) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
        """Returns the loss if it is this stage's, the tensors to differentiate, and the gradients that flow into them."""
        if op.loss == self.k and self.head is None:
            loss = self._loss(held.outputs, held.message)
            return loss.detach(), [loss] if loss.requires_grad else [], [None]
        local: Tensor | None
        errors: Gradients
        if op.loss == self.k:
            local, errors = self._head_loss(self.head, op.batch, held)  # type: ignore[arg-type]
        else:
            assert error is not None
            local, errors = None, tuple(d if d is None or op.shrink == 1 else d * op.shrink for d in error.values)
        pairs = [(h, d) for h, d in zip(floating(held.outputs), errors, strict=True) if h.requires_grad and d is not None]
        return local, [h for h, _ in pairs], [d for _, d in pairs]

    def _head_loss(self, head: ModuleFunction, batch: int, held: InFlight) -> tuple[Tensor, Gradients]:
        """L_k = loss(a_k(h_{k+1}; u_k), y): adds the head's own gradient, and returns the loss with its error at the stage's outputs."""
        if self.main and self.alone:
            self.alone = False  # once is enough
            refuse_unreached(tensors(held.outputs), dict(zip(self.learner.names, self.body.weights.values(), strict=False)), self.k)
        outputs, buffers = self._entering_head(held.outputs), head.buffers()
        leaves = leaves_of(outputs, wanted=True)
        with torch.enable_grad():
            logits = head(batch, like(outputs, with_leaves(outputs, leaves)))
        loss = self._loss(logits, held.message)
        wanted = [*leaves, *head.weights.values()]
        grads = head.differentiate(lambda: torch.autograd.grad(loss, wanted, allow_unused=True), None, buffers)
        errors = grads[: len(leaves)]
        self.learner.add(grads[len(leaves) :], first=len(self.body.weights), passed_on=errors)
        return loss.detach(), (*errors, *(None for _ in floating(held.outputs)[len(errors) :]))

    def _entering_head(self, outputs: Value) -> Value:
        """Returns what the head is given of the module's outputs."""
        return tensors(outputs)[0] if self.main else outputs

    def _loss(self, outputs: Any, message: Message) -> Tensor:
        assert self.loss is not None
        with torch.enable_grad():
            with precision(self.execution, self.device):
                loss = compute_loss(self.loss, outputs, message.targets)
            return loss if message.weight == 1 else loss * message.weight

    def gradient_norms(self) -> Tensor:
        """Returns the norms of the accumulated gradients, one by one: (number of weights with a gradient,)."""
        return self.learner.norms()

    # ---- Update --------------------------------------------------------------------------------------------------------------------

    def update(self, op: Update, norm: Tensor | None = None, banks: int = 0) -> None:
        """w_k <- step(w_k, g_k), g_k <- 0; with a head, its weights are among w_k.

        norm: |g| where it is not the stage's alone. banks: older versions of the weights to have afterwards, this one included.
        """
        self.banks.before_update(self.version, banks)
        self.body.seed("update", self.version)  # for optimizers that draw
        self.learner.step(op, norm)
        if not self.execution.captured:  # else the host counts between replays
            self.learner.count_update()


def _error(held: InFlight, passed_on: Gradients) -> Message:
    """Returns the message to stage k - 1: for each floating input its error; None where no output depends on it, or nothing learns."""
    return Message(tuple(passed_on or (None,) * len(held.leaves)))


def _no_error(held: InFlight) -> Message:
    """Returns the message to stage k - 1 of a part without weight: zeros, or nothing where it has no samples."""
    values = held.message.values
    return Message(values if values is None else tuple(torch.zeros_like(h) for h in floating(values)))
