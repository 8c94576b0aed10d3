"""One slice of the network with its optimizer and its memory: what Forward, Backward and Update mean, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from delock.errors import UsageError
from delock.execution import PLAIN, Execution
from delock.links.message import Message
from delock.ops import Backward, Forward, Update
from delock.plan import Step
from delock.stage.in_flight import InFlight
from delock.stage.learner import Learner, OptimizerFactory, ScheduleFactory
from delock.stage.module import ModuleFunction, Weights, copies, refuse_derived_weights
from delock.stage.split_backward import Grads, joint, split_backward
from delock.tensors import Tree, floating, leaves_of, like, with_leaves

Loss = Callable[[Any, Any], Tensor]


class BackwardResult(NamedTuple):
    """A finished Backward, as the engine needs it. It holds the batch until the error is on its way: predicted memory counts on that."""

    error: Message | None  # delta_k, where stage k - 1 listens
    loss: Tensor | None  # of the batch, where it is this stage's own
    batch: InFlight

    @property
    def samples(self) -> int:
        """Samples in the batch."""
        return self.batch.message.samples

    @property
    def version(self) -> int:
        """Version of the weights that the derivative was taken at."""
        return self.batch.taken

    @property
    def tick(self) -> int:
        """Tick of the batch's Forward."""
        return self.batch.step.tick


class Stage:
    """Stage k of K: a module, its optimizer and schedule, and the loss if it computes one.

    `module` is called with one argument, a tensor or a tuple of tensors, as nn.Sequential is, and returns the same; `head`, the
    auxiliary head of a stage with a loss of its own, takes its outputs and gives what the loss takes. Dropout is seeded with
    key(seed, k, batch) before every forward and again before its replay, in the head with key(seed, k, "head", batch).
    `mixed` says that the plan takes derivatives at="mixed": the optimizer then writes under live graphs. `names` are the parameters'
    in the unsplit model; the head's are called heads.k.*.
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
        names: Mapping[str, str] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mixed: bool = False,
        resumable: bool = False,
        execution: Execution = PLAIN,
    ) -> None:
        self.k, self.K, self.loss, self.mixed, self.resumable = k, K, loss, mixed, resumable
        self.device = torch.device(device)
        self.execution = execution
        self.body = ModuleFunction(module, (seed, k), self.device, execution)
        self.head = ModuleFunction(head, (seed, k, "head"), self.device, execution) if head is not None else None
        if mixed:
            refuse_derived_weights(module)
            if execution.amp:
                raise UsageError('at="mixed" does not go with amp: autocast computes with copies of the weights, and graphs keep them')
            if execution.compile:
                raise UsageError('at="mixed" does not go with compile: compiled graphs may keep tensors computed from the weights')
        named = [((names or {}).get(name, name), w) for name, w in self.body.weights.items()]
        named += [(f"heads.{k}.{name}", w) for name, w in self.head.weights.items()] if self.head else []
        self.learner = Learner(named, optimizer, schedule, mixed)
        self.memory: dict[int, InFlight] = {}
        self.snapshot: Weights | None = None  # of the current version, shared by all graphs that need it

    @property
    def module(self) -> nn.Module:
        """The slice of the network, in training mode."""
        return self.body.module

    @property
    def optimizer(self) -> Optimizer | None:
        """The stage's own; None when it has nothing to learn."""
        return self.learner.optimizer

    @property
    def version(self) -> int:
        """v_k: Updates made."""
        return self.learner.version

    @property
    def lr(self) -> float:
        """Learning rate of the coming Update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    def rehearse(self, values: Tree) -> None:
        """Compile body and head for inputs like `values`."""
        leaves = leaves_of(values, wanted=self.k > 0)
        outputs = self.body.rehearse(values, leaves, f"stage {self.k}")
        if self.head:
            entering = leaves_of(outputs, wanted=True)
            self.head.rehearse(like(outputs, with_leaves(outputs, entering)), entering, f"the head of stage {self.k}")

    # ---- Forward -------------------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, message: Message) -> Message:
        """h_{k+1} = f_k(h_k; w_k): returns the outputs, cut off from any graph, with the labels that came along.

        train=False in the op: in eval mode, and nothing is kept.
        """
        op = step.op
        assert isinstance(op, Forward)
        if message.values is None:  # a part without samples: its Backward has nothing to do
            self.memory[op.batch] = InFlight(step, message, self.version)
            return message
        if not op.train:
            return self.evaluate(message)
        memory = InFlight(step, message, self.version)
        if step.keep == "graph":
            memory.weights = self.current() if step.snapshot else None
            self.build(memory, memory.weights)
            outputs = memory.outputs
            if self.mixed and self.resumable:
                memory.weights = self.current()
        elif self.execution.compile:  # by the code of its replay, for masks of its own could not be trusted to be the same
            self.build(memory, None)
            outputs, memory.outputs, memory.leaves = memory.outputs, None, ()
        else:
            with torch.no_grad():
                outputs = self.body(op.batch, message.values)
        if step.keep != "nothing":
            self.memory[op.batch] = memory
        return replace(message, values=self.body.sent(outputs))

    def evaluate(self, message: Message) -> Message:
        """h_{k+1} = f_k(h_k; w_k) in eval mode, at the newest weights: returns the outputs with the labels that came along."""
        return replace(message, values=self.body.sent(self.body.evaluate(message.values)))

    def build(self, memory: InFlight, weights: Weights | None, *, is_replay: bool = False) -> None:
        """Forward with a graph, at `weights` or the current ones; again: BatchNorm's statistics have had this batch already."""
        values = memory.message.values
        memory.leaves = leaves_of(values, wanted=self.k > 0)
        with torch.enable_grad():
            memory.outputs = self.body(memory.step.op.batch, values, memory.leaves, weights, is_replay)  # type: ignore[union-attr]

    def current(self) -> Weights:
        """A copy of the body's weights at the current version, the same one until the next Update."""
        if self.snapshot is None:
            self.snapshot = copies(self.body.weights)
        return self.snapshot

    # ---- Backward ------------------------------------------------------------------------------------------------------------------

    def prepare(self, step: Step) -> None:
        """Recomputes the graph of a Backward where it was not kept. It needs no incoming error, so it may run before that has come."""
        memory = self.memory[step.op.batch]  # type: ignore[union-attr]
        if memory.outputs is None and memory.message.values is not None:
            memory.taken = self.version
            self.build(memory, None, is_replay=True)

    def backward(self, step: Step, error: Message | None) -> BackwardResult:
        """g_k += weight (dh_{k+1}/dw_k)^T d, once `prepare` has had the step. Returns delta_k, the loss, and when both are from.

        `error` holds one tensor per floating output of this stage. Raises UsageError for a loss that is no scalar, or has no gradient.
        """
        op = step.op
        assert isinstance(op, Backward)
        memory = self.memory[op.batch]
        if step.last:
            del self.memory[op.batch]
        if memory.message.values is None:
            delta, loss = Message(None) if step.down else None, torch.zeros(()) if op.loss == self.k else None
        else:
            delta, loss = self._gradients(step, op, memory, error)
        return BackwardResult(delta, loss, memory)

    def _gradients(self, step: Step, op: Backward, memory: InFlight, error: Message | None) -> tuple[Message | None, Tensor | None]:
        if op.part == "weights":
            later, passed_on = memory.halves.pop(op.loss)
            self._learn(op, later(not step.last), passed_on)
            return None, None
        loss, roots, seeds = self._roots(op, memory, error)
        passed_on = self._differentiate(step, memory, roots, seeds)
        if not step.down:
            return None, loss
        deltas = tuple(torch.zeros_like(h) if d is None else d for d, h in zip(passed_on, memory.leaves, strict=True))
        return Message(deltas), loss

    def _differentiate(self, step: Step, memory: InFlight, roots: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> Grads:
        """The gradients of the inputs where somebody listens; those of the weights are added, or kept for later, or not wanted."""
        op = step.op
        assert isinstance(op, Backward)
        leaves = list(memory.leaves) if step.down else []
        weights = list((memory.weights if memory.step.snapshot else self.body.weights).values())  # type: ignore[union-attr]
        if op.part == "input" and step.weights_later:
            cut = joint if self.execution.compile else split_backward
            passed_on, later = cut(roots, seeds, leaves, weights)
            memory.halves[op.loss] = later, passed_on
            return passed_on
        wanted = leaves + (weights if op.part == "both" else [])
        grads: Grads = (None,) * len(wanted)
        if roots and wanted:
            grads = torch.autograd.grad(roots, wanted, seeds, retain_graph=not step.last, allow_unused=True)
        if op.part == "both":
            self._learn(op, grads[len(leaves) :], grads[: len(leaves)])
        return grads[: len(leaves)]

    def _learn(self, op: Backward, grads: Grads, passed_on: Grads) -> None:
        if op.weight != 1:
            grads = tuple(g if g is None else g * op.weight for g in grads)
        self.learner.add(grads, passed_on=passed_on)
        self.learner.count += 1

    def _roots(self, op: Backward, memory: InFlight, error: Message | None) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
        """The loss if it is this stage's, the tensors to differentiate, and the gradients that flow into them."""
        if op.loss == self.k and self.head is None:
            loss = self._loss(memory.outputs, memory)
            return loss.detach(), [loss] if loss.requires_grad else [], [None]
        local: Tensor | None
        errors: Grads
        if op.loss == self.k:
            local, errors = self._head(op.batch, memory)
        else:
            assert error is not None
            local, errors = None, tuple(d if op.shrink == 1 else d * op.shrink for d in error.values)
        pairs = [(h, d) for h, d in zip(floating(memory.outputs), errors, strict=True) if h.requires_grad and d is not None]
        return local, [h for h, _ in pairs], [d for _, d in pairs]

    def _head(self, batch: int, memory: InFlight) -> tuple[Tensor, Grads]:
        """L_k = loss(a_k(h_{k+1}; u_k), y): adds the head's own gradient, and returns the loss with its error at the stage's outputs."""
        assert self.head is not None
        leaves = leaves_of(memory.outputs, wanted=True)
        with torch.enable_grad():
            logits = self.head(batch, like(memory.outputs, with_leaves(memory.outputs, leaves)))
        loss = self._loss(logits, memory)
        grads = torch.autograd.grad(loss, [*leaves, *self.head.weights.values()], allow_unused=True)
        errors = grads[: len(leaves)]
        self.learner.add(grads[len(leaves) :], first=len(self.body.weights), passed_on=errors)
        return loss.detach(), errors

    def _loss(self, outputs: Any, memory: InFlight) -> Tensor:
        assert self.loss is not None
        with torch.enable_grad():
            with self.execution.context(self.device):
                loss = self.loss(outputs, memory.message.targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise UsageError(f"the loss must be one number for a batch, but loss(outputs, targets) returned {shape}; take its mean")
            differentiable = isinstance(outputs, Tensor | tuple) and any(h.requires_grad for h in floating(outputs))
            if differentiable and not loss.requires_grad:
                raise UsageError("the loss cannot be differentiated: compute it from the outputs by torch's own functions")
            return loss if memory.message.weight == 1 else loss * memory.message.weight

    def gradient_norms(self) -> Tensor:
        """The norms of the accumulated gradients, one by one: (number of weights with a gradient,)."""
        return self.learner.norms()

    # ---- Update --------------------------------------------------------------------------------------------------------------------

    def update(self, op: Update, norm: Tensor | None = None) -> None:
        """w_k <- step(w_k, g_k), g_k <- 0; with a head, its weights are among w_k. `norm`: |g| where it is not the stage's alone."""
        self.learner.update(op, norm)
        self.snapshot = None
