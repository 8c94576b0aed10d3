"""Holds the defaults that differ between images and text, and describes for --help those that depend on other options."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from tyro.conf import arg

T = TypeVar("T")

# digits is past 97 % test accuracy with time to spare
IMAGES: Mapping[str, Any] = MappingProxyType(
    {"method": "ddg", "model": "resnet8", "batch_size": 64, "epochs": 20, "optimizer": "sgd", "warmup": 0}
)
# about 2,000 updates on the embedded text, some minutes on two cores; method and optimizer are those that lose least (docs/choosing.md)
TEXT: Mapping[str, Any] = MappingProxyType(
    {
        **{"method": "ddg", "model": "gpt", "batch_size": 16, "epochs": 10, "optimizer": "muon", "warmup": 100},
        **{"level": "char", "context": 128, "depth": 4, "width": 128, "attention_heads": 4},
    }
)


def shown(default: str, values: str | None = None) -> Any:
    """Describes for --help the default of an option that is worked out later, and its values if it takes several."""
    return arg(help_behavior_hint=f"(default: {default})", metavar=values)


def either(name: str) -> Any:
    """Describes for --help the default of an option that differs between images and text."""
    return shown(f"{IMAGES[name]}; text: {TEXT[name]}")


def text(name: str) -> Any:
    """Describes for --help the default of an option of language models."""
    return shown(str(TEXT[name]))


def resolved(value: T | None) -> T:
    """Returns an option of a resolved config whose default depends on others."""
    assert value is not None, "resolve fills it in"
    return value
