"""Time as a pass over a plan: predicted and measured timelines, staleness, memory in flight. No torch."""

from delock.timeline.costs import Costs, Slowdown
from delock.timeline.emulation import Emulation, straggler
from delock.timeline.measures import idle, messages, period, steady, throughput
from delock.timeline.memory import Footprint, Sizes, Way, peaks, repeating
from delock.timeline.predict import Prediction, StageForecast, capacities, predict
from delock.timeline.reasons import KINDS, reasons
from delock.timeline.simulate import simulate
from delock.timeline.slots import slots
from delock.timeline.spans import Span, Timeline
from delock.timeline.staleness import InFlight, gradient_staleness, in_flight, layer_staleness, warm_mean

__all__ = [
    "KINDS",
    "Costs",
    "Emulation",
    "Footprint",
    "InFlight",
    "Prediction",
    "Sizes",
    "Slowdown",
    "Span",
    "StageForecast",
    "Timeline",
    "Way",
    "capacities",
    "gradient_staleness",
    "idle",
    "in_flight",
    "layer_staleness",
    "messages",
    "peaks",
    "period",
    "predict",
    "reasons",
    "repeating",
    "simulate",
    "slots",
    "steady",
    "straggler",
    "throughput",
    "warm_mean",
]
