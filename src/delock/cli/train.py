"""`delock train`: trains, shows the progress, and keeps the run in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, is_text, resolve, resolved
from delock.cli.handles import refuse_few_handles
from delock.cli.models.names import in_a_folder
from delock.cli.ranks import is_rank_zero, ranks
from delock.cli.recording import load_data, train
from delock.cli.run_folder import RunFolder
from delock.cli.summary import RunReport, closing
from delock.cli.survival import checkpoint, goes_on, is_over, refuse_changed, refuse_lost_restarts, spelled_out
from delock.cli.tables import stage_table
from delock.cli.terminal import Terminal
from delock.cli.trace import keep
from delock.errors import DelockError

ABOUT = """Train a network on several workers, one stage each.

examples:
  delock train
  delock train --method adl --accumulate 4 --stages 4 --epochs 10
  delock train --data folder --data-dir DIR --model resnet20 --batch-size 128
  delock train --data text --text book.txt --stages 4
  delock train --model timm/resnet10t --data folder --data-dir DIR
  delock train --model hf/config.json --data text --stages 4
  delock train --model own.py:network --data own.py:batches
  delock train --method ddg --micro-batches 4 --optimizer adamw --correct spike
  delock train --config runs/RUN/config.toml --seed 1
  delock train --resume runs/RUN
  delock train --resume runs/RUN --epochs 40
  torchrun --nproc-per-node 2 -m delock train"""


def run(words: Sequence[str]) -> int:
    """Parses, trains, shows the results, and returns the exit code."""
    config = resolve(parse(TrainConfig, spelled_out(words), "train", ABOUT), ranks())
    refuse_lost_restarts(config)
    refuse_few_handles(config)
    checkpoint(config, Path())  # raises UsageError before anything is loaded
    if config.output.out:
        refuse_changed(config, config.output.out)
        if is_over(config, config.output.out):
            print(f"the run in {config.output.out} is finished; --epochs or --batches make it longer")
            return 0
    name = f"{config.algorithm.method}-{in_a_folder(resolved(config.network.model))}"
    folder = RunFolder(config.output.out, name, overwrite=config.output.overwrite, goes_on=goes_on(config))
    with folder.held() if is_rank_zero() else nullcontext():
        return _train(config, folder)


def _train(config: TrainConfig, folder: RunFolder) -> int:
    screen = Terminal(quiet=not is_rank_zero(), goes_on=True)
    report = RunReport(config)
    try:
        train(report, load_data(config, screen), folder, screen)
    except BaseException as error:
        if folder.opened:
            error.add_note(folder.lost or f"what was recorded is in {folder.path}")
            if saved := [one.batches for one in report.checkpoints if not one.problem]:
                error.add_note(f"delock train --resume {folder.path} goes on from batch {saved[-1]}")
        screen.end()
        raise
    if folder.opened and report.result:
        screen.line("\nmeasured, per stage (staleness: means, warm-up included):")
        screen.table(*stage_table(report.result.stages, report.result.started.stages))
        if config.report.trace:
            keep(report, folder, screen)
        screen.line(closing(report))
        screen.line(f"run folder: {folder.path}")
        if is_text(config):
            screen.line(f"delock sample {folder.path} prints text from it")
        if folder.lost:
            raise DelockError(folder.lost)
    return 0
