"""`delock compare`: several methods on the same data, model, cuts and seed, one after another; a table, a file, a figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from delock.cli import INTERRUPTED
from delock.cli.arguments import parse
from delock.cli.rows import PLAIN, Row, cut_alike, rows
from delock.cli.session import check_network, load_data, ranks, train, warm_up
from delock.config import CompareConfig, flat
from delock.errors import DelockError, UsageError
from delock.report import Story, compared, comparison_table, markdown
from delock.runfolder import RunFolder, dumps

if TYPE_CHECKING:
    from delock.cli.screen import Screen
    from delock.data import Data

ABOUT = """Train a network with several methods, one after another, and lay the results side by side.

examples:
  delock compare
  delock compare --methods bp,ddg,fr,fdg,fdg:beta=0.5,adl:accumulate=2:lr=0.2,dsp --epochs 5
  delock compare --methods bp dsp:p=2+1+3:q=1+1+1 --stages 4 --no-plain
  delock compare --data folder --data-dir DIR --model resnet20 --batch-size 128 --epochs 3 --warmup 390"""


def run(words: Sequence[str]) -> int:
    """Parse, train every row, show; returns the exit code: 1 if a row has failed."""
    config = parse(CompareConfig, words, "compare", ABOUT)
    if ranks():
        raise UsageError("compare starts processes of its own for every row: start it without torchrun")
    todo = rows(config)
    folder = RunFolder(config.output.out, f"compare-{config.network.model.replace('/', '-')}", overwrite=config.output.overwrite)
    warm_up(todo[0].config)
    from delock.cli.screen import Screen  # here: rich is not needed where words are wrong

    screen = Screen()
    data = load_data(todo[0].config, screen)
    check_network(todo[-1].config, data)
    stories: dict[str, Story] = {}
    try:
        _train(todo, data, folder, screen, stories)
        code = int(any(story.status != "finished" for story in stories.values()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    if folder.opened:
        _close(config, folder, screen, stories)
    return code


def _train(todo: Sequence[Row], data: Data, folder: RunFolder, screen: Screen, stories: dict[str, Story]) -> None:
    """Train every row into its own folder. A row that fails is told, and the others go on."""
    cuts: tuple[int, ...] | None = None
    for i, row in enumerate(todo):
        row = cut_alike(row, cuts) if cuts is not None else row
        story = stories[row.name] = Story(row.config)
        screen.line(f"\n{i + 1} of {len(todo)}: {row.name}")
        try:
            train(story, data, folder.inner(row.folder), screen)
        except DelockError as error:
            print(f"error: {row.name}: {error}", file=sys.stderr)
        if cuts is None and story.started and row.name != PLAIN:
            cuts = story.started.cuts  # measured once: the rows differ in the method alone


def _close(config: CompareConfig, folder: RunFolder, screen: Screen, stories: dict[str, Story]) -> None:
    from delock.draw import Run, curves

    told = compared(stories, PLAIN)
    any_cut = next((story.started for name, story in stories.items() if name != PLAIN and story.started), None)
    K = len(any_cut.stages) if any_cut else 1
    head, body = comparison_table(told, K)
    options = {name: str(value) if name in ("data_dir", "out", "config") else value for name, value in flat(config).items()}
    folder.write("compare.json", dumps({"config": options, "cuts": any_cut.cuts if any_cut else None, "rows": told}, indent=2) + "\n")
    folder.write("compare.md", markdown(head, body))
    runs = [Run(name, story.evaluations, story.steps) for name, story in stories.items() if story.steps]
    if runs:
        curves(runs, folder.path / "compare")
    screen.line()
    screen.table(head, body)
    screen.line(f"run folder: {folder.path}")
