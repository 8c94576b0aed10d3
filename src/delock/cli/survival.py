"""Checkpoints on the command line: the words of --resume, and the group of `fit` that they stand for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from delock.cli.config import TrainConfig, flat, make_method
from delock.cli.config.flat import LONGEST, brief
from delock.cli.config.options import CheckpointOptions
from delock.cli.kept_run import read_config, summary_of
from delock.cli.models.kept_files import changed
from delock.cli.ranks import ranks
from delock.cli.run_folder import CHECKPOINTS, CONFIG, SUMMARY
from delock.errors import UsageError
from delock.options import Checkpoint, Placement

NEWEST = "newest"
FLAGS: Mapping[str, str] = MappingProxyType(
    {"every": "checkpoint-every", "keep": "checkpoint-keep", "best": "checkpoint-best", "restarts": "max-restarts"}
)
"""Fields of the group of `fit` that options of the command line have other names for; its errors begin with the field."""
FREE = frozenset(
    {
        *("stages", "cuts", "epochs", "batches", "layout", "workers", "device", *Placement.__dataclass_fields__),
        *("log_every", "trace", "tensorboard", "out", "overwrite", "config", "data_dir", "download"),
        *CheckpointOptions.__dataclass_fields__,
    }
)
"""Options that may be others when a run goes on: stages, length, places, logging, and checkpoints themselves."""


def spelled_out(words: Sequence[str]) -> list[str]:
    """Returns the words with what --resume leaves out: the checkpoint, and the folder and the options of the run that it belongs to.

    Raises UsageError for a run or a checkpoint that does not exist, and for --resume without one.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and "--resume" not in words and _value(words, "--out"):
        words = [*words, "--resume"]  # torchrun has started the ranks again
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    if "--resume" not in words:
        return words
    at = words.index("--resume")
    behind = words[at + 1 : at + 2]
    given = behind[0] if behind and not behind[0].startswith("--") else None
    rest = words[:at] + words[at + 1 + (given is not None) :]
    out = _value(rest, "--out")
    if again and out is not None and (Path(out) / CONFIG).is_file():
        given = None  # what has begun there goes on, wherever it came from
    run, checkpoint = _found(given, out)
    extra = ["--resume", checkpoint]
    if out is None:
        extra += ["--out", str(run)]
    if _value(rest, "--config") is None and (run / CONFIG).is_file():
        extra += ["--config", str(run / CONFIG)]
    return [*rest, *extra]


def refuse_changed(config: TrainConfig, out: Path) -> None:
    """Raises UsageError if a run in `out` is to go on with another option than those that may change (FREE)."""
    resume = config.survival.resume
    if resume is None:
        return
    run = run_of(resume, out)
    if not (run / CONFIG).is_file():
        return
    if different := changed(run):
        raise UsageError(f"{different[0]}: restore it, or begin a new run")
    text = config.language.text
    if text is not None and text.exists() and not text.is_file():
        raise UsageError(f"{text} is no file, so nothing tells whether it is the text of the run in {run}: begin a new run, with a file")
    then, now = flat(read_config(run)), flat(config)
    chief = ("method", "model", "data", "optimizer", "correct", "schedule")  # others follow from them
    for name in sorted({*then, *now} - FREE, key=lambda name: (name not in chief, name)):
        if then.get(name) != now.get(name):
            was, now_is = (values.get(name, "not given") for values in (then, now))
            flag = name.replace("_", "-")
            raise UsageError(f"{flag} was {was} when the run in {run} began, and is {now_is} now: use the same, or begin a new run")


def run_of(resume: str, out: Path) -> Path:
    """Returns the folder of the run that goes on; out: that of the run to come."""
    path = Path(resume)
    return out if resume == NEWEST else path.parent if path.name == CHECKPOINTS else path.parent.parent


def goes_on(config: TrainConfig) -> bool:
    """Returns True if the run in the folder of this one goes on there; one that goes on elsewhere stays as it is."""
    resume, out = config.survival.resume, config.output.out
    return resume is not None and (out is None or run_of(resume, out).resolve() == out.resolve())


def is_over(config: TrainConfig, out: Path) -> bool:
    """Returns True if a run that is to go on in its own folder has finished, and is not to be longer than it was."""
    if config.survival.resume != NEWEST or not (out / SUMMARY).is_file() or not (out / CONFIG).is_file():
        return False
    then = read_config(out)
    length = (config.training.epochs, config.training.batches) == (then.training.epochs, then.training.batches)
    return length and summary_of(out).get("status") == "finished"


def refuse_lost_restarts(config: TrainConfig) -> None:
    """Raises UsageError for a run that torchrun may start again, and that would not find its checkpoints then."""
    if ranks() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and config.survival.checkpoint and config.output.out is None:
        raise UsageError("torchrun may start this run again (--max-restarts), and it must find its folder then: give --out")


def _found(given: str | None, out: str | None) -> tuple[Path, str]:
    """Returns the run's folder, and what its checkpoint is called: newest, or a path."""
    if given is None or given == NEWEST:
        if out is None:
            raise UsageError("--resume goes on with a run, but which is not said: give its folder, as in --resume runs/RUN")
        return Path(out), NEWEST
    path = Path(given)
    if not path.exists() and out is not None and (Path(out) / CHECKPOINTS / given).is_dir():
        path = Path(out) / CHECKPOINTS / given
    if not path.is_dir():
        raise UsageError(f"--resume is {given}, but there is no such run or checkpoint")
    if path.name.startswith("batch-"):
        return path.parent.parent, str(path)
    if path.name == CHECKPOINTS:
        path = path.parent
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} is not the folder of a run: it has no {CONFIG}")
    own = out is None or Path(out).resolve() == path.resolve()
    return path, NEWEST if own else str(path / CHECKPOINTS)


def checkpoint(config: TrainConfig, folder: Path) -> Checkpoint | None:
    """Returns the checkpoints of a run into that folder; None where it keeps none.

    Emulated and captured runs, and those whose turns are drawn, cannot keep any, which is an error only where they are asked for.
    """
    options, method = config.survival, make_method(config.algorithm)
    unable = config.simulation.emulate or config.execution.captured or not (method.planned or method.free_running)
    if not options.checkpoint:
        if options.resume:
            raise UsageError("--resume goes on from a checkpoint, and --no-checkpoint says that there are none: leave one of them out")
        return None
    if unable and options == CheckpointOptions():
        return None
    text = options.checkpoint_every
    every = int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST else brief(text)
    try:
        return Checkpoint(
            folder / CHECKPOINTS,
            every=every,
            keep=options.checkpoint_keep,
            best=options.checkpoint_best,
            resume=options.resume,
            grace=options.grace,
            restarts=options.max_restarts,
        )
    except UsageError as error:
        field, rest = re.fullmatch(r"(\w+)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        raise UsageError(f"{FLAGS.get(field, field)}{rest}") from None


def _value(words: Sequence[str], option: str) -> str | None:
    """Returns the value behind an option."""
    for i, word in enumerate(words):
        if word == option:
            return words[i + 1] if i + 1 < len(words) else None
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
