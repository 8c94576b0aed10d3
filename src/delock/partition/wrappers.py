"""Takes a model out of what it is wrapped in, where that has no meaning for stages, and refuses wrappers that would train otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from delock.errors import UsageError

COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
PARALLEL = ("torch.nn.parallel.data_parallel", "DataParallel")
REFUSED: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("torch.nn.parallel.distributed", "DistributedDataParallel"): (
            "its copies exchange gradients in a backward of the whole model, which stages do not have: give its module, as model.module, "
            "and start the script by torchrun with a rank for each stage"
        ),
        ("torch.optim.swa_utils", "AveragedModel"): (
            "it averages the weights of another model and learns nothing itself: train the model that it averages, and call its "
            "update_parameters afterwards"
        ),
    }
)


def unwrapped(model: nn.Module, *, compiles: bool = False) -> nn.Module:
    """Returns the model inside torch.compile and DataParallel. Raises UsageError for a wrapper that trains in another way.

    compiles: the stages will be compiled; else a warning says how they can be. Names are compared, so that nothing more is imported.
    """
    kinds = {(one.__module__, one.__name__) for one in type(model).__mro__}
    if (found := next((one for one in REFUSED if one in kinds), None)) is not None:
        raise UsageError(f"a model in {found[1]} cannot be trained in stages: {REFUSED[found]}")
    if COMPILED in kinds or model._compiled_call_impl is not None:
        if not compiles:
            warnings.warn(
                "the model is compiled as a whole, which stages have no use for: they run the model inside it as it is; "
                "execution=delock.Execution(compile=True) compiles them",
                stacklevel=3,
            )
        compiles = True
    inside = {COMPILED: "_orig_mod", PARALLEL: "module"}
    name = next((inside[one] for one in inside if one in kinds), None)
    return unwrapped(model.get_submodule(name), compiles=compiles) if name else model
