"""`delock replay`: does in one process, turn by turn, what the processes of a free-running run did, and compares the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delock.cli.arguments import parse
from delock.cli.screen import Screen
from delock.cli.session import fit_config
from delock.cli.workload import build_model, load_data
from delock.config import TrainConfig, build, make_method, resolve, toml
from delock.errors import DelockError, UsageError
from delock.methods import AsyncDGL
from delock.records import EvaluationRecord, Event, StepRecord, Turn
from delock.report import evaluated, trained
from delock.runfolder import CONFIG, MODEL, load_turns

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = """Do a free-running run again in one process, from its trace, and compare the weights. RUN is the run's folder.

examples:
  delock train --method dgl-async --stages 4 --out runs/free
  delock replay runs/free"""


@dataclass(frozen=True)
class ReplayConfig:
    """`delock replay` has no options: everything is in the run's folder."""


def run(words: Sequence[str]) -> int:
    """Parse, repeat, compare; returns the exit code. Raises DelockError when the weights differ."""
    path = Path(words[0]) if words and not words[0].startswith("-") else None
    parse(ReplayConfig, words[1:] if path else words, "replay RUN", ABOUT)
    if path is None:
        raise UsageError("say first which run: delock replay RUN, with the folder of a run with --method dgl-async")
    config = read_config(path)
    turns, screen = load_turns(path), Screen()
    state = repeat(config, turns, screen)
    updates = [sum(turn.trains for turn in stage) for stage in turns]
    done = f"{sum(map(len, turns)):,} turns of {len(turns)} stages, {'/'.join(map(str, updates))} updates"
    if not (path / MODEL).is_file():
        screen.line(f"replayed {done}: as far as the trace goes, for the run was cut off; it left no weights to compare with")
        return 0
    different = differences(state, path / MODEL)
    if different:
        some = ", ".join(different[:3])
        raise DelockError(f"replayed {done}: {len(different)} of {len(state)} tensors differ from those of the run, such as {some}")
    screen.line(f"replayed {done}: the weights equal those of the run, to the last bit")
    return 0


def read_config(run: Path) -> TrainConfig:
    """The config of a free-running run. Raises UsageError for any other folder."""
    if not (run / CONFIG).is_file():
        raise UsageError(f"{run} is not the folder of a run: it has no {CONFIG}" if run.exists() else f"there is no run {run}")
    config = resolve(build(TrainConfig, toml.read(run / CONFIG), str(run / CONFIG)))
    method = make_method(config.algorithm)
    if not (isinstance(method, AsyncDGL) and method.turns == "free"):
        raise UsageError(f"{run} was not free-running: its plan is fixed, so delock train --config {run / CONFIG} repeats it")
    return config


def repeat(config: TrainConfig, turns: Sequence[Sequence[Turn]], screen: Screen) -> Mapping[str, Tensor]:
    """Do the turns again; the weights afterwards, by their names in the unsplit model."""
    screen.phase(f"loading {config.dataset.data}")
    data = load_data(config, screen.progress)
    screen.end()
    model = build_model(config, data)
    batches = max((sum(turn.trains for turn in stage) for stage in turns), default=0)

    def hear(event: Event) -> None:
        match event:
            case StepRecord():
                screen.progress(event.step, batches, trained(config, event, batches))
            case EvaluationRecord():
                screen.line(evaluated(config, event))

    fit_config(config, data, model, hear, turns=turns)
    screen.end()
    return model.state_dict()


def differences(state: Mapping[str, Tensor], saved: Path) -> list[str]:
    """Names of the tensors that are not equal to the last bit."""
    from safetensors.torch import load_file

    other = load_file(saved)
    return [name for name, value in state.items() if name not in other or not value.equal(other[name])]
