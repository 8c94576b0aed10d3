"""Walks a plan in an order that respects the dependency rule, and checks that there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from delock.errors import PlanError
from delock.ops import Backward, Op, Update, label
from delock.plan.chart import chart
from delock.plan.needs import Product, gives, named, needs
from delock.plan.steps import Plan, Step


def walk(plan: Plan) -> Iterator[tuple[int, Step]]:
    """Yields all steps in an order that respects `needs`, tick by tick. What lies before the window counts as done.

    Raises PlanError when no such order exists.
    """
    missing = {name for k, column in enumerate(plan.columns) for step in column for name in gives(k, step.op)}
    at = [0] * plan.K
    for t in sorted({step.tick for column in plan.columns for step in column}):
        waiting = [k for k in range(plan.K) if at[k] < len(plan.columns[k])]
        while waiting:
            moved = False
            for k in waiting:
                column = plan.columns[k]
                while at[k] < len(column) and column[at[k]].tick <= t and missing.isdisjoint(needs(k, column[at[k]].op)):
                    yield k, column[at[k]]
                    missing.difference_update(gives(k, column[at[k]].op))
                    at[k] += 1
                    moved = True
            waiting = [k for k in waiting if at[k] < len(plan.columns[k]) and plan.columns[k][at[k]].tick <= t]
            if waiting and not moved:
                raise PlanError(_stuck(plan, at, waiting, missing))


def _stuck(plan: Plan, at: Sequence[int], waiting: Sequence[int], missing: set[Product]) -> str:
    lines = []
    for k in waiting:
        op = plan.columns[k][at[k]].op
        for stage, what in needs(k, op):
            if (stage, what) in missing:
                lines.append(f"  stage {k}: {label(op)} waits for {named(what)} on stage {stage}")
    return "this plan cannot go on:\n" + "\n".join(lines) + "\n" + chart(plan)


def check(plan: Plan) -> None:
    """Raises PlanError unless a whole plan can run: every op once, every need made by some stage, no deadlock, every gradient applied."""
    made = {name for k, column in enumerate(plan.columns) for step in column for name in gives(k, step.op)}
    for k, column in enumerate(plan.columns):
        seen: set[Op] = set()
        pending = False
        for step in column:
            op = step.op
            if isinstance(op, Update):
                pending = False
                continue
            if op in seen:
                raise PlanError(f"stage {k} does {label(op)} twice\n{chart(plan)}")
            seen.add(op)
            for stage, what in needs(k, op):
                if (stage, what) not in made:
                    raise PlanError(f"stage {k}: {label(op)} waits for {named(what)} on stage {stage}, which never comes\n{chart(plan)}")
            pending = pending or (isinstance(op, Backward) and op.part != "input")
        if pending:
            raise PlanError(f"stage {k} ends with a gradient that no Update applies\n{chart(plan)}")
    for _ in walk(plan):
        pass
