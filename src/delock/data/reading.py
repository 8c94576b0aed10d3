"""Reads a batch of the user's, whatever its form: which of it are the inputs and how the model is called with them, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

from torch import Tensor

from delock.data.arrays import refuse_sparse, targets_of, with_tensors
from delock.data.call import Call, Takes
from delock.data.loader import LoadedBatch
from delock.errors import UsageError
from delock.tensors import is_value

LABELS = ("labels", "label", "targets", "target")  # what the targets are called in a batch that is a dict

Key: TypeAlias = str | int
Choice: TypeAlias = Key | Sequence[Key] | Callable[[Any], Any]
Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Chosen:
    """Holds the choices of `Batches`: None leaves a thing to the rules."""

    inputs: Choice | None = None
    targets: Choice | None = None
    samples: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, choice in (("inputs", self.inputs), ("targets", self.targets)):
            if choice is not None and not callable(choice) and not _keys(choice):
                raise UsageError(
                    f"the {name} of Batches are {choice!r}, but they must be names of entries of a batch, or a function of the batch"
                )
        if self.samples is not None and not callable(self.samples):
            raise UsageError(
                f"the samples of Batches are a {type(self.samples).__name__}, but they must be a function of the batch that counts them"
            )

    def over(self, other: Chosen) -> Chosen:
        """Returns these choices, and the other's where there is none."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in ("inputs", "targets", "samples")}
        return Chosen(**{name: theirs if mine is None else mine for name, (mine, theirs) in pairs.items()})


@dataclass(frozen=True)
class Reading:
    """Reads batches for a model that takes `takes`. It can be pickled if the functions chosen can."""

    takes: Takes = field(default_factory=Takes)
    chosen: Chosen = field(default_factory=Chosen)

    @property
    def calls(self) -> bool:
        """Returns True if functions of the user's are called with every batch."""
        return any(map(callable, (self.chosen.inputs, self.chosen.targets, self.chosen.samples)))

    def read(self, item: Any, where: str) -> tuple[Call | None, LoadedBatch]:
        """Returns how the model is called with a batch (None: as a chain is), and the batch.

        where: the batch in words. Raises UsageError for what cannot be guessed, names it, and says how to choose.
        """
        targets = self._targets(item, where)
        args, kwargs = self._arguments(item, targets, where)
        try:
            args, kwargs, targets = with_tensors(args), with_tensors(kwargs), targets_of(targets)
            named = {f"the input {name!r} holds": one for name, one in kwargs.items()}
            refuse_sparse({**{f"input {i} holds": one for i, one in enumerate(args)}, **named, "the targets hold": targets})
            counted = None if self.chosen.samples is None else _count(self.chosen.samples(item))
            call, found = (None, ()) if self.takes.chain else Call.of(args, {name: kwargs[name] for name in self._in_order(kwargs)})
        except UsageError as error:
            raise UsageError(f"{where} of the data: {error}") from error
        if call is None:
            return None, LoadedBatch(self._value(args, kwargs, where), targets, counted)
        if not found:
            raise UsageError(f"{where} of the data gives the model {call.words()}, which holds no tensor: {_CHOOSE}")
        return call, LoadedBatch(found[0] if len(found) == 1 else found, targets, counted)

    # ---- targets ---------------------------------------------------------------------------------------------------------------------

    def _targets(self, item: Any, where: str) -> Any:
        choice = self.chosen.targets
        if callable(choice):
            return choice(item)
        if choice is not None:
            if isinstance(choice, str | int):
                return _entry(item, choice, where)
            found = {key: _entry(item, key, where) for key in choice}
            return found if all(isinstance(key, str) for key in choice) else tuple(found.values())
        if isinstance(item, Mapping):
            return None if (name := self._label(item, where)) is None else item[name]
        if _is_list(item) and len(item) == 2:
            return item[1]
        if self.takes.loss:
            raise _no_pair(item, where)
        return None

    def _label(self, item: Mapping[Any, Any], where: str) -> str | None:
        """Returns the key of the targets in a dict; without a loss there need be none, and the model must take them."""
        found = [name for name in LABELS if name in item and (self.takes.loss or self._takes(name))]
        if len(found) == 1 or not (found or self.takes.loss):
            return found[0] if found else None
        has = f"no entry {LABELS[0]!r} among {_listed(item)}" if not found else f"the entries {_listed(found)}"
        raise UsageError(
            f"{where} of the data has {has}, so what the targets are is not known: say it with delock.data.Batches(loader, targets=...)"
        )

    # ---- inputs ----------------------------------------------------------------------------------------------------------------------

    def _arguments(self, item: Any, targets: Any, where: str) -> Arguments:
        choice = self.chosen.inputs
        if choice is not None and not callable(choice):
            keys = _keys(choice)
            return (
                [_entry(item, key, where) for key in keys if isinstance(key, int)],
                self._known({key: _entry(item, key, where) for key in keys if isinstance(key, str)}, where),
            )
        if choice is not None:
            found = choice(item)
            return ([], self._known(found, where)) if isinstance(found, Mapping) else self._placed(found)
        if isinstance(item, Mapping):
            left_out = self._left_out(self._label(item, where) if self.chosen.targets is None else None)
            return [], self._known({name: one for name, one in item.items() if name not in left_out}, where)
        if _is_list(item) and self.chosen.targets is not None and not callable(self.chosen.targets):
            left_out = {key % len(item) for key in self._left_out(None) if isinstance(key, int)}
            return [one for i, one in enumerate(item) if i not in left_out], {}
        if _is_list(item) and len(item) == 2:
            return self._of_pair(item[0], targets, where)
        if not self.takes.loss and (isinstance(with_tensors(item), Tensor) or (_is_list(item) and len(item) == 1)):
            return list(item) if _is_list(item) else [item], {}
        raise _no_pair(item, where)

    def _left_out(self, label: str | None) -> set[Key]:
        """Returns the keys of what is no input: the targets, unless the model makes its own loss from them."""
        chosen = self.chosen.targets
        if not self.takes.loss or callable(chosen):
            return set()
        return {*_keys(chosen)} if chosen is not None else {*_keys(label)}

    def _of_pair(self, inputs: Any, targets: Any, where: str) -> Arguments:
        args, kwargs = ([], self._known(inputs, where)) if isinstance(inputs, Mapping) else self._placed(inputs)
        if self.takes.loss:
            return args, kwargs
        if isinstance(targets, Mapping):
            return args, self._known({**kwargs, **targets}, where)
        if kwargs:
            free = [name for name in LABELS if name in self.takes.names and name not in kwargs]
            if len(free) != 1:
                raise UsageError(f"{where} of the data has inputs by name, and targets without one: {_CHOOSE}")
            return args, {**kwargs, free[0]: targets}
        more = list(targets) if _is_list(targets) else [targets]
        if self._fits(len(args) + len(more)):
            return [*args, *more], {}
        if not self._fits(2):
            raise _no_loss(where)
        return [inputs, targets], {}

    def _placed(self, inputs: Any) -> Arguments:
        """Returns inputs without names as arguments: a tuple entry by entry if the model takes as many, else the inputs as one."""
        if not _is_list(inputs):
            return [inputs], {}
        return (list(inputs), {}) if not self.takes.chain and self._fits(len(inputs)) else ([inputs], {})

    def _fits(self, count: int) -> bool:
        return self.takes.most is None or count <= self.takes.most

    def _takes(self, name: Any) -> bool:
        return name in self.takes.names or (self.takes.others and isinstance(name, str) and self._open)

    @property
    def _open(self) -> bool:
        """Returns True if any name will do: forward names none, or the user has chosen."""
        return not self.takes.names or self.chosen.inputs is not None

    def _known(self, found: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """Returns arguments by name. Raises UsageError for one that the model does not take, and for several that a chain would get."""
        unknown = [name for name in found if not self._takes(name)]
        if self.takes.chain:
            if len(found) > 1 and self.chosen.inputs is None:
                raise UsageError(
                    f"{where} of the data has the inputs {_listed(found)}, but a chain of modules takes one: choose it with "
                    f"delock.data.Batches(loader, inputs=[{next(iter(found))!r}])"
                )
        elif unknown and not self.takes.loss and self.chosen.inputs is None and all(name in LABELS for name in unknown):
            raise _no_loss(where)
        elif unknown:
            known = [name for name in found if name not in unknown] or ["..."]
            raise UsageError(
                f"{where} of the data has {_listed(unknown)}, which the model's forward does not take by name: choose its inputs with "
                f"delock.data.Batches(loader, inputs={known!r})"
            )
        return dict(found)

    def _in_order(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Returns the names in the order of forward's arguments, so that the order in a batch does not matter."""
        return [*(name for name in self.takes.names if name in kwargs), *sorted(kwargs.keys() - set(self.takes.names))]

    def _value(self, args: list[Any], kwargs: Mapping[str, Any], where: str) -> Tensor | tuple[Tensor, ...]:
        """Returns what a chain is called with: a tensor or a tuple of tensors."""
        found = [*args, *kwargs.values()]
        given = found[0] if len(found) == 1 else tuple(found)
        value = tuple(given) if isinstance(given, list) else given
        if not is_value(value):
            raise UsageError(f"the inputs of {where} of the data are a {type(given).__name__}, not a tensor or a tuple of tensors")
        return value


_CHOOSE = "say what the model is given with delock.data.Batches(loader, inputs=...)"


def _keys(choice: Any) -> list[Key]:
    """Returns names of entries as a list; none for anything else."""
    keys = [choice] if isinstance(choice, str | int) else choice
    return list(keys) if _is_list(keys) and all(isinstance(key, str | int) for key in keys) else []


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple)


def _entry(item: Any, key: Key, where: str) -> Any:
    """Returns an entry of a batch by its key or place; of an object without entries the attribute."""
    try:
        return item[key]
    except (KeyError, IndexError, TypeError, AttributeError):
        if isinstance(key, str) and hasattr(item, key):
            return getattr(item, key)
        has = f"has {_listed(item)}" if isinstance(item, Mapping) else f"is {_kind(item)}"
        raise UsageError(f"{where} of the data {has}, and no entry {key!r}, which Batches names") from None


def _count(found: Any) -> int:
    """Returns the number that the user's rule gave."""
    number = found.item() if isinstance(found, Tensor) and found.dim() == 0 else found
    if isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0:
        return int(number)
    shown = f"a {type(number).__name__}" if isinstance(number, Tensor) else repr(number)
    raise UsageError(f"samples(batch) returned {shown}, but it must return how many samples the batch has, a whole number")


def _no_pair(item: Any, where: str) -> UsageError:
    return UsageError(
        f"{where} of the data is {_kind(item)}, not a pair (inputs, targets) or a dict: say what is in it with "
        "delock.data.Batches(loader, inputs=..., targets=...)"
    )


def _no_loss(where: str) -> UsageError:
    return UsageError(
        f"{where} of the data has targets, but the model's forward does not take them, and fit is given no loss: give it "
        "loss=loss(outputs, targets), or a model that computes its own from the targets"
    )


def _kind(item: Any) -> str:
    return f"a {type(item).__name__} of {len(item)}" if isinstance(item, list | tuple | Mapping) else f"a {type(item).__name__}"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
