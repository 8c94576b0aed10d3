"""A plan: every stage's program in order, unrolled from a method, checked before anything runs, and drawn as text."""

from delock.errors import PlanError
from delock.plan.chart import chart
from delock.plan.needs import Product, gives, named, needs, needs_error, received
from delock.plan.open_ended import OpenPlan
from delock.plan.steps import Keep, Plan, RunLength, Step
from delock.plan.unroll import rest, sends_errors, unroll, windows
from delock.plan.walk import check, walk

__all__ = [
    "Keep",
    "OpenPlan",
    "Plan",
    "PlanError",
    "Product",
    "RunLength",
    "Step",
    "chart",
    "check",
    "gives",
    "named",
    "needs",
    "needs_error",
    "received",
    "rest",
    "sends_errors",
    "unroll",
    "walk",
    "windows",
]
