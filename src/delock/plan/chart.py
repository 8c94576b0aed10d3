"""A plan as text: a line per stage, a cell per op."""

from __future__ import annotations

from delock.ops import Forward, Update, label
from delock.plan.needs import Product, gives, needs
from delock.plan.steps import Plan, Step


def chart(plan: Plan, slots: int = 24) -> str:
    """Draws the first `slots` time slots of a plan, a line per stage: op and batch `.` version, every op one slot long, as early as it can.

    stage 0 |F0.0 F1.0 F2.0 B0.0

    The version is that of the weights which the op uses; + and a number behind it says how far they are ahead of it.
    """
    made = {name for k, column in enumerate(plan.columns) for step in column for name in gives(k, step.op)}
    place: dict[Product, int] = {}
    rows = []
    at = [0] * plan.K
    free = [0] * plan.K
    cells: list[dict[int, str]] = [{} for _ in range(plan.K)]
    moved = True
    while moved:
        moved = False
        for k, column in enumerate(plan.columns):
            while at[k] < len(column) and free[k] < slots:
                step = column[at[k]]
                wanted = [name for name in needs(k, step.op) if name in made]
                if not all(name in place for name in wanted):
                    break
                if not isinstance(step.op, Update):
                    free[k] = max([free[k], *(place[name] for name in wanted)])
                    cells[k][free[k]] = f"{label(step.op)}.{_version(step)}"
                    free[k] += 1
                place.update(dict.fromkeys(gives(k, step.op), free[k]))
                at[k] += 1
                moved = True
    width = max((len(cell) for row in cells for cell in row.values()), default=0) + 1
    for k, row in enumerate(cells):
        line = "".join(row.get(slot, "").ljust(width) for slot in range(min(slots, max(row, default=-1) + 1)))
        more = "..." if at[k] < len(plan.columns[k]) else ""
        rows.append(f"stage {k:>{len(str(plan.K - 1))}} |{line}{more}".rstrip())
    return "\n".join(rows)


def _version(step: Step) -> str:
    if not isinstance(step.op, Forward):
        return str(step.version)
    weights = step.op.weights
    used = weights.used(step.version)
    return f"{used}+{weights.ahead:g}" if weights.draws_out(step.version) else str(used)
