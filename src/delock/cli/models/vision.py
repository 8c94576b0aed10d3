"""Builds the classification networks of torchvision and of timm for the images of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from delock.cli.models.facts import SIZES, Facts, wanted
from delock.cli.models.names import TIMM, TORCHVISION
from delock.data.seeding import seeded
from delock.errors import UsageError, said

AUXILIARY = ("googlenet", "inception_v3")  # have classifiers in the middle, which would add outputs in training
SIZED = ("vit_", "maxvit")  # have weights for one size of images


def build_vision(model: str, of: Facts, seed: int) -> nn.Module:
    """Returns torchvision/NAME or timm/NAME for these images, with random weights that follow from the seed.

    Raises UsageError for a name that the library does not have, and for images that the network cannot take.
    """
    given = wanted(model, of, *SIZES)
    make = _timm if model.startswith(TIMM) else _torchvision
    try:
        return make(model, seed, **given)
    except UsageError:
        raise
    except Exception as error:
        size, channels = given["image_size"], given["channels"]
        raise UsageError(f"{model} cannot be made for images of {channels} x {size} x {size}: {said(error)}") from error


def _torchvision(model: str, seed: int, *, classes: int, channels: int, image_size: int) -> nn.Module:
    from torchvision import models

    name = model.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise unknown(model, name, known, TORCHVISION)
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    if name.startswith(SIZED):
        options |= {"input_size": (image_size, image_size)} if name.startswith("maxvit") else {"image_size": image_size}
    with seeded(seed):
        made: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
        if channels != 3:
            _for_channels(made, channels)
    return made


def _for_channels(model: nn.Module, channels: int) -> None:
    """Puts a new first convolution, for other images than colour ones, in place of the model's, with He et al.'s initial weights."""
    name: str
    first: Any
    name, first = next((name, one) for name, one in model.named_modules() if isinstance(one, nn.Conv2d))
    as_before = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")}
    new = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **as_before)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, new)


def _timm(model: str, seed: int, *, classes: int, channels: int, image_size: int) -> nn.Module:
    timm = _imported_timm(model)
    name = model.removeprefix(TIMM)
    if not timm.is_model(name):
        raise unknown(model, name, timm.list_models(), TIMM)

    def create(**options: int) -> nn.Module:
        with seeded(seed):
            made: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **options)
        return made

    return _without_unknown(create, img_size=image_size)


def _without_unknown(create: Callable[..., nn.Module], **options: int) -> nn.Module:
    """Returns create(**options), without an option that it does not take."""
    try:
        return create(**options)
    except TypeError as error:
        unknown = [option for option in options if f"unexpected keyword argument '{option}'" in str(error)]
        if not unknown:
            raise
    return create(**{option: value for option, value in options.items() if option not in unknown})


def _imported_timm(model: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"{model} comes from a package that is not installed: pip install 'delock[timm]'") from error
    return timm


def unknown(model: str, name: str, known: Sequence[str], family: str) -> UsageError:
    """Returns the error for a name that a library does not have, with near ones."""
    near = [f"{family}{one}" for one in get_close_matches(name, known, n=3)]
    return UsageError(
        f"no model is called {model!r}: " + (f"did you mean {' or '.join(map(repr, near))}?" if near else _some(known, family))
    )


def _some(known: Sequence[str], family: str) -> str:
    return f"{family[:-1]} has {len(known)}, such as {family}{known[0]}"
