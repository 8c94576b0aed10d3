"""`delock cuts`: the places where a model can be cut, with cost, memory and what crosses them, and the cuts that make stages even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

from delock.cli.arguments import parse
from delock.cli.config import (
    AlgorithmOptions,
    BatchOptions,
    DatasetOptions,
    LanguageOptions,
    NetworkOptions,
    TrainConfig,
    UpdateOptions,
    check_ranges,
    either,
    make_method,
    resolve,
)
from delock.cli.profile import request_of
from delock.cli.run_folder import dumps
from delock.cli.tables import Cells, megabytes, memory, percent
from delock.cli.terminal import Terminal
from delock.options import MOST_THREADS, Placement

if TYPE_CHECKING:
    from delock.run.measured_network import MeasuredNetwork
    from delock.run.places import CutPlace

ABOUT = """List the places where a model can be cut, and the cuts that make stages even; nothing is trained.

Each row is a layer: a cut of that name comes in front of it, and sends what the row says.

examples:
  delock cuts
  delock cuts --model torchvision/resnet18 --data synthetic --image-size 64 --stages 4
  delock cuts --model hf/config.json --data text --all
  delock cuts --model own.py:network --data own.py:batches --stages 3 --stage-memory 16G 24G 24G
  delock cuts --model resnet20 --method fdg --optimizer adamw --stages 2 --stage-memory 1G --json"""


@dataclass(frozen=True)
class CutModel:
    """Holds the model that is to be cut."""

    model: Annotated[str | None, either("model")] = None
    """All names of train's --model."""


@dataclass(frozen=True)
class PlacesOptions(BatchOptions, CutModel):  # in a dataclass the fields of the last base come first
    """The model, the batch it is measured on, and what to show."""

    stages: int = 2
    """Number of stages that are made even."""
    all: bool = False
    """Every place where a cut is possible, also inside blocks, not only those where blocks begin."""
    json: bool = False
    """Print everything as JSON instead."""


@dataclass(frozen=True)
class CutsConfig:
    """The options of `delock cuts`."""

    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    places: PlacesOptions = field(default_factory=PlacesOptions)
    language: LanguageOptions = field(default_factory=LanguageOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)


@dataclass(frozen=True)
class Even:
    """Holds the cuts that make stages even, and for each stage its share of the work and the bytes that it needs."""

    cuts: tuple[str, ...]
    work: tuple[float, ...]
    needs: tuple[int | None, ...]


def run(words: Sequence[str]) -> int:
    """Parses, measures, shows; returns the exit code."""
    from delock.run.places import places_of

    config = parse(CutsConfig, words, "cuts", ABOUT)
    measured, screen = measure(config), Terminal()
    found = places_of(measured)
    if not config.places.json:
        screen.table(*rows(found))
    even = best(measured, found)
    if config.places.json:
        print(dumps({"samples": measured.batch.rows, "places": [asdict(place) for place in found], **asdict(even)}, indent=2))
        return 0
    for line in sentences(found, even, measured.batch.rows):
        screen.line(line)
    return 0


def measure(config: CutsConfig) -> MeasuredNetwork:
    """Measures the model. Raises UsageError for what does not fit."""
    asked = config.places
    check_ranges({"stages": (asked.stages, 2), "threads": (asked.threads, 1, MOST_THREADS)})
    placement = Placement(threads=asked.threads, stage_memory=asked.stage_memory)
    placement.limits(asked.stages)  # raises UsageError before anything is loaded
    resolved = resolve(_as_training(config))
    method = make_method(resolved.algorithm).fitted(asked.stages)
    from delock.run.prepare import measured_network

    return measured_network(request_of(resolved, method, asked.stages, placement), counts=True, fine=asked.all)


def _as_training(config: CutsConfig) -> TrainConfig:
    """Returns the options as those of a run, which has the same defaults and refusals."""
    asked = config.places
    dataset = DatasetOptions(data=asked.data, data_dir=asked.data_dir, image_size=asked.image_size, batch_size=asked.batch_size)
    network = NetworkOptions(model=asked.model, stages=asked.stages)
    return TrainConfig(algorithm=config.algorithm, network=network, dataset=dataset, language=config.language, update=config.update)


def best(measured: MeasuredNetwork, found: Sequence[CutPlace]) -> Even:
    """Returns the cuts that a run would choose. Raises UsageError where a limit of memory, or the CutPoints, leave none."""
    from delock.run.choose_cuts import cut_network
    from delock.run.stage_memory import needs_if_known

    prepared = cut_network(measured, None)
    return Even(
        cuts=tuple(found[cut].name for cut in prepared.cuts),
        work=tuple(sum(place.work for place in found[a:b]) for a, b in prepared.bounds()),
        needs=tuple(needs_if_known(prepared)),
    )


def rows(found: Sequence[CutPlace]) -> tuple[Cells, list[Cells]]:
    """Returns head and rows of the table."""
    head = ["cut", "number", "work\nbefore", "work", "parameters", "kept for\nbackward", "sends", "per batch"]
    marked = any(place.tied for place in found)
    head += ["tied weights"] if marked else []
    body = []
    for i, place in enumerate(found):
        cells = [place.name if i else f"({place.name or 'the first'})", f"{i}", percent(place.before), percent(place.work)]
        cells += [f"{place.parameters:,}", megabytes(place.kept) if place.kept is not None else "-"]
        cells += [f"{place.tensors} tensor{'s' * (place.tensors > 1)}", megabytes(place.bytes)] if i else ["-", "-"]
        cells += [f"{' '.join(place.tied)} {megabytes(sum(place.tied.values()))}" if place.tied else "-"] if marked else []
        body.append(cells)
    return head, body


def sentences(found: Sequence[CutPlace], even: Even, samples: int) -> list[str]:
    """Returns what is said below the table."""
    shares = ", ".join(percent(share) for share in even.work)
    needs = "" if None in even.needs else f", memory {', '.join(memory(need) for need in even.needs)}"
    return [
        f"\na batch of {samples} samples; {len(found) - 1} places",
        f"\n{len(even.cuts) + 1} even stages (work {shares}{needs}):",
        f"  --cuts {' '.join(even.cuts)}",
    ]
