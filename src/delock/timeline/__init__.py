"""Computes time as a pass over a plan: predicted and measured timelines, staleness, memory in flight. It loads no torch."""

from delock.timeline.costs import Costs, Emulation, Slowdown, straggler
from delock.timeline.facts import stage_facts, warm_ages
from delock.timeline.measures import idle, messages, period, steady, throughput
from delock.timeline.predict import Prediction, StageForecast, capacities, predict, speedup
from delock.timeline.reasons import KINDS, reasons
from delock.timeline.simulate import clocked, simulate
from delock.timeline.spans import Span, Timeline, Times
from delock.timeline.stability import longest_step
from delock.timeline.staleness import HeldCounts, gradient_staleness, in_flight, layer_staleness, warm_group

__all__ = [
    "KINDS",
    "Costs",
    "Emulation",
    "HeldCounts",
    "Prediction",
    "Slowdown",
    "Span",
    "StageForecast",
    "Timeline",
    "Times",
    "capacities",
    "clocked",
    "gradient_staleness",
    "idle",
    "in_flight",
    "layer_staleness",
    "longest_step",
    "messages",
    "period",
    "predict",
    "reasons",
    "simulate",
    "speedup",
    "stage_facts",
    "steady",
    "straggler",
    "throughput",
    "warm_ages",
    "warm_group",
]
