"""Plans as they would be without thinking: all ticks are drawn, then every step looks through the whole plan for what others need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from delock.methods import Method
from delock.ops import NEWEST, Backward, Evaluate, Forward, Op, Update
from delock.plan import RunLength, Step


def drawn(method: Method, k: int, K: int, length: RunLength) -> Iterator[Step]:
    """The ops of stage k, each with the version at which it is done, and nothing else known."""
    first, end, every = (number * method.micro_batches for number in (length.first, length.batches, length.every))
    ticks = length.batches + method.span(K)
    pending = version = evaluations = 0
    for t in range(ticks + 1):
        ops: list[Op] = list(method.tick(t, k, K)) if t < ticks else []
        slot = slots(ops, method.micro_batches)
        for op in [op for op in ops if isinstance(op, Update) or first <= op.batch < end]:
            if isinstance(op, Update):
                if pending:
                    yield Step(clipped(op, method, length, version), t, version)
                    pending, version = 0, version + 1
                continue
            if isinstance(op, Forward) and every and op.batch and op.batch % every == 0:
                yield from evaluation(t, version, evaluations, length)
                evaluations += 1
            yield Step(op, t, version, slot=slot(op, t))
            pending += isinstance(op, Backward) and op.part != "input"
    if every:
        yield from evaluation(ticks, version, evaluations, length)


def slots(ops: Sequence[Op], micro_batches: int) -> Callable[[Op, int], int]:
    """The place of an op among those of its kind in its tick, counted in micro-batches; halves of a Backward count by themselves."""

    def slot(op: Op, t: int) -> int:
        alike = [one.batch for one in ops if type(one) is type(op) and getattr(one, "part", "") == getattr(op, "part", "")]  # type: ignore[union-attr]
        return t * micro_batches + list(dict.fromkeys(alike)).index(op.batch)  # type: ignore[union-attr]

    return slot


def clipped(op: Update, method: Method, length: RunLength, version: int) -> Update:
    if length.clip is None:
        return op
    return replace(op, clip=length.clip, over="network", number=version) if method.synchronous else replace(op, clip=length.clip)


def evaluation(t: int, version: int, before: int, length: RunLength) -> Iterator[Step]:
    n = length.evaluation
    return (Step(Evaluate(before * n + i), t, version) for i in range(n))


def plain(method: Method, K: int, length: RunLength) -> list[list[Step]]:
    """Every stage's column, by looking at all steps for each."""
    columns = [list(drawn(method, k, K, length)) for k in range(K)]
    return [[told(columns, k, i) for i in range(len(column))] for k, column in enumerate(columns)]


def told(columns: Sequence[Sequence[Step]], k: int, i: int) -> Step:
    """Step i of stage k with all its flags."""
    step, behind = columns[k][i], columns[k][i + 1 :]
    match step.op:
        case Evaluate():
            return replace(step, up=k + 1 < len(columns))
        case Forward(b):
            later = [other for other in behind if isinstance(other.op, Backward) and other.op.batch == b]
            elsewhere = step.op.weights != NEWEST
            at = {other.op.at for other in later if isinstance(other.op, Backward) and (elsewhere or other.version > step.version)}
            keep = "nothing" if not later else "input" if at == {"replay"} else "graph"
            up = k + 1 < len(columns) and any(isinstance(other.op, Forward) and other.op.batch == b for other in columns[k + 1])
            return replace(step, keep=keep, snapshot="stash" in at, up=up)  # type: ignore[arg-type]
        case Backward(b, loss, _, part):
            again = [other.op for other in behind if isinstance(other.op, Backward) and other.op.batch == b]
            below = [other.op for other in columns[k - 1] if isinstance(other.op, Backward)] if k else []
            return replace(
                step,
                last=not again,
                down=part != "weights" and any((op.batch, op.loss) == (b, loss) for op in below),
                weights_later=part == "input" and any((op.loss, op.part) == (loss, "weights") for op in again),
                sends_norms=bool(behind) and isinstance(behind[0].op, Update) and behind[0].op.over == "network",
            )
        case _:
            older = [one.op.weights for one in columns[k] if isinstance(one.op, Forward)]
            return replace(step, banks=max(w.behind + bool(w.ahead) for w in older))
