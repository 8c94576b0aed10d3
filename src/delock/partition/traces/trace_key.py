"""Makes the key of a trace: a digest of the model's code and configuration, of what it is traced with, and of the versions at work."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from delock.data.call import Call
from delock.partition.graph.examples import Examples
from delock.partition.traces.description import Description
from delock.partition.traces.installed import UndescribedError, own_source

PREFIXES = ("TORCH", "PYTORCH", "ATEN_", "MKL_", "ONEDNN_", "DNNL_", "OMP_", "HF_", "TRANSFORMERS_")


def trace_key(model: nn.Module, call: Call, given: Examples, *asked: object) -> str:
    """Returns the key, or "" for a model that cannot be described with certainty. asked: what else is wanted of the pieces."""
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    found = Description(state)
    try:
        found.add(model)
        found.each([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        found.add(call.shape)
        for batch in (given.first, given.other, given.single):
            found.each((x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.layout) for x in batch)
        found.each(asked)
        found.each(_versions(found))
        _code(found)
        found.each((name, os.environ[name]) for name in sorted(os.environ) if name.startswith(PREFIXES) or name in found.texts)
    except Exception:  # an object of the user's raises whatever it likes when it is looked at; then nothing is kept
        return ""
    return found.digest()


def _versions(found: Description) -> Iterator[Any]:
    """Yields what else decides how a model computes: versions, the processor, and the flags of torch."""
    yield from (sys.version, str(torch.__version__), str(torch.version.cuda), torch.backends.cpu.get_cpu_capability())
    yield from found.installed.distributions()
    yield from own_source()
    yield from (torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision())
    yield from (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    for kind in ("cpu", "cuda"):
        yield from (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
    yield from (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled)
    cuda: Any = torch.backends.cuda
    yield from (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())


def _code(found: Description) -> None:
    """Takes the modules that the description has noted, and those noted meanwhile: of opened ones what the code can name in them."""
    told: set[tuple[str, str]] = set()
    modules = 0
    while modules < len(found.modules) or _unsaid(found, told):
        for module in list(found.modules.values())[modules:]:
            modules += 1
            _file(found, module)
        for name, one in sorted(_unsaid(found, told)):
            told.add((name, one))
            found.say(name, one)
            found.add(vars(found.opened[name])[one])


def _unsaid(found: Description, told: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Returns names in opened modules that the code mentions, and that have not been described. Of installed ones, modules count alone."""
    said = found.names | found.texts
    pairs = {(name, one) for name, module in found.opened.items() for one in said & vars(module).keys()} - told
    return {(name, one) for name, one in pairs if _counts(found, found.opened[name], one)}


def _counts(found: Description, module: ModuleType, name: str) -> bool:
    return isinstance(vars(module)[name], ModuleType) or not found.installed(module)


def _file(found: Description, module: ModuleType) -> None:
    """Takes the file of a module. Raises UndescribedError if one of the user's has none, as in a notebook."""
    found.say(module.__name__)
    path = Path(getattr(module, "__file__", None) or "-")
    if path.suffix == ".py" and path.is_file():
        found.say(path.read_bytes())
    elif not found.installed(module):
        raise UndescribedError(f"the module {module.__name__} has no file")
    for name, value in sorted(vars(module).items()) if found.installed(module) else ():
        if type(value) in (bool, int):
            found.say(name, value)
        for one in (value, *_registered(value)):
            if found.installed.is_patched(one):
                found.say(name)
                found.add(one)


def _registered(value: Any) -> Iterator[Any]:
    """Yields what a dict holds, or a registry such as that of attention functions in transformers."""
    inside = (
        [value, *vars(value).values(), *vars(type(value)).values()]
        if isinstance(value, Mapping) and hasattr(value, "__dict__")
        else [value]
    )
    for one in inside:
        yield from one.values() if type(one) in (dict, OrderedDict) else ()
