"""Reads what a run has kept: its config, and the weights of its end or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from delock.cli.config import TrainConfig, build, is_text, resolve, toml
from delock.cli.config.small_file import json_object
from delock.cli.models.kept_files import changed
from delock.cli.ranks import ranks
from delock.cli.run_folder import CHECKPOINTS, CONFIG, MODEL, SUMMARY
from delock.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from delock.checkpoints.manifest import Manifest

N = TypeVar("N", bound="nn.Module")

FINAL = "final"


@dataclass(frozen=True)
class Kept:
    """Holds the place of weights: a checkpoint's folder, or the file that a run has left at its end."""

    path: Path
    batches: int | None  # trained; None if that is not known any more
    manifest: Manifest | None = None  # of a checkpoint
    notes: tuple[str, ...] = ()  # what a user should know of them: damaged ones were passed over, a file has changed


def named(words: Sequence[str], command: str) -> tuple[Path | None, Sequence[str]]:
    """Returns the folder that the words begin with, if they do, and the other words. Raises UsageError under torchrun."""
    if ranks():
        raise UsageError(f"{command} does everything in one process: start it without torchrun")
    return (Path(words[0]), words[1:]) if words and not words[0].startswith("-") else (None, words)


def found(path: Path | None, name: str | None, command: str) -> tuple[Path, str | None]:
    """Returns the run's folder and the checkpoint's name, for the folder of a run or of one of its checkpoints."""
    if path is None:
        raise UsageError(f"say first which run: delock {command} RUN, with the folder that delock train has made")
    if name is None and path.name.startswith("batch-") and path.parent.name == CHECKPOINTS:
        return path.parent.parent, path.name
    return path, name


def read_config(run: Path) -> TrainConfig:
    """Returns the config of a run. Raises UsageError for any other folder."""
    if not (run / CONFIG).is_file():
        rows = sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
        hint = f"it holds several, such as {rows[0]}" if rows else f"it has no {CONFIG}; give a folder that delock train has made"
        raise UsageError(f"{run} is not the folder of a run: {hint}" if run.exists() else f"there is no run {run}")
    return config_of(run)


def config_of(run: Path) -> TrainConfig:
    """Returns the config in a run's folder. Raises UsageError, with the name of its file, for one that no run can have."""
    path = run / CONFIG
    values = toml.read(path)
    try:
        return resolve(build(TrainConfig, values, str(path)))
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def summary_of(run: Path) -> dict[str, Any]:
    """Returns what a run says of itself; nothing, if its file is missing or damaged."""
    try:
        return json_object(run / SUMMARY)
    except (OSError, ValueError):
        return {}


def finished(run: Path) -> int | None:
    """Returns the batches of a run that has come to its end; None for any other."""
    told = summary_of(run)
    batches = told.get("batches")
    return batches if isinstance(batches, int) and told.get("status") == "finished" and (run / MODEL).is_file() else None


def weights(run: Path, name: str | None) -> Kept:
    """Returns the weights of that name, by default the latest ones that are not damaged.

    name: of a checkpoint, or "final" for those of the run's end. The notes also say which of the files that the model was made from have
    changed. Raises UsageError if there are none.
    """
    kept = _latest(run) if name is None else _named(run, name)
    return replace(kept, notes=(*kept.notes, *changed(run)))


def _latest(run: Path) -> Kept:
    from delock.checkpoints.directory import newest_first, verified

    end, notes = finished(run), list[str]()
    for path in newest_first(run / CHECKPOINTS):
        try:
            manifest = verified(path)
        except UsageError as error:
            notes.append(f"passed over: {error}")
            continue
        if end is None or manifest.batches > end:  # a run that was made longer, and has not come to its new end
            return Kept(path, manifest.batches, manifest, tuple(notes))
        break
    if (run / MODEL).is_file():
        return Kept(run / MODEL, end)
    why = notes[0] if notes else "it has no checkpoint"
    raise UsageError(f"{run} has no {MODEL}: it did not run to its end; {why}; train it again")


def _named(run: Path, name: str) -> Kept:
    from delock.checkpoints.directory import newest_first, verified

    if name == FINAL:
        if not (run / MODEL).is_file():
            raise UsageError(f"{run} did not run to its end, so it has no final weights: delock checkpoints {run} lists others")
        return Kept(run / MODEL, finished(run))
    names = [path.name for path in newest_first(run / CHECKPOINTS)]
    if name not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise UsageError(f"{run} has no checkpoint {name!r}: {there}")
    manifest = verified(run / CHECKPOINTS / name)
    return Kept(run / CHECKPOINTS / name, manifest.batches, manifest)


def filled(make: Callable[[], N], config: TrainConfig, place: Path) -> N:
    """Returns the network that `make` makes, with the weights in a checkpoint or a file.

    Raises UsageError if they are another network's; one that is far too large for them is not made at all.
    """
    from delock.checkpoints.whole_model import read_model

    state, size = read_model(place), config.language
    least = 12 * (size.depth or 0) * (size.width or 0) ** 2 if is_text(config) else 0  # the matrices of the blocks
    problem = f"{place} does not hold the model that {CONFIG} describes"
    if least > sum(tensor.numel() for tensor in state.values()):
        raise UsageError(
            f"{problem}: it is smaller than depth {size.depth} and width {size.width} make it; restore {CONFIG}, or train again"
        )
    model = make()
    try:
        model.load_state_dict(with_ties(model, state))
    except RuntimeError as error:
        raise UsageError(f"{problem}: {error}") from None
    return model


def with_ties(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state with all names of tensors that the model shares, of which the stages keep one."""
    names: dict[int, list[str]] = {}
    for name, one in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(one), []).append(name)
    tied = {name: state[there[0]] for same in names.values() if (there := [one for one in same if one in state]) for name in same}
    return {**tied, **state}
