"""One slice of the network with its optimizer and its memory: what Forward, Backward and Update mean, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from delock.errors import UsageError
from delock.keys import key
from delock.links.message import Message, Tree
from delock.ops import Backward, Forward, Update
from delock.plan import Step

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]
Loss = Callable[[Any, Any], Tensor]
Weights = dict[str, Tensor]


@dataclass(slots=True)
class Memory:
    """What a stage remembers of one batch between its Forward and its last Backward."""

    step: Step  # the Forward
    message: Message  # what came in; its tensors are never written to
    taken: int  # version of the weights that the derivative is taken at
    weights: Weights | None = None  # those weights, where they are not the current ones' own storage
    leaves: tuple[Tensor, ...] = ()  # floating inputs as the graph knows them
    outputs: Tree = None  # with the graph behind it; None while there is none


class Stage:
    """Stage k of K: a module, its optimizer and schedule, the loss if it is the last one.

    `module` is called with one argument, a tensor or a tuple of tensors, as nn.Sequential is, and returns the same. Dropout draws
    from torch's default generator, seeded with key(seed, k, batch) before every forward and again before its replay.
    `mixed` says that the plan takes derivatives at="mixed": the optimizer then writes under live graphs.
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
        names: Mapping[str, str] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mixed: bool = False,
        resumable: bool = False,
    ) -> None:
        self.k, self.K, self.seed, self.loss, self.mixed, self.resumable = k, K, seed, loss, mixed, resumable
        self.device = torch.device(device)
        self.module = module.to(self.device).train()
        self.weights: Weights = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if mixed:
            refuse_derived_weights(self.module)
        # An alias made through .data shares the storage but not the version counter, so autograd lets the optimizer write under a graph.
        self.trained = [nn.Parameter(w.data) if mixed else w for w in self.weights.values()]
        named = [((names or {}).get(name, name), p) for name, p in zip(self.weights, self.trained, strict=True)]
        self.optimizer = optimizer(named) if named else None  # type: ignore[arg-type]
        self.schedule = schedule(self.optimizer) if schedule and self.optimizer else None
        self.version = 0
        self.count = 0  # Backwards accumulated since the last Update
        self.grads: list[Tensor | None] = [None] * len(self.weights)
        self.memory: dict[int, Memory] = {}
        self.snapshot: Weights | None = None  # of the current version, shared by all graphs that need it
        self.own: frozenset[int] | None = None  # addresses of weights and buffers; None: not asked for yet
        self.clones_inputs: bool | None = None  # whether the module writes to its input; None: not seen yet

    # ---- Forward -------------------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, message: Message) -> Message:
        """h_{k+1} = f_k(h_k; w_k): returns the outputs, cut off from any graph, with the labels that came along."""
        op = step.op
        assert isinstance(op, Forward)
        if message.values is None:  # a part without samples: its Backward has nothing to do
            self.memory[op.batch] = Memory(step, message, self.version)
            return message
        if not op.train:
            return replace(message, values=self._sent(self._evaluate(message.values)))
        memory = Memory(step, message, self.version)
        if step.keep == "graph":
            memory.weights = self._snapshot() if step.snapshot else None
            self._build(memory, memory.weights)
            outputs = memory.outputs
            if self.mixed and self.resumable and memory.weights is None:
                memory.weights = self._snapshot()
        else:
            with torch.no_grad():
                self._seed(op.batch)
                outputs = self.module(self._enter(message.values, ()))
        if step.keep != "nothing":
            self.memory[op.batch] = memory
        return replace(message, values=self._sent(outputs))

    def _sent(self, outputs: Tree) -> Tree:
        """Outputs cut off from any graph. One that lies in a weight or buffer is copied: an Update would change it under way."""
        if self.own is None:
            self.own = frozenset(map(_address, (*self.module.parameters(), *self.module.buffers())))
        own = self.own
        sent = tuple(t.detach().clone() if _address(t) in own else t.detach() for t in _tensors(outputs))
        return sent[0] if isinstance(outputs, Tensor) else sent

    def _evaluate(self, values: Tree) -> Tree:
        self.module.eval()
        try:
            with torch.no_grad():
                return self.module(self._enter(values, ()))
        finally:
            self.module.train()

    def _build(self, memory: Memory, weights: Mapping[str, Tensor] | None, *, again: bool = False) -> None:
        """Forward with a graph, at `weights` or the current ones; again: BatchNorm's statistics have had this batch already."""
        batch = memory.step.op.batch  # type: ignore[union-attr]
        values = memory.message.values
        memory.leaves = tuple(t.detach().requires_grad_(self.k > 0) for t in _floating(values))
        instead = dict(weights or {})
        if again:
            instead |= {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._seed(batch)
        with torch.enable_grad():
            entered = self._enter(values, memory.leaves)
            memory.outputs = functional_call(self.module, instead, (entered,)) if instead else self.module(entered)

    def _enter(self, values: Tree, leaves: tuple[Tensor, ...]) -> Tree:
        """The module's argument: the leaves in place of the floating inputs, cloned where the module's first op writes in place."""
        clone = self.clones_inputs is not False
        source = iter(leaves)
        enter = [next(source) if leaves and _is_floating(t) else t for t in _tensors(values)]
        enter = [t.clone() if clone else t for t in enter]
        if self.clones_inputs is None and hasattr(Tensor, "_version"):  # without that counter every call clones
            self._watch(enter)
        return enter[0] if isinstance(values, Tensor) else tuple(enter)

    def _watch(self, entered: list[Tensor]) -> None:
        """After the first call see whether the inputs were written to, so that later calls clone only where they must."""
        before = [t._version for t in entered]

        def look(*_: Any) -> None:
            handle.remove()
            self.clones_inputs = any(t._version != was for t, was in zip(entered, before, strict=True))

        handle = self.module.register_forward_hook(look)

    def _seed(self, batch: int) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # manual_seed means the current GPU
                torch.cuda.manual_seed(key(self.seed, self.k, batch))
        else:
            torch.default_generator.manual_seed(key(self.seed, self.k, batch))

    def _snapshot(self) -> Weights:
        if self.snapshot is None:
            self.snapshot = {name: w.detach().clone().requires_grad_() for name, w in self.weights.items()}
        return self.snapshot

    # ---- Backward ------------------------------------------------------------------------------------------------------------------

    def prepare(self, step: Step) -> None:
        """The replay of a Backward, which does not need the incoming error and so may run before it has come."""
        memory = self.memory[step.op.batch]  # type: ignore[union-attr]
        if memory.outputs is None and memory.message.values is not None:
            memory.taken = self.version
            self._build(memory, None, again=True)

    def backward(self, step: Step, error: Message | None) -> tuple[Message | None, Tensor | None]:
        """g_k += (dh_{k+1}/dw_k)^T d: returns delta_k where stage k - 1 listens, and the (weighted) loss where it is this stage's own.

        `error` holds one tensor per floating output of this stage. Raises UsageError when a loss is not a scalar.
        """
        op = step.op
        assert isinstance(op, Backward)
        self.prepare(step)
        memory = self.memory[op.batch]
        if memory.message.values is None:
            del self.memory[op.batch]
            return (Message(None) if step.down else None), torch.zeros(()) if op.loss == self.k else None
        loss, roots, seeds = self._roots(op, memory, error)
        wanted = list(memory.leaves) if step.down else []
        weights = list((memory.weights if memory.step.snapshot else self.weights).values())  # type: ignore[union-attr]
        grads: tuple[Tensor | None, ...] = (None,) * len(wanted + weights)
        if roots and wanted + weights:
            grads = torch.autograd.grad(roots, wanted + weights, seeds, retain_graph=not step.last, allow_unused=True)
        passed_on = grads[: len(wanted)]
        self._accumulate(grads[len(wanted) :], passed_on)
        if step.last:
            del self.memory[op.batch]
        if not step.down:
            return None, loss
        deltas = tuple(torch.zeros_like(h) if d is None else d for d, h in zip(passed_on, memory.leaves, strict=True))
        return Message(deltas), loss

    def _roots(self, op: Backward, memory: Memory, error: Message | None) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
        """The tensors to differentiate and the gradients that flow into them."""
        if op.loss == self.k:
            with torch.enable_grad():
                loss = self._loss(memory)
            if not loss.requires_grad and any(h.requires_grad for h in _floating(memory.outputs)):
                raise UsageError("the loss cannot be differentiated: compute it from the outputs by torch's own functions")
            return loss.detach(), [loss] if loss.requires_grad else [], [None]
        assert error is not None
        pairs = [(h, d) for h, d in zip(_floating(memory.outputs), error.values, strict=True) if h.requires_grad]
        seeds: list[Tensor | None] = [d if op.shrink == 1 else d * op.shrink for _, d in pairs]
        return None, [h for h, _ in pairs], seeds

    def _loss(self, memory: Memory) -> Tensor:
        assert self.loss is not None
        loss = self.loss(memory.outputs, memory.message.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the loss must be one number for a batch, but loss(outputs, targets) returned {shape}; take its mean")
        return loss if memory.message.weight == 1 else loss * memory.message.weight

    def _accumulate(self, grads: tuple[Tensor | None, ...], passed_on: tuple[Tensor | None, ...]) -> None:
        """g_k += grads, in memory that is g_k's own and laid out as the weights are.

        Autograd hands out one tensor as the gradient of two parameters, or as delta_k too (y = x + a + b), and optimizers write to
        gradients (foreach Nesterov, clipping); it picks strides as it likes (channels_last), and fused optimizers do not look at them.
        """
        taken = {_address(d) for d in passed_on if d is not None}
        for i, (weight, new) in enumerate(zip(self.weights.values(), grads, strict=True)):
            old = self.grads[i]
            if new is None:
                continue
            if old is not None:
                self.grads[i] = old + new
                continue
            if new.layout == torch.strided and (new.stride() != weight.stride() or _address(new) in taken):
                new = torch.empty_like(weight).copy_(new)
            taken.add(_address(new))
            self.grads[i] = new
        self.count += 1

    # ---- Update --------------------------------------------------------------------------------------------------------------------

    def update(self, op: Update) -> None:
        """w_k <- step(w_k, g_k), g_k <- 0, and one step of the schedule: the rate is a function of the stage's own update count."""
        for p, g in zip(self.trained, self.grads, strict=True):
            p.grad = g / self.count if g is not None and op.reduce == "mean" and self.count > 1 else g
        if self.optimizer:
            self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        for p in self.trained:
            p.grad = None
        self.grads = [None] * len(self.grads)
        self.count = 0
        self.version += 1
        self.snapshot = None

    @property
    def lr(self) -> float:
        """Learning rate of the coming update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    # ---- saving what is in flight --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything the stage needs to go on elsewhere, graphs as their inputs and weights; save or copy it before the stage goes on.

        Raises UsageError for at="mixed" without resumable=True: the weights that its graphs were built with are gone.
        """
        if self.mixed and not self.resumable and self.memory:
            raise UsageError('a stage with at="mixed" can be saved in the middle of a run only when it was built with resumable=True')
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "version": self.version,
            "count": self.count,
            "grads": self.grads,
            "clones_inputs": self.clones_inputs,
            "memory": {b: (m.step, m.message, m.taken, self._weights_of(m), m.outputs is not None) for b, m in self.memory.items()},
        }

    def _weights_of(self, memory: Memory) -> Weights | None:
        if memory.weights is None or memory.weights is self.snapshot:
            return None  # the current ones
        return {name: w.detach() for name, w in memory.weights.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of an equal stage: every graph is built again at the weights it was built with, bit for bit."""
        self.module.load_state_dict(state["module"])
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.version, self.count, self.grads = state["version"], state["count"], list(state["grads"])
        self.clones_inputs = state["clones_inputs"]
        self.snapshot, self.memory = None, {}
        saved: dict[int, Weights] = {}  # version -> its weights, shared again
        for batch, (step, message, taken, weights, graph) in state["memory"].items():
            memory = Memory(step, message, taken)
            if weights is not None:
                memory.weights = saved.setdefault(taken, {name: w.clone().requires_grad_() for name, w in weights.items()})
            elif step.snapshot or (self.mixed and self.resumable and graph):
                memory.weights = self._snapshot()
            if graph and message.values is not None:
                self._rebuild(memory)
            self.memory[batch] = memory

    def _rebuild(self, memory: Memory) -> None:
        if not self.mixed or memory.weights is None:
            self._build(memory, memory.weights, again=True)
            return
        now = {name: w.detach().clone() for name, w in self.weights.items()}
        self._overwrite(memory.weights)
        self._build(memory, None, again=True)
        self._overwrite(now)

    def _overwrite(self, values: Mapping[str, Tensor]) -> None:
        for alias, value in zip(self.trained, values.values(), strict=True):
            alias.data.copy_(value)


def refuse_derived_weights(module: nn.Module) -> None:
    """at="mixed" needs graphs that refer to the weights themselves; a parametrized module's graph refers to a derived copy."""
    for name, child in module.named_modules():
        hooks = child._forward_pre_hooks.values()
        old_style = any(type(hook).__name__ in _REPARAMETRIZING or isinstance(hook, BasePruningMethod) for hook in hooks)
        if old_style or nn.utils.parametrize.is_parametrized(child):
            raise UsageError(
                f'at="mixed" cannot be computed for {name or "the module"}: weight_norm, spectral_norm, pruning and other '
                'parametrizations make a copy of the weights that the graph keeps, so the result would silently be at="stash"; '
                'use at="stash"'
            )


_REPARAMETRIZING = frozenset({"WeightNorm", "SpectralNorm"})


def _tensors(values: Tree) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _floating(values: Tree) -> list[Tensor]:
    """The tensors that may have a gradient; complex ones are floating too."""
    return [t for t in _tensors(values) if _is_floating(t)]


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
