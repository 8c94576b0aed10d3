"""The zoo: tiny models of nine families, as their libraries and users make them, those that must be refused, and plain PyTorch's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zoo_habits
import zoo_own
import zoo_sequences
import zoo_text
import zoo_timm
import zoo_torchvision
from specimens import Specimen
from zoo_odd import ODD
from zoo_refused import REFUSED

__all__ = ["ODD", "REFUSED", "ZOO", "state", "train"]

ZOO = {one.name: one for family in (zoo_torchvision, zoo_timm, zoo_text, zoo_sequences, zoo_own, zoo_habits) for one in family.SPECIMENS}


def output_and_loss(specimen: Specimen, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
    """Calls the model as its author meant it: with one tensor, with several in order, or with a dict by name."""
    if specimen.loss is None:
        out = model(**batch)
        return out, out["loss"]
    inputs, targets = batch
    match inputs:
        case dict():
            out = model(**inputs)
        case tuple():
            out = model(*inputs)
        case _:
            out = model(inputs)
    return out, specimen.loss(out, targets)


def train(specimen: Specimen, batches: Sequence[Any] | None = None) -> tuple[dict[str, Tensor], list[float], float]:
    """Trains the unsplit model in plain PyTorch; returns its state, the losses, and the loss of the test batch."""
    model = specimen.model()
    optimizer = specimen.fit_options()["optimizer"](model.parameters())
    losses: list[float] = []
    model.train()
    for batch in specimen.train() if batches is None else batches:
        _, loss = output_and_loss(specimen, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        _, loss = output_and_loss(specimen, model, specimen.test()[0])
    return state(model), losses, loss.item()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer, those too that a state dict leaves out."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
