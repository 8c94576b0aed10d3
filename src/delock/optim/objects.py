"""Optimizers and schedules that are given as objects: every stage makes one like them for its own weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from delock.errors import UsageError, said
from delock.optim.several import Several

MadeOptimizer: TypeAlias = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
MadeSchedule: TypeAlias = Callable[[Optimizer], LRScheduler]
Modules: TypeAlias = nn.Module | Sequence[nn.Module]

OF_SCHEDULES = ("step", "_opt_called")  # attributes that a schedule gives its optimizer
WITH_LOSS = (
    "let a module hold the model and the loss, with a forward(x, labels) that returns the loss, and give fit that module and no loss"
)
FACTORIES: Mapping[str, str] = MappingProxyType(
    {
        "ErrorFeedback": "delock.recipes.error_feedback(base), with the factory of the optimizer inside",
        "Several": "delock.recipes.muon(), or a function of (name, parameter) pairs that returns Several([...])",
        "SplitMuon": "delock.recipes.muon()",
        "SCAdamW": "delock.recipes.scadamw()",
        "SCSGD": "delock.recipes.scsgd(lr=0.1)",
    }
)
"""Factories of optimizers of ours, as they are written: functools.partial with a rate makes none of these."""
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Describes a parameter group: its options, and its weights in order, each by all the names that it has in the unsplit model."""

    options: Mapping[str, Any]
    weights: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class OptimizerLike:
    """Makes an optimizer of the same class and with the same groups as one that was given, for those of its weights that a stage has.

    A group that is empty on a stage is kept, so that a schedule finds each in its place. Weights that no group has are left out: they do
    not learn, as in plain PyTorch. `known` has the names of all weights of the model. Others are those of heads, and join the only group.
    """

    kind: type[Optimizer]
    options: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]
    known: frozenset[str]
    named: bool  # the groups know the names of their weights

    def __call__(self, params: Iterable[tuple[str, Tensor]]) -> Optimizer:
        own = dict(params)
        groups = [
            {**copy.deepcopy(dict(group.options)), "params": [(name, own[name]) if self.named else own[name] for name in names]}
            for group, names in zip(self.groups, self.held(own), strict=True)
        ]
        return self.kind(groups, **copy.deepcopy(dict(self.options)))

    def held(self, own: Collection[str]) -> list[list[str]]:
        """Returns the names of the weights in each group, of those that a stage has. Raises UsageError where a group is not known."""
        held = [[name for names in group.weights for name in names if name in own] for group in self.groups]
        heads = [name for name in own if name not in self.known]
        if heads and len(held) > 1:
            raise UsageError(
                f"the {self.kind.__name__} has {len(held)} parameter groups, and which of them {heads[0]} joins, a weight that a stage has "
                f"beside the model's, is not known: {_factory(self.kind)}, which knows weights by their names"
            )
        held[0] += heads
        return held

    def __repr__(self) -> str:
        return self.kind.__name__


class _Place:
    """Stands for the optimizer in a schedule that has none."""


class _Mark(LRScheduler):
    """Marks the step of an optimizer, as every schedule does when it is made: one that is copied asks for the mark."""

    def step(self, epoch: int | None = None) -> None:
        """Leaves the rates as they are."""


class ScheduleLike:
    """Makes copies of a schedule that was given, each with another optimizer in its place."""

    def __init__(self, given: LRScheduler) -> None:
        self.place = _Place()
        self.template = copy.deepcopy(given, {id(given.optimizer): self.place})

    def __call__(self, optimizer: Optimizer) -> LRScheduler:
        _Mark(optimizer)
        return copy.deepcopy(self.template, {id(self.place): optimizer})

    @property
    def func(self) -> type[LRScheduler]:
        """Returns the class of what it makes, as functools.partial does."""
        return type(self.template)

    def parts_in_words(self) -> list[tuple[str, object]]:
        """Returns what it holds by the names that the user knows it by, for errors."""
        return [(f".{name}", value) for name, value in vars(self.template).items()]


def per_stage(
    model: Modules, loss: object, heads: Any, optimizer: MadeOptimizer | Optimizer, schedule: MadeSchedule | LRScheduler | None
) -> tuple[MadeOptimizer, MadeSchedule | None]:
    """Returns factories of optimizer and schedule, of which each may be given as an object. Raises UsageError for one that has no like.

    heads: auxiliary ones, where modules are given.
    """
    if isinstance(schedule, LRScheduler):
        schedule = _schedule_like(schedule, optimizer)
    if isinstance(optimizer, Optimizer) and isinstance(loss, nn.Module):
        _refuse_learning_loss(optimizer, model, loss)
    if isinstance(optimizer, Optimizer) and (names := _names(model)):  # without weights the model is refused later
        beside = {id(weight) for head in _modules(heads) for weight in head.parameters()}
        optimizer = _optimizer_like(names, beside, optimizer)
    return optimizer, schedule  # type: ignore[return-value]


def _refuse_learning_loss(given: Optimizer, model: Modules, loss: nn.Module) -> None:
    """Raises UsageError for an optimizer that is to train the loss, too."""
    held, names = {id(weight) for group in given.param_groups for weight in group["params"]}, _names(model)
    if own := [name for name, weight in loss.named_parameters() if id(weight) in held and id(weight) not in names]:
        raise UsageError(
            f"the {type(given).__name__} holds the parameter {own[0]} of the loss, which no stage would train: {WITH_LOSS}, or freeze it "
            "and leave it out of the optimizer"
        )


def _optimizer_like(names: Mapping[int, tuple[str, ...]], beside: Collection[int], given: Optimizer) -> OptimizerLike:
    """names: of the model's weights, by their identity; beside: weights of heads."""
    kind = type(given)
    weights = [weight for group in given.param_groups for weight in group["params"]]
    if foreign := [tuple(weight.shape) for weight in weights if id(weight) not in names and id(weight) not in beside]:
        raise UsageError(
            f"the {kind.__name__} holds a parameter of shape {foreign[0]} that is none of the model's, so no stage would train it: make "
            f"the optimizer of the parameters of the model that is given to fit, or {_factory(kind)}"
        )
    if not any(weight.requires_grad for weight in weights):
        raise UsageError(f"the {kind.__name__} holds no parameter that learns, so nothing would change: give it model.parameters()")
    if any(state and _stepped(state) for state in given.state.values()):
        raise UsageError(
            f"the {kind.__name__} has taken steps, and stages would begin without what it has learned from them: make a new one, "
            f"or {_factory(kind)}"
        )
    if isinstance(given, Several):
        raise UsageError(f"another {kind.__name__} cannot be made for every stage, as it is around other optimizers: {_factory(kind)}")
    groups = tuple(
        ParameterGroup(_options(group), tuple(names[id(weight)] for weight in group["params"] if id(weight) in names))
        for group in given.param_groups
    )
    known = frozenset(name for own in names.values() for name in own)
    like = OptimizerLike(kind, _arguments(given), groups, known, any("param_names" in group for group in given.param_groups))
    _refuse_unlike(given, like, {names[id(weight)][0]: weight for weight in weights if id(weight) in names})
    return like


def _names(model: Modules) -> dict[int, tuple[str, ...]]:
    """Returns the names of every parameter, by its identity; a tied one has several."""
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(_modules(model))
    found: dict[int, tuple[str, ...]] = {}
    for name, weight in whole.named_parameters(remove_duplicate=False):
        found[id(weight)] = (*found.get(id(weight), ()), name)
    return found


def _modules(given: Any) -> list[nn.Module]:
    """Returns the modules of a list; whatever else is given is refused elsewhere."""
    return [one for one in given if isinstance(one, nn.Module)] if isinstance(given, Iterable) else []


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _arguments(given: Optimizer) -> dict[str, Any]:
    """Returns those of an optimizer's defaults that its class takes as arguments."""
    takes = inspect.signature(type(given)).parameters
    others = any(one.kind is one.VAR_KEYWORD for one in takes.values())
    return {name: value for name, value in given.defaults.items() if others or name in takes}


def _stepped(state: Any) -> bool:
    """Returns True for the state of a weight that has been updated; some optimizers make it before."""
    return not isinstance(state, Mapping) or "step" not in state or float(state["step"]) > 0


def _refuse_unlike(given: Optimizer, like: OptimizerLike, weights: Mapping[str, Tensor]) -> None:
    """Raises UsageError unless the class makes an equal optimizer of the same weights: it may take or keep something that is not seen."""
    kind, options = type(given), f"of the options that it tells ({', '.join(given.defaults)})"
    try:
        made = like(weights.items())
    except Exception as error:
        raise UsageError(
            f"another {kind.__name__} cannot be made {options}, one for every stage: {said(error)}; {_factory(kind)}"
        ) from error
    same = _same(made.defaults, given.defaults) and _same([*map(_options, made.param_groups)], [*map(_options, given.param_groups)])
    hooked = [name for name, hooks in vars(given).items() if name.endswith("_hooks") and hooks]
    theirs, own = ({n: one for n, one in vars(each).items() if n not in OF_SCHEDULES} for each in (given, made))
    other = [n for n, one in theirs.items() if n not in own or (isinstance(one, PLAIN) and own[n] != one)]
    if not same or hooked or other:
        what = "its options" if not same else ", ".join(hooked or other)
        raise UsageError(
            f"another {kind.__name__} that is made {options} differs in {what}, so stages cannot have one each: {_factory(kind)}"
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _schedule_like(given: LRScheduler, optimizer: object) -> ScheduleLike:
    kind = type(given).__name__
    remedy = f"give a factory, which every stage calls with its own optimizer, as functools.partial({kind}, ...)"
    for one in _all(given):
        if getattr(one, "optimizer", None) is not optimizer:
            raise UsageError(f"the {type(one).__name__} belongs to another optimizer than is given: give that one, or {remedy}")
    if _begun(given):
        raise UsageError(f"the {kind} has taken steps, and a run begins with the first: make a new one, or {remedy}")
    try:
        return ScheduleLike(given)
    except Exception as error:
        raise UsageError(f"the {kind} cannot be copied for every stage: {said(error)}; {remedy}") from error


def _begun(schedule: Any) -> bool:
    """Returns True for a schedule that has been stepped. To make a sequence steps those inside it, and a chain does not count."""
    if isinstance(schedule, ChainedScheduler):
        return any(map(_begun, schedule._schedulers))
    return bool(
        schedule.last_epoch > 0 if isinstance(schedule, SequentialLR | ReduceLROnPlateau) else getattr(schedule, "_step_count", 1) > 1
    )


def _all(schedule: LRScheduler) -> Iterator[LRScheduler]:
    """Yields a schedule and those inside it."""
    yield schedule
    for value in vars(schedule).values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, LRScheduler):
                yield from _all(one)


def _factory(kind: type[Optimizer]) -> str:
    like = FACTORIES.get(kind.__name__, f"functools.partial({kind.__name__}, lr=0.1)")
    return f"give a factory, which every stage calls with its own parameters, as {like}"
