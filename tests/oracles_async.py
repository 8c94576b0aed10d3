"""Independent oracle of asynchronous greedy learning: who acts, what it reads, and what it learns, as one naive loop."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from delock.keys import key

from oracles import OracleRun

Batch = tuple[Any, Any]


@dataclass
class Slot:
    """A mini-batch in a buffer: its number and version at the stage that made it, the how-manieth put it was, and its use count."""

    content: Any
    number: int
    version: int
    born: int
    used: int = 0


class Ring:
    """The buffer in the spec's words: `size` slots; a put goes into the oldest, a get takes the newest of the least used."""

    def __init__(self, size: int, max_reuse: int) -> None:
        self.slots: list[Slot | None] = [None] * size
        self.limit = max_reuse or 10**9
        self.puts = 0
        self.reuse, self.behind, self.versions = Counter[int](), Counter[int](), Counter[int]()

    def put(self, content: Any, number: int, version: int) -> None:
        oldest = self.puts % len(self.slots)
        if gone := self.slots[oldest]:
            self.reuse[gone.used] += 1
        self.slots[oldest] = Slot(content, number, version, self.puts)
        self.puts += 1

    def get(self) -> Slot | None:
        there = [slot for slot in self.slots if slot]
        least = min((slot.used for slot in there), default=0)
        if not there or least >= self.limit:
            return None
        newest_put = max(there, key=lambda slot: slot.born)
        found = max((slot for slot in there if slot.used == least), key=lambda slot: slot.born)
        found.used += 1
        self.behind[newest_put.number - found.number] += 1
        self.versions[newest_put.version - found.version] += 1
        return found


@dataclass
class Visit:
    """A turn of stage k, the tick-th of all, that was not lost."""

    tick: int
    k: int
    number: int  # the stage's own
    read: int  # number at the stage below, or of the data
    trains: bool
    content: Any = field(repr=False, default=None)  # what it read


class Course:
    """The visits of a sampled run, in order, and the rings afterwards. Whoever iterates puts what a visit made into ring k + 1."""

    def __init__(self, K: int, updates: int, *, size: int, max_reuse: int, slow: int, noise: float, seed: int) -> None:
        self.K, self.T, self.seed = K, updates, seed
        self.weights = [1 - noise if k == slow else 1.0 for k in range(K)]
        self.rings = [Ring(size, max_reuse) for _ in range(K)]
        self.lost = 0  # turns of a stage with nothing to read

    def draw(self, i: int) -> int:
        """The stage whose turn the i-th is."""
        u, total = key("turn", self.seed, i) / 2**63 * sum(self.weights), 0.0
        for k, weight in enumerate(self.weights):
            total += weight
            if u < total:
                return k
        return self.K - 1

    def __iter__(self) -> Iterator[Visit]:
        visits, updates = [0] * self.K, [0] * self.K
        tick = -1
        while min(updates) < self.T:
            tick += 1
            k = self.draw(tick)
            if min(updates[k:]) == self.T:  # done, and nobody above needs it
                continue
            slot = self.rings[k].get() if k else Slot(None, visits[0], 0, 0)
            if slot is None:
                self.lost += 1
                continue
            trains = updates[k] < self.T
            visit = Visit(tick, k, visits[k], slot.number, trains, slot.content)
            yield visit
            if k + 1 < self.K:
                self.rings[k + 1].put(visit.content, visits[k], updates[k])
            visits[k] += 1
            updates[k] += trains


def sampled(
    length: Course,
    stages: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    data: Callable[[int], Batch],
    *,
    loss: Callable[[Any, Any], Tensor],
    make_optimizer: Callable[[list[Tensor]], Any],
    make_schedule: Callable[[Any], Any],
    seed: int,
) -> tuple[OracleRun, list[dict[str, Tensor]]]:
    """Every visit: h' = f_k(h), in eval mode once the stage is done; else one step of (w_k, u_k) on loss(a_k(h'), y). h' goes up as it was
    before the step.

    Dropout of stage k's n-th visit is seeded with key(seed, k, n), that of its head with key(seed, k, "head", n). Returns also the
    heads' states.
    """
    bodies = [copy.deepcopy(stage).train() for stage in stages]
    tops = [copy.deepcopy(head).train() for head in heads]
    learners = [[*body.parameters(), *(tops[k].parameters() if k < len(tops) else ())] for k, body in enumerate(bodies)]
    optimizers = [make_optimizer(weights) for weights in learners]
    schedules = [make_schedule(optimizer) for optimizer in optimizers]
    run = OracleRun()
    with torch.random.fork_rng(devices=[]):
        for visit in length:
            k = visit.k
            h, y = visit.content if k else data(visit.read)
            body = bodies[k].train(visit.trains)
            torch.default_generator.manual_seed(key(seed, k, visit.number))
            out = body(tree_map(torch.clone, h))
            visit.content = tree_map(lambda t: t.detach().clone(), out), y
            if not visit.trains:
                continue
            if k < len(tops):
                torch.default_generator.manual_seed(key(seed, k, "head", visit.number))
                out = tops[k](out)
            value = loss(out, y)
            optimizers[k].zero_grad()
            value.backward()
            optimizers[k].step()
            schedules[k].step()
            if k == len(bodies) - 1:
                run.losses.append(value.detach())
    run.states = [body.state_dict() for body in bodies]
    run.optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    return run, [top.state_dict() for top in tops]
