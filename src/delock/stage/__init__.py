"""A stage: one slice of the network with its optimizer and its memory."""

from delock.execution import Loss
from delock.stage.in_flight import InFlight
from delock.stage.learner import OptimizerFactory, ScheduleFactory
from delock.stage.stage import BackwardResult, Stage

__all__ = ["BackwardResult", "InFlight", "Loss", "OptimizerFactory", "ScheduleFactory", "Stage"]
