"""`delock replay`: repeats the visits of a free-running run in one process, and compares the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, make_method
from delock.cli.kept_run import config_of, summary_of
from delock.cli.models.kept_files import changed
from delock.cli.ranks import ranks
from delock.cli.recording import fit_config
from delock.cli.run_folder import CHECKPOINTS, CONFIG, MODEL, TRACE, load_visits
from delock.cli.summary import evaluated, trained
from delock.cli.terminal import Terminal
from delock.cli.workload import build_model, load_data
from delock.engine.asynchronous.schedule import recorded
from delock.errors import DelockError, UsageError
from delock.ops import Evaluate, Forward, Update
from delock.records import Cut, EvaluationRecord, Event, StepRecord, Visit

if TYPE_CHECKING:
    from torch import Tensor

    from delock.options import Checkpoint

ABOUT = """Do a free-running run again in one process, from its trace, and compare the weights. RUN is the run's folder.

  --from CHECKPOINT   begin at a checkpoint, with the weights and the replay buffers that it has, in place of the first batch:
                      its folder, its name in RUN/checkpoints, or newest

examples:
  delock train --method dgl-async --stages 4 --out runs/free
  delock replay runs/free
  delock replay runs/free --from newest
  delock replay runs/free --from runs/free/checkpoints/batch-00000500"""


@dataclass(frozen=True)
class ReplayConfig:
    """Holds no options: `delock replay` finds all but the checkpoint that it begins at in the run's folder."""


def run(words: Sequence[str]) -> int:
    """Parses, repeats, compares, and returns the exit code. Raises DelockError if the weights differ."""
    words, start = _start(words)
    path = Path(words[0]) if words and not words[0].startswith("-") else None
    parse(ReplayConfig, words[1:] if path else words, "replay RUN", ABOUT)
    if path is None:
        raise UsageError("say first which run: delock replay RUN, with the folder of a run with --method dgl-async")
    if ranks():
        raise UsageError("replay does everything in one process: start it without torchrun")
    config = read_config(path)
    visits, screen = load_visits(path, config.network.stages or 1), Terminal()
    begin = _begin(path, start, visits)
    cuts_of(begin)
    if (path / MODEL).is_file():
        _refuse_incomplete(path, sum(map(len, visits)))
    for note in changed(path):
        screen.line(note)
    state = repeat(config, visits, screen, begin)
    done = f"replayed {extent(visits, cuts_of(begin))}"
    if not (path / MODEL).is_file():
        screen.line(f"{done}: the run was cut off, and this is as far as its trace goes; it left no weights to compare with")
        return 0
    different = differences(state, path / MODEL)
    if different:
        some = ", ".join(different[:3])
        hint = "" if start else _hint(path)
        raise DelockError(f"{done}: {len(different)} of {len(state)} tensors differ from those of the run, such as {some}{hint}")
    screen.line(f"{done}: the weights equal those of the run, to the last bit")
    return 0


def _start(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns the words without --from CHECKPOINT, which no field of a config can be called, and the checkpoint."""
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--from=") else [word])]
    if "--from" not in split:
        return split, None
    at = split.index("--from")
    if len(split) == at + 1 or split[at + 1].startswith("--"):
        raise UsageError("--from needs a checkpoint: its folder, its name in the run's folder, or newest")
    return split[:at] + split[at + 2 :], split[at + 1]


def _begin(run: Path, start: str | None, visits: Sequence[Sequence[Visit]]) -> Checkpoint | None:
    """Returns the checkpoint to begin at. Raises UsageError where there is none, and for a trace that begins in the middle of a run."""
    from delock.options import Checkpoint

    if start is not None:
        return Checkpoint(run / CHECKPOINTS, resume=start)
    firsts = [next((visit.ordinal for visit in stage if not visit.evaluates), 0) for stage in visits]
    if any(firsts):
        raise UsageError(f"the trace of {run} begins with visit {max(firsts)}: name the checkpoint that the run went on from with --from")
    return None


def cuts_of(begin: Checkpoint | None) -> tuple[Cut, ...]:
    """Returns where the checkpoint cuts the visits of each stage. Raises UsageError for one that is not there, damaged, or not free."""
    from delock.run.survival.parts import cuts
    from delock.run.survival.resume import find

    if begin is None:
        return ()
    found, _ = find(begin, writes=False)
    if found is None:
        raise UsageError(f"there is no checkpoint in {begin.folder}: leave --from out")
    return cuts(found.path, found.manifest)


def _refuse_incomplete(run: Path, there: int) -> None:
    """Raises UsageError if a run that has come to its end has made more visits than its trace holds."""
    told = summary_of(run).get("visits")
    if isinstance(told, int) and there < told:
        missing = f"{told - there:,} {'is' if told - there == 1 else 'are'} missing"
        raise UsageError(f"{run / TRACE} holds {there:,} of the run's {told:,} visits: {missing}; restore the file, or train again")
    if not there:
        raise UsageError(f"{run / TRACE} holds no visit, and the run has come to its end: restore it, or train again")


def _hint(run: Path) -> str:
    """Returns what may help where the weights of a run that went on from a checkpoint differ."""
    from delock.checkpoints.directory import name_of

    batches = summary_of(run).get("resumed_at")
    if not isinstance(batches, list) or not batches or not isinstance(batches[-1], int):
        return ""
    name = name_of(batches[-1])
    advice = f"begin there with --from {name}" if (run / CHECKPOINTS / name).is_dir() else f"{name}, where it began, is gone"
    return f"; the run went on from a checkpoint, perhaps with another length: {advice}"


def extent(visits: Sequence[Sequence[Visit]], cuts: Sequence[Cut] = ()) -> str:
    """Describes the part of a trace that can be replayed; after a cut-off run, visits that read from missing ones are left out."""
    plan, whole = recorded(visits, cuts=cuts)
    done = [[step.op for step in column] for column in plan.columns]
    forwards = sum(isinstance(op, Forward | Evaluate) for column in done for op in column)
    updates = "/".join(str(sum(isinstance(op, Update) for op in column)) for column in done)
    left = "" if whole else f" of {sum(map(len, visits)):,} on record (the others read what is not)"
    return f"{forwards:,} visits{left} of {plan.K} stage{'s' if plan.K > 1 else ''}, {updates} updates"


def read_config(run: Path) -> TrainConfig:
    """Returns the config of a free-running run. Raises UsageError for any other folder."""
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} is not the folder of a run: it has no {CONFIG}" if run.exists() else f"there is no run {run}")
    config = config_of(run)
    method = make_method(config.algorithm)
    if not method.free_running:
        raise UsageError(f"{run} was not free-running: its plan is fixed, so delock train --config {run / CONFIG} repeats it")
    if config.simulation.emulate:
        raise UsageError(f"the stages of {run} were emulated: they computed nothing that could be done again")
    return config


def repeat(
    config: TrainConfig, visits: Sequence[Sequence[Visit]], screen: Terminal, begin: Checkpoint | None = None
) -> Mapping[str, Tensor]:
    """Repeats the visits, from the first or from a checkpoint on, and returns the weights by their names in the unsplit model."""
    screen.phase(f"loading {config.dataset.data}")
    data = load_data(config, screen.progress)
    screen.end()
    model = build_model(config, data)
    batches = max((sum(visit.trains for visit in stage) for stage in visits), default=0)

    def hear(event: Event) -> None:
        match event:
            case StepRecord():
                screen.progress(event.batches, batches, trained(config, event, batches))
            case EvaluationRecord():
                screen.line(evaluated(config, event))

    fit_config(config, data, model, hear, replay=visits, kept=begin)
    screen.end()
    return model.state_dict()


def differences(state: Mapping[str, Tensor], saved: Path) -> list[str]:
    """Returns the names of the tensors that are not equal to the last bit."""
    from delock.checkpoints.whole_model import read_model

    other = read_model(saved)
    return [name for name, value in state.items() if name not in other or not value.equal(other[name])]
