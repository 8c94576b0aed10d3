"""Builds auxiliary heads, the layers that give the output of a stage a loss of its own, and counts their cost beside their stage."""

from delock.nets.heads.build import HEADS, build_head, choose
from delock.nets.heads.cost import HeadShare, flops, head_share

__all__ = ["HEADS", "HeadShare", "build_head", "choose", "flops", "head_share"]
