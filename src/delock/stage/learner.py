"""The weights of a stage with their gradients, optimizer and schedule: an Update takes place here."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from delock.errors import users_own
from delock.ops import Update
from delock.optim.kinds import kinds
from delock.stage.average import Average
from delock.stage.optimizer_state import first_state, load_exactly
from delock.stage.unfit import made_by, refuse_unfit_optimizer, refuse_unfit_schedule
from delock.tensors import address

PLAIN = (bool, int, float, str, tuple, type(None))
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "max_momentum", "base_momentum", "betas", "swa_lr")
"""The options of a group that schedules of torch write."""

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]


class Learner:
    """Weights of stage k that learn. behind_graphs: the optimizer writes to them unseen by autograd, under live graphs (at="mixed")."""

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None,
        behind_graphs: bool,
        micro_batches: int,
        k: int,
    ) -> None:
        self.micro_batches = micro_batches
        # An alias made through .data shares the storage but not the version counter by which autograd would notice.
        self.weights: list[Any] = [nn.Parameter(w.data) if behind_graphs else w for _, w in named]
        self.names, self.factory = [name for name, _ in named], optimizer
        own = list(zip(self.names, self.weights, strict=True))
        self.optimizer: Optimizer | None = None
        if own:
            self.optimizer = made_by(optimizer, list(own), "optimizer", k)
            refuse_unfit_optimizer(self.optimizer, own, optimizer)
            _own_options(self.optimizer)
        self.made = described(self.optimizer)  # before a schedule sets rates
        self.schedule = made_by(schedule, self.optimizer, "schedule", k) if schedule and self.optimizer else None
        if schedule and self.optimizer:
            refuse_unfit_schedule(self.schedule)
        self.grads: list[Tensor | None] = [None] * len(named)
        self.count = 0  # Backwards accumulated since the last Update, those of parts without samples too
        self.version = 0  # Updates made
        self.average: Average | None = None  # of the module's weights, where it is wanted

    def add(self, grads: Sequence[Tensor | None], first: int = 0, passed_on: Sequence[Tensor | None] = ()) -> None:
        """g += grads, for the weights from index `first` on, in memory that is g's own and laid out as the weights are.

        A copy is made where that is not so. Autograd may return one tensor as the gradient of two parameters, or as an error that is also
        `passed_on` (y = x + a + b), while optimizers write to gradients (foreach Nesterov, clipping). It chooses strides as it likes
        (channels_last), and fused optimizers do not look at strides.
        """
        taken = {address(d) for d in passed_on if d is not None}
        for i, new in enumerate(grads, first):
            old = self.grads[i]
            if new is None:
                continue
            if old is not None:
                self.grads[i] = old + new
                continue
            weight = self.weights[i]
            if new.layout == torch.strided and (new.stride() != weight.stride() or address(new) in taken):
                new = torch.empty_like(weight).copy_(new)
            taken.add(address(new))
            self.grads[i] = new

    def norms(self) -> Tensor:
        """Returns the norms of the gradients, one by one: (number of weights with a gradient,)."""
        norms = [torch.linalg.vector_norm(g) for g in self.grads if g is not None]
        return torch.stack(norms) if norms else torch.zeros(0)

    def resume(self, count: int, grads: Sequence[Tensor | None]) -> None:
        """Goes on as after `count` Backwards since the last Update, whose gradients add up to `grads`."""
        self.count, self.grads = count, list(grads)

    def step(self, op: Update, norm: Tensor | None = None) -> None:
        """w <- step(w, g), g <- 0. norm: |g| over the whole network, a scalar, where the op clips over it."""
        batches = self.count // self.micro_batches if op.reduce == "mean" else 1
        for w, g in zip(self.weights, self.grads, strict=True):
            w.grad = g / batches if g is not None and batches > 1 else g
        if op.clip is not None:
            own = [w.grad for w in self.weights if w.grad is not None]
            clip_grads_with_norm_(self.weights, op.clip, get_total_norm(own) if norm is None else norm)
        if self.optimizer:
            self.optimizer.step()
        for w in self.weights:
            w.grad = None
        self.resume(0, [None] * len(self.grads))

    def count_update(self) -> None:
        """Counts a version, which enters the average, and takes a step of the schedule: its rate is a function of the stage's own updates.

        A schedule that waits for a measure is stepped by `judge`.
        """
        self.version += 1
        if self.average:
            self.average.update()
        if self.schedule and not self.judged:
            with users_own("the schedule"):
                self.schedule.step()

    @property
    def judged(self) -> bool:
        """Returns True if the schedule waits for a measure of evaluations."""
        return isinstance(self.schedule, ReduceLROnPlateau)

    def judge(self, measure: float) -> None:
        """Takes a step of the schedule that waits for a measure."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            with users_own("the schedule"):
                self.schedule.step(measure)

    def first_state(self) -> dict[str, Any] | None:
        """Returns the state that the optimizer will have after its first step, for a few weights; None where that is not known."""
        return first_state(self.factory, list(zip(self.names, self.weights, strict=True)), self.optimizer) if self.optimizer else None

    def state(self) -> dict[str, Any]:
        """Returns everything but the weights."""
        return {
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "names": self.held(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "version": self.version,
            "count": self.count,
            "grads": self.grads,
            "average": self.average.state() if self.average else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()` of an equal learner."""
        another = self._another_schedule(state)
        if self.optimizer:
            load_exactly(self.optimizer, state["optimizer"])
        if self.optimizer and another:
            for group, scheduled in zip(self.optimizer.param_groups, another, strict=True):
                group.update(scheduled)
        elif self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.version = state["version"]
        if self.average:
            self.average.load(state["average"])
        self.resume(state["count"], [g if g is None else g.to(w.device) for w, g in zip(self.weights, state["grads"], strict=True)])

    def _another_schedule(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns what the schedule sets after the Updates of a saved state, by groups; [] if it is the saved one, which then goes on.

        That of a longer run is another one. A schedule of torch's follows from its options and the number of its steps, which other stages,
        with versions of their own, may have made. Of a LambdaLR, whose function no state shows, the rates tell.
        """
        if self.schedule is None or self.judged or not type(self.schedule).__module__.startswith("torch.optim."):
            return []
        assert self.optimizer
        made, saved = self.schedule.state_dict(), state["schedule"]
        self.advance(saved["last_epoch"] if "last_epoch" in saved else saved["_schedulers"][0]["last_epoch"])
        now = self.schedule.state_dict()
        other = now["_last_lr"] != saved["_last_lr"] and any(isinstance(one, LambdaLR) for one in _parts(self.schedule))
        if not other and not _differs(made, now, saved):
            return []
        return [{name: group[name] for name in SCHEDULED if name in group} for group in self.optimizer.param_groups]

    def held(self) -> list[list[str | None]]:
        """Returns the names of the weights that the optimizer holds, group by group; None for one that is not among the stage's."""
        names = {id(w): name for name, w in zip(self.names, self.weights, strict=True)}
        return [[names.get(id(w)) for w in group["params"]] for group in self.optimizer.param_groups] if self.optimizer else []

    def advance(self, updates: int) -> None:
        """Goes on with the schedule as after `updates` Updates."""
        with warnings.catch_warnings(), users_own("the schedule"):
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # those Updates were another learner's
            for _ in range(updates if self.schedule else 0):
                self.schedule.step()  # type: ignore[union-attr]

    def adopt(self, states: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> None:
        """Takes over an optimizer's state by the names of weights, and what its groups keep beside their options."""
        if self.optimizer:
            own = self.optimizer.state_dict()
            names = [name for group in self.held() for name in group]
            own["state"] = {i: states[name] for i, name in enumerate(names) if name is not None and name in states}
            own["param_groups"] = [{**group, **more} for group, more in zip(own["param_groups"], beside, strict=True)]
            load_exactly(self.optimizer, own)


def _own_options(optimizer: Optimizer) -> None:
    """Gives every group options of its own where they are tensors, as a rate: schedules write to them, and factories share them."""
    for group in optimizer.param_groups:
        group.update({name: value.clone() for name, value in group.items() if isinstance(value, Tensor)})


def described(optimizer: Optimizer | None) -> dict[str, Any] | None:
    """Returns the class and the plain options of an optimizer as it was made, and the kinds of its state."""
    if optimizer is None:
        return None
    groups = [{name: one for name, one in group.items() if name != "param_names" and _plain(one)} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups, "kinds": kinds(optimizer)}


def _parts(schedule: LRScheduler) -> Iterator[LRScheduler]:
    yield schedule
    for one in getattr(schedule, "_schedulers", ()):
        yield from _parts(one)


def _differs(made: Any, now: Any, saved: Any) -> bool:
    """Returns True if a state saved has another option than one made, of which an option is what has not changed up to now."""
    if isinstance(now, Tensor):
        return torch.equal(made, now) and not (isinstance(saved, Tensor) and torch.equal(now, saved.to(now.device)))
    if isinstance(now, Counter):  # milestones
        return bool(made == now and dict(now) != dict(saved))
    if isinstance(now, dict):
        return any(_differs(made[name], one, saved[name]) for name, one in now.items() if name in made and name in saved)
    if isinstance(now, list | tuple):
        return len(now) != len(saved) or any(map(_differs, made, now, saved))
    return isinstance(now, PLAIN) and bool(made == now and now != saved)


def _plain(value: Any) -> bool:
    return isinstance(value, PLAIN) and all(map(_plain, value if isinstance(value, tuple) else ()))
