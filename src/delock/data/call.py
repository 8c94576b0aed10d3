"""A call of a model: which argument of its forward each tensor of a batch is, and what beside tensors it is given."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from delock.errors import UsageError
from delock.tensors import Tree, flatten, unflatten

WRAPPED = ("_orig_mod", "module", "base_model", "model")  # where wrappers with a forward(*args, **kwargs) keep the model


@dataclass(frozen=True)
class Call:
    """Says how a model is called with the tensors of a batch: model(*args, **kwargs), where all that is no tensor is the same every time.

    Two calls are equal if they give the same arguments the same way. It can be pickled.
    """

    shape: Any = ("u", ("u", ("t", 0)), ("d",))  # of (args, kwargs), as `tensors.flatten` returns it

    @classmethod
    def of(cls, args: Sequence[Tree], kwargs: dict[str, Tree]) -> tuple[Call, tuple[Tensor, ...]]:
        """Returns the call with these arguments, trees of tensors and plain values, and its tensors. Raises UsageError for others."""
        shape, found = flatten((tuple(args), kwargs))
        return cls(shape), tuple(found)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns args and kwargs with these tensors in their places."""
        args, kwargs = unflatten(self.shape, tensors)
        return args, kwargs

    def tensors(self, *args: Tree, **kwargs: Tree) -> tuple[Tensor, ...]:
        """Returns the tensors of a call with these arguments, in order. Raises UsageError if they have another form."""
        found, tensors = Call.of(args, kwargs)
        if found != self:
            raise UsageError(f"the model is given {found.words()}, where it was given {self.words()} before")
        return tensors

    def words(self) -> str:
        """Returns the arguments in words: "(tensor, mask=tensor, use_cache=False)"."""
        _, args, kwargs = self.shape
        shown = [*(_shown(one) for one in args[1:]), *(f"{name}={_shown(one)}" for name, one in kwargs[1:])]
        return f"({', '.join(shown)})"


def _shown(shape: Any) -> str:
    match shape:
        case ("t", _):
            return "tensor"
        case ("c", text, _):
            return str(text)
        case ("d", *items):
            return "{" + ", ".join(f"{name!r}: {_shown(one)}" for name, one in items) + "}"
    return f"{'(' if shape[0] == 'u' else '['}{', '.join(map(_shown, shape[1:]))}{')' if shape[0] == 'u' else ']'}"


@dataclass(frozen=True)
class Takes:
    """Says what a model takes of a batch. The default is a chain: one argument, a tensor or a tuple of them, called with what there is."""

    chain: bool = True
    names: tuple[str, ...] = ()  # of the arguments of forward, in its order
    most: int | None = 1  # arguments by position; None: any number
    others: bool = False  # forward has **kwargs
    loss: bool = True  # a loss is given, so the model does not take the targets


def takes(model: nn.Module | Sequence[nn.Module], *, loss: bool = True) -> Takes:
    """Returns what a model takes, by the signature of its forward; a wrapper's is that of what it wraps.

    loss: a loss is given; else the model makes its own from the targets, which are inputs then.
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.ModuleList) or _is_chain(model):
        return Takes(loss=loss)
    try:
        found = inspect.signature(model.forward).parameters.values()
    except ValueError:  # compiled code has none
        return Takes(False, (), None, True, loss)
    inside = next((one for name, one in model.named_children() if name in WRAPPED), None)  # some wrappers answer for what they wrap
    if inside is not None and all(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in found):
        return takes(inside, loss=loss)
    by_place = [one for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return Takes(
        chain=False,
        names=tuple(one.name for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)),
        most=None if any(one.kind is one.VAR_POSITIONAL for one in found) else len(by_place),
        others=any(one.kind is one.VAR_KEYWORD for one in found),
        loss=loss,
    )


def _is_chain(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward
