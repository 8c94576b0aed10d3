"""Says what a run leaves out that goes on in other stages, and refuses a network or an optimizer that is not the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from delock.checkpoints.directory import read, read_tensors
from delock.codecs import VQ
from delock.errors import UsageError
from delock.memory.optimizer import Named, learned
from delock.methods import Method
from delock.ops import Backward, Update
from delock.optim.stage_facts import StageFacts, for_stage
from delock.partition.layers import Layer, listed, under
from delock.partition.stages import stages
from delock.plan import RunLength, unroll
from delock.run.prepared import PreparedRun
from delock.run.request import Request
from delock.run.survival import parts
from delock.run.survival.kept_state import KeptState
from delock.run.survival.restage import fits
from delock.stage.learner import Learner
from delock.timeline import stage_facts


def left_out(prepared: PreparedRun) -> tuple[str, ...]:
    """Returns what is to be said before a run goes on in other stages; nothing if they are those of the checkpoint.

    Raises UsageError for weights that the checkpoint has not, or in other shapes, and for an optimizer that was made otherwise.
    """
    begin = prepared.begin
    if begin is None or not begin.restages(prepared.places):
        return ()
    then, path = begin.manifest, Path(begin.path)
    if not prepared.request.method.planned:
        was = f"{prepared.request.method.name} has no fixed plan, and goes on only in the stages of the checkpoint"
        raise UsageError(f"{was}: {_stages(then.options['cuts'])}, not {_stages(prepared.places)}")
    weights = {name: one for k in range(then.K) for name, one in read_tensors(path / f"weights-{k}.safetensors", outline=True)[0].items()}
    _refuse_other_network(prepared.layers, weights)
    method = (prepared.given or prepared.request.method).fitted(then.K)
    return (
        f"the run goes on in {_stages(prepared.places)} instead of {_stages(then.options['cuts'])}: weights and the optimizer's state are "
        "taken over by their names, and what a stage counts begins anew",
        *_under_way(method, then.K, then.first, then.batches),
        *([f"the losses of {_batches(then.trained, then.batches)} had not come"] if then.trained < then.batches else []),
        *_evaluations(method, then.K, then.first, then.batches, prepared.length.every),
        *_group(prepared.request.method, then.batches),
        *(["the codebooks of vq begin anew"] if isinstance(prepared.request.compression.activations, VQ) else []),
        *_heads(prepared, weights),
        *_optimizers(prepared, path, method, weights),
    )


def missed(method: Method, K: int, first: int, batches: int) -> list[range]:
    """Returns the batches under way on each of K stages, whose gradients are not yet applied when stage 0 comes to batch `batches`.

    first: the batch with which the stages began.
    """
    M = method.batches_per_update
    later = max(0, batches - first - method.span(K) - M) // M * M  # the run repeats itself: a shorter one has the same under way
    end, found = batches - later, []
    for column in unroll(method, K, RunLength(end, first=first)).columns:
        learnt = applied = first
        for step in column:
            if step.tick >= end:
                break
            match step.op:
                case Backward(batch, part="both" | "weights"):
                    learnt = batch // method.micro_batches + 1
                case Update():
                    applied = learnt
        found.append(range(applied + later, batches))
    return found


def _under_way(method: Method, K: int, first: int, batches: int) -> Iterator[str]:
    found = [f"{_batches(own.start, own.stop)} on stage {k}" for k, own in enumerate(missed(method, K, first, batches)) if own]
    if found:
        yield f"gradients that no update had applied are left out: those of {', '.join(found)} of the {K} that there were"


def _evaluations(method: Method, K: int, first: int, batches: int, every: int) -> Iterator[str]:
    """Says which evaluations had left stage 0, and had not come to the last stage."""
    since = max(1, first, batches - method.offset(K - 1, K) // method.micro_batches)
    found = [batch for batch in range(since, batches) if every and batch % every == 0]
    if found:
        yield f"evaluations behind batch {', '.join(map(str, found))} were under way, and are left out"


def _group(method: Method, batches: int) -> Iterator[str]:
    M = method.batches_per_update
    if batches % M:
        yield f"the first update applies the gradients of {_batches(batches, -(-batches // M) * M)} alone"


def _heads(prepared: PreparedRun, weights: Mapping[str, Tensor]) -> Iterator[str]:
    for k, head in prepared.heads.items():
        prefix = f"heads.{k}."
        if not fits(head.state_dict(), {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}):
            yield f"the head of stage {k} begins anew: the checkpoint has none of its shapes for that stage"


def _optimizers(prepared: PreparedRun, path: Path, method: Method, weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Says what optimizers begin anew. Raises UsageError for a factory that does not make those of the checkpoint for its stages."""
    request, kept = prepared.request, KeptState()
    old = stages(prepared.layers, prepared.begin.manifest.options["cuts"]) if prepared.begin else []
    for k, (module, facts) in enumerate(zip(old, stage_facts(method, len(old)), strict=True)):
        file = read(path, "optimizer", k, outline=True)
        own = [name for group in file["learner"]["names"] for name in group if name and name.startswith(f"heads.{k}.")]
        head = [(name, nn.Parameter(torch.zeros(weights[name].shape))) for name in own]
        parts.refuse_other(_learner(request, [*learned(module, None, k), *head], facts).made, file["made"], k)
        kept.add(file["learner"], file["made"])
    if kept.feedback:
        yield "error feedback begins anew: the changes that it compares were as old as gradients were"
    if kept.lost:
        yield "what the optimizer keeps, but not for a single weight, begins anew"
    for k, (new, facts) in enumerate(zip(prepared.modules, stage_facts(request.method, prepared.K), strict=True)):
        learner = _learner(request, learned(new, prepared.heads.get(k), k), facts)
        kinds = learner.made["kinds"] if learner.made else []
        held = [(name, kind) for own, kind in zip(learner.held(), kinds, strict=True) for name in own if name in kept.states]
        if others := [name for name, kind in held if kept.kinds[name] != kind]:
            yield f"the optimizer's state of {listed(others)} begins anew on stage {k}: it was kept by another optimizer"


def _learner(request: Request, named: Named, facts: StageFacts) -> Learner:
    return Learner(named, for_stage(request.optimizer, facts), None, False, 1, facts.k)


def _refuse_other_network(network: Sequence[Layer], weights: Mapping[str, Tensor]) -> None:
    """Raises UsageError for a weight that the checkpoint has not, or in another shape; buffers may have grown."""
    for layer in network:
        kept = layer.module.state_dict()
        for name, value in ((under(layer.prefix, own), value) for own, value in layer.module.named_parameters() if own in kept):
            if name not in weights or weights[name].shape != value.shape:
                was = f"has shape {list(weights[name].shape)} in" if name in weights else "is not in"
                raise UsageError(f"{name} of the network {was} the checkpoint: go on with the network that was trained")


def _stages(cuts: Sequence[int | str]) -> str:
    return f"{len(cuts) + 1} stages cut at {', '.join(map(str, cuts))}" if cuts else "1 stage"


def _batches(start: int, stop: int) -> str:
    return f"batch {start}" if stop - start == 1 else f"batches {start} to {stop - 1}"
