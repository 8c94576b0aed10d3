"""A stage: one slice of the network with its optimizer and its memory."""

from delock.stage.learner import OptimizerFactory, ScheduleFactory
from delock.stage.memory import Memory
from delock.stage.stage import Loss, Stage

__all__ = ["Loss", "Memory", "OptimizerFactory", "ScheduleFactory", "Stage"]
