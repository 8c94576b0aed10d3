"""Runs a config and fills its run folder: `train` does this once, `compare` once per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from delock.cli.config import TrainConfig, flat, make_method, other_kind_options, tokens, toml
from delock.cli.loading import load_torch
from delock.cli.models.kept_files import FILES, checksums
from delock.cli.ranks import ranks
from delock.cli.run_folder import ALPHABET, BOARD, CHECKPOINTS, CONFIG, SUMMARY, RunFolder, dumps
from delock.cli.summary import RunReport, cut_line, evaluated, gone_on, opening, summary, trained, written
from delock.cli.survival import checkpoint
from delock.cli.tables import per_second, prediction_table
from delock.cli.tensorboard import TensorBoard
from delock.cli.terminal import Terminal
from delock.cli.workload import build_model, goals
from delock.cli.workload import load_data as read_data
from delock.errors import UsageError
from delock.records import CheckpointRecord, EvaluationRecord, Event, Result, Resumed, Started, StepRecord, Visit, VisitsRecord

if TYPE_CHECKING:
    from torch import nn

    from delock.cli.models.facts import Loaded
    from delock.options import Checkpoint

NOT_REPEATED = ("out", "overwrite", "config", "resume")  # config.toml says how to repeat a run, not where an earlier one was kept


def load_data(config: TrainConfig, screen: Terminal) -> Loaded:
    """Loads the data set of a config, with its progress on the screen."""
    screen.phase(f"loading {config.dataset.data}")
    load_torch()
    data = read_data(config, screen.progress)
    screen.end()
    return data


class Recording:
    """Records one run: events go to the screen and into the folder, and `end` writes the summary."""

    def __init__(self, report: RunReport, data: Loaded, folder: RunFolder, screen: Terminal) -> None:
        self.report, self.data, self.folder, self.screen = report, data, folder, screen
        self.board: TensorBoard | None = None
        self.files = checksums(report.config.network.model, report.config.dataset.data, report.config.language.text)

    def hear(self, event: Event) -> None:
        """Handles an event of `fit`."""
        asked = self.report.config
        self.report.hear(event)
        config = self.report.config
        match event:
            case Started():
                self.screen.end()
                self.screen.line(opening(config, event))
                if event.traced:
                    self.screen.line(event.traced)
                if where := cut_line(asked, event):
                    self.screen.line(where)
                self.screen.line(f"predicted: {per_second(event.samples_per_second, tokens(config))}; per stage:")
                self.screen.table(*prediction_table(event))
                if event.compiled:
                    self.screen.line("compiling every stage, outside all measured times: often half a minute, less the second time")
                self.screen.phase("training", event.batches)
                if any((self.folder.path / CHECKPOINTS).glob("batch-*")) and not config.survival.resume:
                    self.open()  # with --overwrite: an earlier run's checkpoints go before those of this one come
                return
            case StepRecord():
                self.screen.progress(event.batches, self.report.batches, trained(config, event, self.report.batches))
            case EvaluationRecord():
                self.screen.line(evaluated(config, event))
            case VisitsRecord():
                self.open()
                self.folder.add_visits(event)
                return
            case CheckpointRecord():
                self.screen.line(written(event))
                self.open()  # killed now, the run could go on: it needs its config
                return
            case Resumed():
                self.go_on(event)
                return
        self.open()
        self.folder.add(event)
        if self.board:
            self.folder.attempt(BOARD, self.board.add, event)

    def go_on(self, event: Resumed) -> None:
        """Drops the records of batches that are trained again."""
        self.screen.line(gone_on(event))
        for note in event.notes:
            self.screen.line(note)
        source = Path(event.path).parent.parent if event.path else self.folder.path
        records = self.folder.earlier_records(event.trained, event.evaluations, source)  # before anything changes: a line may be damaged
        visits = self.folder.earlier_visits(event.cuts, source)
        self.open()
        self.folder.begin(records, visits)
        if self.board:
            self.folder.attempt(BOARD, self.board.close)
            self.board = self.folder.attempt(BOARD, TensorBoard, self.folder.path, event.trained)

    def open(self) -> None:
        """Makes the folder once there is something to keep: bad input leaves no folder, and an earlier run as it was."""
        from delock.data import TextData

        if not self.folder.opened:
            self.folder.open()
            config = self.report.config
            values = {name: value for name, value in flat(config).items() if name not in (*NOT_REPEATED, *other_kind_options(config))}
            self.folder.write(CONFIG, toml.write(values, "delock train --config FILE repeats this run"))
            if isinstance(self.data, TextData):
                self.folder.write(ALPHABET, dumps({"characters": self.data.alphabet.characters}) + "\n")
            if self.files:
                self.folder.write(FILES, dumps(self.files, indent=2) + "\n")
            if config.output.tensorboard:
                self.board = self.folder.attempt(BOARD, TensorBoard, self.folder.path)

    def end(self) -> None:
        """Closes everything; a folder gets its summary. The screen comes last, because its terminal may have been closed."""
        if self.board:
            self.folder.attempt(BOARD, self.board.close)
        if self.folder.opened:
            traced = {"visits": self.folder.visits} if self.folder.visits else {}  # a trace without its end is no longer whole
            self.folder.write(SUMMARY, dumps({**summary(self.report), **traced}, indent=2) + "\n")
            self.folder.settle()
        self.screen.end()


def train(report: RunReport, data: Loaded, folder: RunFolder, screen: Terminal) -> None:
    """Trains as the report's resolved config says, and records the run in the report.

    The folder gets its files as they are made, and a summary however the run ends; errors and KeyboardInterrupt propagate to the caller.
    """
    recording = Recording(report, data, folder, screen)
    try:
        model = build_model(report.config, data)
        screen.phase("measuring the layers")
        kept = checkpoint(report.config, folder.path)
        report.result = fit_config(report.config, data, model, recording.hear, kept=kept)
        if folder.opened and not report.config.simulation.emulate:  # ranks above 0 have no folder
            folder.save_model(model.state_dict())
        report.status = "finished"
    except BaseException as error:
        report.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        report.error = str(error) or None
        if report.started and not isinstance(error, UsageError):
            recording.open()
        raise
    finally:
        try:
            recording.end()
        except KeyboardInterrupt:  # for a while another one is ignored
            recording.end()
            raise


def refuse(config: TrainConfig, data: Loaded) -> None:
    """Raises UsageError for a resolved config that cannot be trained: an unknown model or device, too few layers, a batch of one, a clip or
    a codec that cannot be.

    The layers of a model that is no chain are known later, when it has been traced.
    """
    from delock.launch.rank import backend_for
    from delock.partition.network import Network
    from delock.run.checks import refuse_error_codec, refuse_unfit, refuse_wrong_link
    from delock.run.request import refuse_wrong_clip

    network, machine = config.network, config.machine
    K, method = network.stages or 1, make_method(config.algorithm)
    method.fits_workers(machine.workers if ranks() is None else "torchrun")
    backend_for(machine.device, None, K if machine.workers == "processes" else 1)
    refuse_wrong_link(method, config.placement.link, machine.device)
    refuse_wrong_clip(config.training.clip)
    refuse_error_codec(config.compression, method, K)
    model = Network(build_model(config, data))
    model.open(model.wanted(network.cuts, K))
    if model.chain:
        refuse_unfit(model.layers(), K, network.cuts, method, data.train.sizes())


def fit_config(
    config: TrainConfig,
    data: Loaded,
    model: nn.Module,
    tell: Callable[[Event], None],
    replay: Sequence[Sequence[Visit]] | None = None,
    kept: Checkpoint | None = None,
) -> Result:
    """Calls `fit` for a resolved config; `replay`: the visits of a free-running run, to repeat in this process; `kept`: checkpoints."""
    from delock.api import fit
    from delock.cli.workload import recipe

    training, machine = config.training, config.machine
    method = make_method(config.algorithm)
    loss, metrics = goals(config, data)
    epoch = len(data.train)
    optimizer, schedule = recipe(config, method, epoch, training.batches or epoch * (training.epochs or 0))
    return fit(
        model,
        data.train,
        None if config.simulation.emulate else data.test,
        loss=loss,
        method=method,
        optimizer=optimizer,
        schedule=schedule,
        stages=config.network.stages,
        cuts=config.network.cuts,
        epochs=training.epochs,
        batches=training.batches,
        eval_every=training.eval_every,
        clip=training.clip,
        metrics=metrics,
        heads=config.network.head,
        seed=training.seed,
        device=machine.device,
        workers=machine.workers if replay is None else "inline",
        execution=config.execution,
        placement=config.placement,
        compression=config.compression,
        simulation=replace(config.simulation, replay=replay),
        report=config.report,
        checkpoint=kept,
        callbacks=[tell],
    )
