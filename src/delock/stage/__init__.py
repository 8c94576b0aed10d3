"""A stage: one slice of the network with its optimizer and its memory."""

from delock.stage.in_flight import InFlight
from delock.stage.learner import OptimizerFactory, ScheduleFactory
from delock.stage.stage import Loss, Stage

__all__ = ["InFlight", "Loss", "OptimizerFactory", "ScheduleFactory", "Stage"]
