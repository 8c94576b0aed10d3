"""Builds auxiliary heads, the layers that give the output of a stage a loss of its own, and counts their cost beside their stage."""

from delock.nets.heads.build import HEADS, build_head, choose
from delock.nets.heads.cost import HeadShare, flops, head_share
from delock.nets.heads.fit import Logits, build_fitting, fitting

__all__ = ["HEADS", "HeadShare", "Logits", "build_fitting", "build_head", "choose", "fitting", "flops", "head_share"]
