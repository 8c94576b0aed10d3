"""From what was asked for to a run that can start: everything is checked, the network measured and cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from delock.errors import UsageError
from delock.feed import samples
from delock.keys import key
from delock.methods import AsyncDGL
from delock.nets.emulated import Emulated
from delock.nets.measure import AtomCost, balance
from delock.nets.split import atoms, has_batch_norm, resolve_cuts, stages
from delock.setup.costs import choice
from delock.setup.heads import auxiliary, head_cost, head_shares
from delock.setup.refuse import refuse_single_samples, refuse_unfit, refuse_unfit_codecs
from delock.setup.setup import Batch, Setup
from delock.setup.spec import Spec
from delock.timeline import Emulation


def prepare(spec: Spec, cuts: Sequence[int | str] | None) -> Setup:
    """Check everything that can be checked before the start, measure the network on a first batch, and cut it. Raises UsageError."""
    course = spec.course()
    if spec.slow and isinstance(spec.method, AsyncDGL) and spec.method.noise:
        raise UsageError("noise and straggle both make stages slower: use one of them")
    if spec.compile and spec.emulate:
        raise UsageError("emulated stages compute nothing, so there is nothing to compile: leave compile or emulate out")
    parts = atoms(spec.model)
    K = _number_of_stages(spec, cuts, len(parts))
    refuse_unfit(parts, K, cuts, spec.method, spec.train.sizes())
    inputs, targets = next(iter(spec.train.epoch(0)))
    how, costs = choice(spec, parts, inputs, targets)
    if cuts is None:
        cuts = balance([cost.total_s for cost in costs], K, [cost.params for cost in costs])
    found = tuple(resolve_cuts(parts, cuts))
    refuse_unfit_codecs(spec, [costs[cut - 1] for cut in found])
    heads = auxiliary(spec, K, [costs[cut - 1].shape for cut in found], costs[-1].shape)
    normed = [nn.ModuleList(atom.module for atom in parts), *heads.values()] if spec.chunks > 1 else [*heads.values()]
    if any(map(has_batch_norm, normed)):
        refuse_single_samples(spec.train.sizes() or [], spec.method.parts * spec.chunks)
    shaped = {k: costs[found[k] - 1].shape for k in heads}
    head_costs = {k: head_cost(spec, how, k, head, (samples(inputs), *shaped[k]), targets) for k, head in heads.items() if shaped[k]}
    batch = Batch.of(inputs, targets)
    if spec.emulate:
        return Setup(course, parts, found, costs, batch, how, *_emulated(spec, spec.emulate, [*found, len(parts)], costs))
    modules = stages(parts, found)
    shares = head_shares(modules, heads, [costs[cut - 1].shape for cut in found], inputs)
    if spec.compile:  # what layers cost was measured before
        how, inputs = replace(how, compile=True), tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
    return Setup(course, parts, found, costs, batch, how, modules, heads, head_costs, shares, inputs if spec.compile else None)


def _emulated(spec: Spec, waits: Emulation, ends: Sequence[int], costs: Sequence[AtomCost]) -> tuple[list[Emulated], dict[int, nn.Module]]:
    """Stages that wait, and heads that cost nothing, with outputs as large as the real ones."""
    share = 1 / spec.method.parts
    shapes = [costs[end - 1].shape for end in ends]
    if not all(shapes):
        raise UsageError("a stage whose output is a tuple cannot be emulated: cut elsewhere")
    modules = [
        Emulated(shape, share * waits.forward, share * waits.backward, jitter=waits.jitter, seed=key(spec.seed, "emulate", k))
        for k, shape in enumerate(shapes)
    ]
    return modules, {k: Emulated(shapes[-1], 0.0, 0.0) for k in spec.method.headed(len(ends))}


def _number_of_stages(spec: Spec, cuts: Sequence[int | str] | None, layers: int) -> int:
    if cuts is not None:
        if spec.stages not in (None, len(cuts) + 1):
            raise UsageError(f"{len(cuts)} cuts make {len(cuts) + 1} stages, but stages is {spec.stages}: give one of them")
        return len(cuts) + 1
    if spec.stages is not None:
        return spec.stages
    return layers if isinstance(spec.model, list | tuple | nn.ModuleList) else 2
