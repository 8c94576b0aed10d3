"""Defines the options of the step from gradient to weights, and the defaults that every optimizer has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

from delock.cli.config.defaults import either, resolved, shown
from delock.errors import UsageError

RATES: Mapping[str, float] = MappingProxyType({"sgd": 0.1, "adam": 0.001, "adamw": 0.001, "nadamw": 0.001, "muon": 0.02, "soap": 0.003})
BETAS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"adam": (0.9, 0.999), "adamw": (0.9, 0.999), "nadamw": (0.9, 0.999), "muon": (0.9, 0.95), "soap": (0.95, 0.95)}
)
BETAS_WITH_SPIKE = (0.95, 0.99)
HORIZONS: Mapping[str, float] = MappingProxyType({"adamw": 2.0, "sgd": 1.0})
"""Horizons of spike compensation, in staleness: r of optim.spike."""
DECAY, DECAY_OF_TEXT = 5e-4, 0.1  # the latter is that of optimizers which do not add it to the gradient
DECOUPLED = ("adamw", "nadamw", "muon", "soap")


def _beta(i: int) -> Any:
    return shown(f"{_each({name: betas[i] for name, betas in BETAS.items()})}; with spike {BETAS_WITH_SPIKE[i]}")


def _each(values: Mapping[str, float]) -> str:
    """Returns the values with their optimizers: sgd 0.1; adam, adamw, nadamw 0.001; muon 0.02."""
    return "; ".join(f"{', '.join(name for name in values if values[name] == value)} {value}" for value in dict.fromkeys(values.values()))


@dataclass(frozen=True)
class UpdateOptions:
    """The step from gradient to weights. Every stage has an optimizer of its own."""

    optimizer: Annotated[Literal["sgd", "adam", "adamw", "nadamw", "muon", "soap"] | None, either("optimizer")] = None
    """muon is for the matrices inside a network and has adamw for all else; soap needs the package pytorch-optimizer."""
    correct: Annotated[tuple[Literal["spike", "feedback", "ahead"], ...], shown("none", "{spike,feedback,ahead} ...")] = ()
    """Corrections for gradients that are late. spike (of adamw, and of sgd with momentum) gives them at once the weight that they would
    have had by now; feedback (of any optimizer) adds to an update its difference from the one that their staleness ago was made; ahead
    is the option --ahead of the method, with part."""
    horizon: Annotated[float | None, shown(_each(HORIZONS))] = None
    """spike: by how many times its own staleness a gradient is made up for. adamw: 3 is better below one update late."""
    lr: Annotated[float | None, shown(_each(RATES))] = None
    """Learning rate of an update, after the warm-up. muon: that of its matrices, and a tenth of it is that of its adamw."""
    momentum: Annotated[float | None, shown("0.9")] = None
    """sgd: momentum."""
    nesterov: bool = False
    """sgd: Nesterov's form of momentum."""
    beta1: Annotated[float | None, _beta(0)] = None
    """All but sgd: the part of the gradients' mean that is kept in an update. muon: that of its adamw."""
    beta2: Annotated[float | None, _beta(1)] = None
    """All but sgd: the same of their squares' mean. muon: that of its adamw."""
    weight_decay: Annotated[float | None, shown(f"{DECAY}; on text, {', '.join(DECOUPLED)} {DECAY_OF_TEXT}")] = None
    """Weight decay. sgd, adam: of all parameters; adamw, nadamw, soap: not of biases, norms and embeddings; muon: of its matrices."""


def filled(config: UpdateOptions) -> UpdateOptions:
    """Returns the options with the defaults of their optimizer; of the corrections `ahead` is left out, as it is the method's option.

    Raises UsageError for options of another optimizer, and for a correction that the optimizer does not have.
    """
    name, spike = resolved(config.optimizer), "spike" in config.correct
    if name != "sgd" and (config.momentum is not None or config.nesterov):
        raise UsageError(f"momentum and nesterov are options of sgd, and the optimizer is {name}")
    if name == "sgd" and (config.beta1, config.beta2) != (None, None):
        raise UsageError(f"beta1 and beta2 are options of {', '.join(BETAS)}, and the optimizer is sgd: give --momentum instead")
    momentum = 0.9 if name == "sgd" and config.momentum is None else config.momentum
    if config.nesterov and not momentum:
        raise UsageError("nesterov needs a momentum above 0")
    if config.horizon is not None and not spike:
        raise UsageError("horizon belongs to the correction spike: give --correct spike, or leave horizon out")
    if spike:
        _refuse_spike(name, momentum, config.nesterov)
    beta1, beta2 = BETAS_WITH_SPIKE if name == "adamw" and spike else BETAS.get(name, (None, None))
    return replace(
        config,
        correct=tuple(one for one in ("spike", "feedback") if one in config.correct),
        horizon=HORIZONS[name] if spike and config.horizon is None else config.horizon,
        lr=RATES[name] if config.lr is None else config.lr,
        momentum=momentum,
        beta1=beta1 if config.beta1 is None else config.beta1,
        beta2=beta2 if config.beta2 is None else config.beta2,
    )


def _refuse_spike(name: str, momentum: float | None, nesterov: bool) -> None:
    out = "leave spike out of --correct"
    if name not in ("adamw", "sgd"):
        raise UsageError(f"spike is a correction of adamw and of sgd, and the optimizer is {name}: use adamw, or {out}")
    if name == "sgd" and not momentum:
        raise UsageError(f"spike makes up for momentum, and momentum is 0: give one above 0, as --momentum 0.9, or {out}")
    if nesterov:
        raise UsageError(f"spike and nesterov are two forms of one correction: leave out --nesterov, or {out}")
