"""A plan: every stage's program in order, unrolled from a method, checked before anything runs, and drawn as text."""

from delock.plan.chart import chart
from delock.plan.needs import Name, gives, named, needs
from delock.plan.steps import Course, Keep, Plan, PlanError, Step
from delock.plan.unroll import unroll, windows
from delock.plan.walk import check, walk

__all__ = ["Course", "Keep", "Name", "Plan", "PlanError", "Step", "chart", "check", "gives", "named", "needs", "unroll", "walk", "windows"]
