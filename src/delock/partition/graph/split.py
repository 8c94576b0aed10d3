"""Splits a model: one tracer after the other, until the pieces are proved to be the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.errors import UsageError, said
from delock.partition.graph.cutter import ENOUGH, NoCutError, Piece, pieces
from delock.partition.graph.examples import Examples
from delock.partition.graph.exported import exported
from delock.partition.graph.proof import difference, repeats
from delock.partition.graph.refusals import INNER, NO_GRAPH, Obstacle, furthest, obstacle, refusal
from delock.partition.graph.root import in_mode, root
from delock.partition.graph.structure import Structure
from delock.partition.graph.symbolic import symbolic
from delock.partition.graph.traceable import transforms_ended
from delock.partition.graph.traced import Traced, observe
from delock.partition.graph.unwritten import Unwritten

BY_CHANCE = "the model itself does not compute the same twice, even from the same seed: does it draw from a generator of its own?"


@dataclass
class Split:
    """Holds a model in pieces. structures: of its output in both modes, by mode. how: the tracer that found it.

    checksum: of the graphs of both modes, which are the same for any cuts. told: the pieces are what the model computes when it knows that
    it is exported, which is the same but for rounding.
    """

    pieces: list[Piece]
    structures: dict[bool, Structure]
    how: str
    checksum: int
    refused: list[Obstacle] = field(default_factory=list)  # tracers before, and why not
    told: bool = False
    kept: bool = False  # from an earlier run


def split(
    model: nn.Module,
    call: Call,
    given: Examples,
    stages: int,
    wanted: Sequence[str] = (),
    enough: float = ENOUGH,
) -> Split:
    """Returns the model in pieces: at least one per stage, if the model can be cut that often.

    given: batches to trace and prove with. wanted: modules in front of which there must be a cut; enough: the number of cuts for
    which no finer places are looked for. Raises UsageError where no tracer finds pieces that compute what the model computes: it quotes
    the line of the model's code at which tracing ended.
    """
    examples = [given.first, given.other]
    structures = {mode: _structure(model, call, examples[0], mode) for mode in (True, False)}
    best: Split | None = None
    elsewhere: NoCutError | None = None  # it can be cut, but not where it was asked for
    failed: list[Obstacle] = []
    for how, trace, told in TRACERS:
        if told and best:  # it would be another way of computing the same
            break
        try:
            with transforms_ended():
                traced = trace(model, call, examples, told)
                for mode in (True, False):
                    traced.facts[mode] = observe(in_mode(model, mode), traced.graphs[mode], traced.constants, examples[0])
                made, unlike = _enough(traced, call, examples, wanted, told, enough, stages)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except NoCutError as error:
            if error.unknown:
                raise
            elsewhere = elsewhere or error
            continue
        except Exception as error:
            failed.append(obstacle(how, error))
            continue
        if unlike:
            why = "" if repeats(model, call, examples[0]) else f", and {BY_CHANCE}"
            failed.append(Obstacle(how, f"in pieces it would compute something else, first seen in {unlike}{why}", far=2))
            continue
        if given.single:
            _allow_single(traced, made, call, given.single, told)
        if best is None or len(made) > len(best.pieces):
            best = Split(made, structures, how, traced.checksum(), list(failed), told)
        if len(made) >= max(stages, 2):
            break
    if best is None and elsewhere:
        raise NoCutError(f"{elsewhere}; finer tracing fails ({furthest(failed)})") if failed else elsewhere
    if best is None:
        _refuse_other_rows(model, call, given.other)
        raise UsageError(refusal(model, failed))
    return best


def _enough(
    traced: Traced, call: Call, examples: Sequence[Sequence[Tensor]], wanted: Sequence[str], told: bool, enough: float, stages: int
) -> tuple[list[Piece], str]:
    """Returns `_proved` pieces. Where they are too few, cuts through tensors with gaps are tried: many compute the same all the same."""
    made, unlike = _proved(traced, call, examples, wanted, told, enough, stages - 1)
    if unlike or len(made) >= max(stages, 2) or not any(facts.strided for facts in traced.facts.values()):
        return made, unlike
    for facts in traced.facts.values():
        facts.strided.clear()
    more, unlike = _proved(traced, call, examples, wanted, told, enough, stages - 1)
    return (made, "") if unlike or len(more) < len(made) else (more, "")


def _proved(
    traced: Traced, call: Call, examples: Sequence[Sequence[Tensor]], wanted: Sequence[str], told: bool, enough: float, least: int
) -> tuple[list[Piece], str]:
    """Returns pieces that compute what the model computes, and "", or what differs. Cuts that change something are left out."""

    def unlike(made: Sequence[Piece], given: Sequence[Sequence[Tensor]]) -> str:
        return difference(traced.model, call, [piece.module for piece in made], given, told)

    made = pieces(traced, wanted, enough=enough, least=least)
    if not (found := unlike(made, examples)):
        return made, ""
    names = [piece.begins for piece in made[1:]]
    if whole := unlike(pieces(traced, (), ()), examples):
        return made, whole
    good = [name for name in names if not unlike(pieces(traced, wanted, (name,), enough, least), examples[:1])]
    if bad := [name for name in wanted if name in names and name not in good]:
        raise NoCutError(f"the model cannot be cut in front of {bad[0]}: {found} would be another")
    made = pieces(traced, wanted, good, enough, least)
    return made, unlike(made, examples)


def _allow_single(traced: Traced, made: Sequence[Piece], call: Call, single: Sequence[Tensor], told: bool) -> None:
    """Lets the pieces take a batch of one, as a part may be, which torch.export rules out: if they then compute what the model computes."""
    before = {mode: dict(one.ranges) for mode, one in traced.guards.items()}
    for one in traced.guards.values():
        one.ranges = {name: (1 if least == 2 else least, most) for name, (least, most) in one.ranges.items()}
    try:
        unlike = difference(traced.model, call, [piece.module for piece in made], [single], told) if before else ""
    except Exception:  # as batch norm, which takes no single sample in training
        unlike = "an error"
    if unlike:
        for mode, ranges in before.items():
            traced.guards[mode].ranges = ranges


def _symbolic(model: nn.Module, call: Call, examples: Sequence[Sequence[Tensor]], told: bool) -> Traced:
    graphs, constants, structure = symbolic(model, call, len(examples[0]))
    return Traced(model, graphs, constants, structure)


def _exported(model: nn.Module, call: Call, examples: Sequence[Sequence[Tensor]], told: bool) -> Traced:
    graphs, constants, structure, guards = exported(model, call, examples, told)
    return Traced(model, graphs, constants, structure, guards)


def _structure(model: nn.Module, call: Call, inputs: Sequence[Tensor], mode: bool, graph: bool = False) -> Structure:
    """Returns the structure of the model's output. Raises UsageError if the model fails on its first batch, or writes to its weights.

    graph: the model computes with gradients.
    """
    under = root(in_mode(model, mode), call, len(inputs))
    try:
        with torch.set_grad_enabled(graph), torch.random.fork_rng(devices=[]), Unwritten(model):
            under(*(x.clone() for x in inputs))
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:
        if NO_GRAPH in str(error) and not graph:
            _structure(model, call, inputs, mode, graph=True)
            raise UsageError(refusal(model, [replace(obstacle("", error), reason=INNER)])) from error
        raise UsageError(f"the model ({type(model).__name__}) fails on its first batch: {said(error)}") from error
    return under.structure


def _refuse_other_rows(model: nn.Module, call: Call, other: Sequence[Tensor]) -> None:
    """Raises UsageError if the model takes its first batch alone: its inputs may have rows that are no samples."""
    try:
        _structure(model, call, other, True)
    except UsageError as error:
        if error.__cause__ is not None:
            raise UsageError(
                f"the model ({type(model).__name__}) takes its first batch, but not one of fewer samples, which tracing tries: "
                f"{said(error.__cause__)}. Where rows of inputs are no samples, they cannot be left out: say how many samples a batch has, "
                "by delock.data.Batches(loader, samples=...), and a later batch is tried instead"
            ) from error


TRACERS: tuple[tuple[str, Callable[[nn.Module, Call, Sequence[Sequence[Tensor]], bool], Traced], bool], ...] = (
    ("torch.fx", _symbolic, False),
    ("torch.export", _exported, False),
    ("torch.export", _exported, True),
)
"""Each entry holds a name, a tracer, and True if the model learns that it is exported: some models mask attention in another way then."""
