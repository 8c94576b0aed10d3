"""Pickles modules with parametrizations, as of torch.nn.utils.parametrizations: torch gives each a class of its own, and refuses to.

The class is made anew where the module arrives, by the functions of torch that have made it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

MAKERS = ("_inject_new_class", "_inject_property")  # names of torch.nn.utils.parametrize, which not every torch has


def reduced(value: Any) -> Any:
    """Returns how such a module is pickled, as `pickle.Pickler.reducer_override` does: NotImplemented for all else."""
    if not isinstance(value, nn.Module) or not parametrize.is_parametrized(value) or not all(hasattr(parametrize, one) for one in MAKERS):
        return NotImplemented
    state = dict(vars(value))
    hooks = state.get("_load_state_dict_pre_hooks", {})  # torch's own, local functions, read state dicts of the old weight_norm
    state["_load_state_dict_pre_hooks"] = type(hooks)((k, one) for k, one in hooks.items() if not _is_torchs(one))
    return made_again, (type(value).__bases__[0], list(value.parametrizations)), state  # type: ignore[arg-type]


def _is_torchs(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.nn.utils.")


def made_again(base: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """Returns an empty module of the class that torch makes for these parametrized tensors."""
    new_class, new_property = (getattr(parametrize, one) for one in MAKERS)
    module: nn.Module = base.__new__(base)
    new_class(module)
    for name in names:
        new_property(module, name)
    return module
