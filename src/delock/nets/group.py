"""A Sequential between whose children a cut may fall."""

from __future__ import annotations

from torch import nn


class Group(nn.Sequential):
    """A Sequential between whose children a cut may fall: `atoms` looks inside it, where it takes any other child as one piece."""
