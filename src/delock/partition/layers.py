"""Takes a model apart into layers, the pieces between which it can be cut, and finds the cuts that the user names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from delock.errors import UsageError
from delock.nets.cut_point import CutPoint
from delock.nets.group import Group

ACCEPTED = "a model is a module, or a list of modules that are called one after the other"


@dataclass(frozen=True, slots=True)
class Layer:
    """Holds one layer: the smallest piece of a model that is never cut.

    `prefix`: the module's path in the unsplit model ("layer1.0"), or "" for a module without state that only the adapter added.
    `trains`: the model was in training mode, so what of the layer was not stays as it is. `begins`: the path of the module that it begins
    with, where it is a piece of a traced model, whose parts have their paths in the unsplit model already. `also`: further names of the
    place in front of it, as of a CutPoint; `ties`: parameters of earlier pieces that are sent to it, and their bytes.
    """

    prefix: str
    module: nn.Module
    trains: bool = True
    begins: str = ""
    also: tuple[str, ...] = ()
    ties: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """Returns the path of the module that the layer is or begins with; "" for one that only the adapter added."""
        return self.prefix or self.begins

    def called(self, i: int) -> str:
        """Returns what an error calls layer i of a model."""
        kind = type(self.module).__name__
        return f"layer {i} ({self.name}, {kind})" if self.name else f"layer {i} ({kind})"


def is_chain(model: object) -> bool:
    """Returns True for a model that `layers` takes apart as it is: its parts are called one after the other."""
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        return _is_plain(model) or _is_torchvision_resnet(model)
    return True


def layers(model: nn.Module | Sequence[nn.Module]) -> list[Layer]:
    """Returns the layers of a model in the order of its forward; the modules are the model's own, not copies.

    An nn.Sequential gives its children; if a child is a `Group`, or the only child and a Sequential, it gives that child's children
    instead. A list gives its elements, named "0", "1", ... A torchvision ResNet gives stem, residual blocks and classifier. A CutPoint
    among them is no layer, but a name of the place in front of the next one.
    Raises UsageError for any other model, for an empty one, and for one with state outside its layers.
    """
    if isinstance(model, (list, tuple, nn.ModuleList)):
        found = [Layer(str(i), _module(part)) for i, part in enumerate(model)]
    elif isinstance(model, nn.Module) and _is_plain(model):
        found = list(_children(*_only_child("", model)))
    elif isinstance(model, nn.Module) and _is_torchvision_resnet(model):
        found = list(_resnet(model))
    else:
        raise UsageError(f"cannot cut a {type(model).__name__} into stages: {ACCEPTED}")
    found = _named_by_cut_points(found)
    if not found:
        raise UsageError("cannot train an empty network: the model has no layer")
    if isinstance(model, nn.Module) and (lost := set(state_names(model)) - set(_names(found))):
        raise UsageError(f"{listed(sorted(lost))} of the {type(model).__name__} would belong to no stage: move it into one of the layers")
    trains = not isinstance(model, nn.Module) or model.training
    trains = trains and any(one.training for layer in found for one in layer.module.modules() if not one._modules)
    return [replace(layer, trains=trains) for layer in found]


def _named_by_cut_points(found: Sequence[Layer]) -> list[Layer]:
    kept: list[Layer] = []
    names: tuple[str, ...] = ()
    for layer in found:
        if isinstance(layer.module, CutPoint):
            names += (layer.prefix,)
        else:
            kept.append(replace(layer, also=names))
            names = ()
    return kept


def resolve_cuts(layers: Sequence[Layer], cuts: Sequence[int | str]) -> list[int]:
    """Returns the index of the first layer of each later stage: K - 1 strictly increasing numbers in 1 .. len(layers) - 1.

    A cut is an index, also as a string, or a name: that of a layer ("layer2.0"), of a CutPoint, or of a group ("layer2" means its first
    layer).
    Raises UsageError for an unknown name, an index out of range, cuts out of order, and more stages than layers.
    """
    if len(cuts) >= len(layers):
        raise UsageError(f"{len(cuts) + 1} stages need at least as many layers, and this network has {len(layers)}: use fewer stages")
    found = [_index(layers, cut) for cut in cuts]
    for cut, at in zip(cuts, found, strict=True):
        if not 1 <= at < len(layers):
            raise UsageError(f"cut {cut!r} is out of range: a later stage starts at one of the layers 1 .. {len(layers) - 1}")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise UsageError(f"cuts {', '.join(map(str, cuts))} are out of order (layers {found}): each must be above the one before")
    return found


def has_batch_norm(layers: Iterable[Layer]) -> bool:
    """Returns True if a layer takes batch statistics in training; then a batch of one sample cannot be trained."""
    norms = ((layer, one) for layer in layers for one in layer.module.modules() if isinstance(one, _BatchNorm))
    return any(norm.training or not layer.trains or norm.running_mean is None for layer, norm in norms)


def _module(part: object) -> nn.Module:
    if not isinstance(part, nn.Module):
        raise UsageError(f"cannot use a {type(part).__name__} as a layer: {ACCEPTED}")
    return part


def _is_plain(module: nn.Module) -> bool:
    """Returns True if the module calls its children in turn; a subclass of nn.Sequential may compute something else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not _does_more(module)


def _does_more(module: nn.Module) -> bool:
    """Returns True for a module whose call is more than its forward: it has hooks, or another `__call__`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or type(module).__call__ is not nn.Module.__call__


def _only_child(prefix: str, model: nn.Module) -> tuple[str, nn.Module]:
    """Returns the innermost Sequential, and its prefix, of a chain of Sequentials that each hold nothing but the next one."""
    for name, child in model.named_children():
        if len(model._modules) == 1 and _is_plain(child):
            return _only_child(under(prefix, name), child)
    return prefix, model


def _children(prefix: str, model: nn.Module) -> Iterator[Layer]:
    for name, child in model._modules.items():  # not named_children: it leaves out the second use of a module
        assert child is not None
        if isinstance(child, Group) and _is_plain(child):
            yield from _children(under(prefix, name), child)
        else:
            yield Layer(under(prefix, name), child)


def _is_torchvision_resnet(model: nn.Module) -> bool:
    """Returns True for a torchvision ResNet with its own forward; compares names, so that torchvision is not imported."""
    base = next((c for c in type(model).__mro__ if (c.__module__, c.__name__) == ("torchvision.models.resnet", "ResNet")), None)
    return (
        base is not None
        and not _does_more(model)
        and all(getattr(type(model), f) is getattr(base, f) for f in ("forward", "_forward_impl"))
    )


def _resnet(model: nn.Module) -> Iterator[Layer]:
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        module = model.get_submodule(name)
        yield from _children(name, module) if name.startswith("layer") and _is_plain(module) else [Layer(name, module)]
    yield Layer("", nn.Flatten(1))  # torch.flatten in ResNet's forward
    yield Layer("fc", model.get_submodule("fc"))


def under(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def named_state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def state_names(module: nn.Module) -> list[str]:
    """Returns all names in the state dict, in its order (extra state too), then the buffers that it leaves out, or that are none yet."""
    none = (under(at, name) for at, one in module.named_modules() for name, buffer in one._buffers.items() if buffer is None)
    return list(dict.fromkeys([*module.state_dict(), *(name for name, _ in named_state(module)), *none]))


def _names(layers: Sequence[Layer]) -> list[str]:
    return [under(layer.prefix, name) for layer in layers for name in state_names(layer.module)]


def _index(layers: Sequence[Layer], cut: int | str) -> int:
    if isinstance(cut, int):
        return cut
    names = [layer.name for layer in layers]
    if cut and cut in names:
        return names.index(cut)
    inside = [i for i, layer in enumerate(layers) if cut and (cut in layer.also or layer.name.startswith(f"{cut}."))]
    if inside:
        return inside[0]
    if cut.strip().removeprefix("-").isdecimal():
        return int(cut)
    if whole := around(layers, cut):
        raise UsageError(f"{cut} lies inside {whole}, which is called as a whole: cut in front of a layer")
    known = [*filter(None, names), *(name for layer in layers for name in (*layer.also, *_parts(layer)))]
    near = difflib.get_close_matches(cut, known, n=1, cutoff=0)
    raise UsageError(f"no layer is called {cut!r}: did you mean {near[0]!r}?" if near else f"no layer is called {cut!r}")


def around(layers: Sequence[Layer], name: str) -> str:
    """Returns what an error calls the layer of a chain that a module lies inside of, by its path; "" if there is none."""
    return next((layer.called(i) for i, layer in enumerate(layers) if name in _parts(layer)), "")


def _parts(layer: Layer) -> list[str]:
    """Returns the paths of the modules inside a layer of a chain."""
    return [under(layer.prefix, path) for path, _ in layer.module.named_modules() if path] if layer.prefix else []


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
