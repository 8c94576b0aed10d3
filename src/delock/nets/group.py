"""Marks the Sequentials whose children are layers of their own."""

from __future__ import annotations

from torch import nn


class Group(nn.Sequential):
    """Marks a Sequential that may be cut between its children: `partition.layers.layers` takes each child as a layer of its own."""
