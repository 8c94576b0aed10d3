"""Makes one module per stage from consecutive layers; it keeps the names that its tensors have in the unsplit model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from delock.errors import UsageError
from delock.partition.holdings import beside, held, place
from delock.partition.layers import Layer, listed, named_state, resolve_cuts, state_names, under


class StageModule(nn.Sequential):
    """Runs the layers of one stage in turn, on a tensor or a tuple of tensors. It shares its modules with the model, and is in its mode.

    `original` maps the stage's own name of every parameter and buffer to its name in the unsplit model.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(*(layer.module for layer in layers))
        self.prefixes = [layer.prefix for layer in layers]
        self.training = layers[0].trains
        self.original: dict[str, str] = {
            f"{i}.{name}": under(layer.prefix, name) for i, layer in enumerate(layers) for name in state_names(layer.module)
        }

    def parts_in_words(self) -> list[tuple[str, nn.Module]]:
        """Returns the layers by the names that the user knows them by, for errors: "model.layer1.0"."""
        modules = self._modules.values()  # not children(), which leaves out the second use of a module
        return [
            (f"model.{prefix}" if prefix else "model", one) for prefix, one in zip(self.prefixes, modules, strict=True) if one is not None
        ]

    def original_state(self) -> dict[str, Any]:
        """Returns the `state_dict()` under the names of the unsplit model; tensors share memory with the stage."""
        return {self.original[name]: value for name, value in self.state_dict().items()}


def stages(layers: Sequence[Layer], cuts: Sequence[int | str]) -> list[StageModule]:
    """Returns the K = len(cuts) + 1 stages between the cuts, which are as in `resolve_cuts`.

    Raises UsageError for cuts that `resolve_cuts` refuses, and if two stages share a parameter or buffer.
    """
    bounds = [0, *resolve_cuts(layers, cuts), len(layers)]
    parts = [layers[a:b] for a, b in itertools.pairwise(bounds)]
    _refuse_held(parts, _refuse_shared(parts))
    return [StageModule(part) for part in parts]


def join_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the unsplit model's state dict, joined from the stages' `original_state()` in the order of the stages."""
    whole: dict[str, Any] = {}
    for k, state in enumerate(states):
        if twice := whole.keys() & state.keys():
            raise UsageError(f"stage {k} and a stage before it both hold {listed(sorted(twice))}: these are not the stages of one model")
        whole.update(state)
    return whole


def _refuse_shared(parts: Sequence[Sequence[Layer]]) -> dict[tuple[str, int], tuple[int, str]]:
    """Raises UsageError for a tensor in two stages: in one process it would get two optimizers, in several it would become two tensors.

    Returns the stage and the name of every tensor, by its place.
    """
    owner: dict[tuple[str, int], tuple[int, str]] = {}
    for k, part in enumerate(parts):
        for layer in part:
            for name, tensor in named_state(layer.module):
                stage, first = owner.setdefault(place(tensor), (k, under(layer.prefix, name)))
                if stage != k:
                    raise UsageError(
                        f"{first} (stage {stage}) and {under(layer.prefix, name)} (stage {k}) are the same tensor: "
                        "cut so that both lie in one stage, or give each layer a copy of its own"
                    )
    return owner


def _refuse_held(parts: Sequence[Sequence[Layer]], owner: Mapping[tuple[str, int], tuple[int, str]]) -> None:
    """Raises UsageError for a module that holds a tensor of another stage in a plain attribute or a hook: it would become two tensors."""
    for k, part in enumerate(parts):
        modules = ((under(layer.prefix, path), one) for layer in part for path, one in layer.module.named_modules())
        for holder, one, _ in held((path.rstrip("."), one) for path, module in modules for one in beside(module)):
            stage, name = owner.get(place(one), (k, "")) if isinstance(one, Tensor) else (k, "")
            if stage != k:
                raise UsageError(
                    f"{holder} (stage {k}) holds {name} (stage {stage}) in a plain attribute or a hook, so it would go on with a copy of "
                    "it: cut so that both lie in one stage, or let forward hand on what is needed"
                )
