"""`delock compare`: trains several methods on the same data, model, cuts and seed, one after another; writes a table, a file, a figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from delock.cli.arguments import parse
from delock.cli.config import CompareConfig, flat, resolved
from delock.cli.handles import refuse_few_handles
from delock.cli.models.names import in_a_folder
from delock.cli.ranks import ranks
from delock.cli.recording import load_data, refuse, train
from delock.cli.rows import PLAIN, Row, cut_alike, rows
from delock.cli.run_folder import RunFolder, dumps
from delock.cli.summary import RunReport, compared, measure
from delock.cli.tables import IDLE, LAYERWISE, Cells, comparison_table, markdown
from delock.errors import DelockError, UsageError
from delock.records import Started

if TYPE_CHECKING:
    from delock.cli.models.facts import Loaded
    from delock.cli.terminal import Terminal

FIGURES = ("compare.png", "compare.svg")
ABOUT = """Train a network with several methods, and lay the results side by side.

examples:
  delock compare
  delock compare --methods bp,fdg:beta=0.5,adl:accumulate=2:lr=0.2 --epochs 5
  delock compare --methods bp dsp:p=2+1+3:q=1+1+1 --stages 4 --no-plain
  delock compare --data folder --data-dir DIR --model resnet20 --warmup 390
  delock compare --data text --methods bp,fdg,adl --batches 500
  delock compare --methods ddg,ddg:optimizer=muon,ddg:correct=spike+feedback"""


def run(words: Sequence[str]) -> int:
    """Parses, trains every row, shows the table, and returns the exit code: 1 if a row has failed."""
    config = parse(CompareConfig, words, "compare", ABOUT)
    if ranks():
        raise UsageError("compare starts processes of its own for every row: start it without torchrun")
    todo = rows(config)
    for row in todo:
        refuse_few_handles(row.config)
    folder = RunFolder(
        config.output.out, f"compare-{in_a_folder(resolved(todo[0].config.network.model))}", overwrite=config.output.overwrite
    )
    with folder.held():
        return _compare(config, todo, folder)


def _compare(config: CompareConfig, todo: Sequence[Row], folder: RunFolder) -> int:
    from delock.cli.terminal import Terminal

    screen = Terminal(goes_on=True)
    data = load_data(todo[0].config, screen)
    _refuse_rows(todo, data)
    reports: dict[str, RunReport] = {}
    try:
        whole = _train(config, todo, data, folder, screen, reports)
    except BaseException as error:
        if folder.opened:
            _keep(config, folder, reports)
            _finish(folder, reports)
            error.add_note(folder.lost or f"what was recorded is in {folder.path}")
        screen.end()
        raise
    screen.line()
    screen.table(*_table(reports), spare=(IDLE, LAYERWISE))
    if folder.opened:
        _finish(folder, reports)
        screen.line(f"run folder: {folder.path}")
    if folder.lost:
        raise DelockError(folder.lost)
    return int(not whole or any(report.status != "finished" for report in reports.values()))


def _refuse_rows(todo: Sequence[Row], data: Loaded) -> None:
    """Raises the first row's error, with its name unless all rows that are cut have it."""
    wrong: dict[str, str] = {}
    for row in todo:
        try:
            refuse(row.config, data)
        except UsageError as error:
            wrong[row.name] = str(error)
    if wrong:
        name, first = next(iter(wrong.items()))
        cut = [row.name for row in todo if row.name != PLAIN]
        raise UsageError(first if all(wrong.get(one) == first for one in cut) and len(cut) > 1 else f"{name}: {first}")


def _train(
    config: CompareConfig, todo: Sequence[Row], data: Loaded, folder: RunFolder, screen: Terminal, reports: dict[str, RunReport]
) -> bool:
    """Trains every row into its own folder, and returns False if one of these could not be written.

    A row that fails is reported, and the others go on; bad input with nothing kept ends all.
    """
    cuts: tuple[int | str, ...] | None = None
    whole = True
    for i, row in enumerate(todo):
        row = cut_alike(row, cuts) if cuts is not None else row
        report = reports[row.name] = RunReport(row.config)
        screen.line(f"\n{i + 1} of {len(todo)}: {row.name}")
        own = folder.inner(row.folder)
        try:
            train(report, data, own, screen)
        except DelockError as error:
            if isinstance(error, UsageError) and not report.started and not folder.opened:
                raise
            _say(f"error: {row.name}: {error}")
        if own.lost:
            whole = False
            _say(f"error: {row.name}: {own.lost}")
        if cuts is None and report.started and row.name != PLAIN:
            cuts = report.started.cuts  # measured once: the rows differ in the method alone
        if folder.opened:
            _keep(config, folder, reports)
            with suppress(OSError):  # a full disk, of which the files above have told
                _draw(folder, reports)
    return whole


def _finish(folder: RunFolder, reports: dict[str, RunReport]) -> None:
    """Brings what could not be written to another place, if need be, and draws the figures that are missing."""
    folder.settle()
    if any(report.steps for report in reports.values()) and not all((folder.path / name).exists() for name in FIGURES):
        folder.attempt(FIGURES[0], _draw, folder, reports)
        folder.settle()


def _say(text: str) -> None:
    with suppress(OSError):  # it may go to a file on a full disk
        print(text, file=sys.stderr)


def _keep(config: CompareConfig, folder: RunFolder, reports: dict[str, RunReport]) -> None:
    """Writes the results so far as a file and a table, after every row, so that they survive any end of this program."""
    any_cut = _any_cut(reports)
    options = {name: str(value) if name in ("data_dir", "text", "out", "config") else value for name, value in flat(config).items()}
    content = {"config": options, "cuts": any_cut.cuts if any_cut else None, "rows": compared(reports, PLAIN)}
    folder.write("compare.json", dumps(content, indent=2) + "\n")
    folder.write("compare.md", markdown(*_table(reports)))


def _draw(folder: RunFolder, reports: dict[str, RunReport]) -> None:
    from delock.draw import Run, curves

    runs = [Run(name, report.evaluations, report.steps) for name, report in reports.items() if report.steps]
    if runs:
        try:
            curves(runs, folder.path / "compare")
        except OSError:  # no half of a figure
            for name in FIGURES:
                (folder.path / name).unlink(missing_ok=True)
            raise


def _table(reports: dict[str, RunReport]) -> tuple[Cells, list[Cells]]:
    any_cut = _any_cut(reports)
    metric = measure(next(iter(reports.values())).config)
    return comparison_table(compared(reports, PLAIN), len(any_cut.stages) if any_cut else 1, metric)


def _any_cut(reports: dict[str, RunReport]) -> Started | None:
    """Returns a run that has the common cuts: any but the plain one."""
    return next((report.started for name, report in reports.items() if name != PLAIN and report.started), None)
