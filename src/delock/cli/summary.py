"""Describes a run in sentences and in summary.json, and several runs side by side in compare.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

from delock import __version__
from delock.cli.config import TrainConfig, is_own, is_text, make_method, tokens
from delock.cli.tables import metric_text, per_second
from delock.methods import options
from delock.records import CheckpointRecord, EvaluationRecord, Event, Result, Resumed, StageReport, Started, StepRecord, Traffic

UNEVEN = 1.1  # the slowest stage over the mean: from here on the line names the way to more even stages
Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass
class RunReport:
    """Collects the reports of a run so far, enough for a summary however it ends."""

    config: TrainConfig
    status: Status = "running"
    started: Started | None = None
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    result: Result | None = None
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    resumed: list[Resumed] = field(default_factory=list)
    error: str | None = None

    @property
    def batches(self) -> int:
        """Returns the number of batches of the whole run, 0 before it has started."""
        return self.started.batches if self.started else 0

    def hear(self, event: Event) -> None:
        """Notes one event."""
        match event:
            case Started():
                self.started = event
                self.config = settled(self.config, event.cuts)
            case StepRecord():
                self.steps.append(event)
            case EvaluationRecord():
                self.evaluations.append(event)
            case CheckpointRecord():
                self.checkpoints.append(event)
            case Resumed():
                self.resumed.append(event)
                self.steps = [step for step in self.steps if step.batches <= event.trained]
                self.evaluations = [one for one in self.evaluations if one.batches <= event.trained][: event.evaluations]


def settled(config: TrainConfig, cuts: tuple[int | str, ...]) -> TrainConfig:
    """Returns the config with the cuts that are used."""
    return replace(config, network=replace(config.network, cuts=cuts, stages=len(cuts) + 1))


def measure(config: TrainConfig) -> str:
    """Returns the metric by which a run is judged; for text, and for data of the user's, smaller is better."""
    if is_own(config):
        return "loss"
    if not is_text(config):
        return "accuracy"
    return "bits_per_byte" if config.language.level == "byte" else "bits_per_character"


def trained(config: TrainConfig, record: StepRecord, batches: int) -> str:
    """Describes the progress of the training."""
    return f"{record.batches}/{batches}  loss {record.loss:.3f}  {per_second(_rate(record), tokens(config))}"


def evaluated(config: TrainConfig, record: EvaluationRecord) -> str:
    """Describes an evaluation in one line."""
    unit = " nats" if is_text(config) else ""
    losses = [f"train loss {record.train_loss:.4f}{unit}", f"test loss {record.test_loss:.4f}{unit}"]
    metrics = [metric_text(name, value) for name, value in record.metrics.items()]
    return "  ".join([f"epoch {record.epoch:.4g}", *losses, *metrics, per_second(_rate(record), tokens(config))])


def written(record: CheckpointRecord) -> str:
    """Describes a checkpoint, or that there is none, in one line."""
    if record.problem:
        return f"warning: no checkpoint at batch {record.batches}: {record.problem}"
    return f"checkpoint at batch {record.batches}: {record.bytes / 1e6:,.1f} MB in {record.seconds:.1f} s"


def gone_on(event: Resumed) -> str:
    """Says where a run goes on."""
    return f"goes on from {event.path}, at batch {event.batches}" if event.path else "begins at its first batch"


def opening(config: TrainConfig, started: Started) -> str:
    """Describes in one line the run that is about to start."""
    K = len(started.stages)
    processes = f"in {K} processes" if K > 1 else "in one process"
    where = {"processes": processes, "inline": "in this process", "torchrun": "on torchrun's ranks"}
    stages = f"{K} stages {where[started.workers]}" if K > 1 else f"uncut {where[started.workers]}"
    epochs = f"{started.epochs:.4g} epoch" + ("s" if started.epochs != 1 else "")
    sized = "" if is_own(config) else f" of {config.dataset.batch_size}"
    length = f"{epochs} ({started.batches} batches{sized})"
    layout = f", {started.layout}" if started.layout != "default" else ""
    layout += ", compiled" if started.compiled else ""
    emulated = ", emulated: stages wait, and nothing is learned" if config.simulation.emulate else ""
    return f"{started.method}: {config.network.model} on {config.dataset.data}, {stages}, {length}{layout}{emulated}"


def cut_line(asked: TrainConfig, started: Started) -> str:
    """Says where the network is cut if nobody has said it, how even that is, and the way to keep it; "" for cuts that were asked for."""
    if len(started.stages) == 1 or asked.network.cuts is not None or asked.simulation.emulate:
        return ""
    seconds = [stage.forward + stage.backward + stage.head for stage in started.stages]
    uneven = max(seconds) * len(seconds) / sum(seconds) if sum(seconds) else 1.0
    cuts = " ".join(map(str, started.cuts))
    how = asked.placement.balance
    fixed = how == "measured" or all(stage.layers == 1 for stage in started.stages)  # there are no other cuts
    other = "" if fixed or uneven < UNEVEN else "; --balance measured cuts by time instead"
    what = "counted work" if how == "counted" else "measured time"
    return f"cut at {cuts}, even by {what} (--cuts {cuts} keeps it): the slowest stage takes {uneven:.2f} times the mean{other}"


def closing(report: RunReport) -> str:
    """Describes the results in one line."""
    values = summary(report)
    metrics = [metric_text(name, value) for name, value in report.evaluations[-1].metrics.items()]
    loss = f"train loss {values['train_loss']:.4f}{' nats' if is_text(report.config) else ''}"
    speed = per_second(values["samples_per_second"], tokens(report.config))
    return ", ".join([*metrics, loss, f"{values['seconds']:.1f} s of training", speed])


def summary(report: RunReport) -> dict[str, Any]:
    """Returns the content of summary.json: final figures as far as the run has come, then the conditions on which they depend."""
    config, result = report.config, report.result
    last = report.evaluations[-1] if report.evaluations else None
    step = report.steps[-1] if report.steps else None
    method = make_method(config.algorithm)
    metrics = {f"test_{name}": value for name, value in last.metrics.items()} if last else {}
    seconds, samples = (result.seconds, result.samples) if result else (step.seconds, step.samples) if step else (0.0, 0)
    rate = samples / seconds if seconds > 0 else 0.0
    return {
        "status": report.status,
        **({"error": report.error} if report.error else {}),
        **metrics,
        "test_loss": last.test_loss if last else None,
        "train_loss": last.train_loss if last else step.loss if step else None,
        "epochs": step.epoch if step else 0.0,
        "batches": step.batches if step else 0,
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": rate,
        **({"tokens_per_second": rate * window} if (window := tokens(config)) else {}),
        "predicted_samples_per_second": report.started.samples_per_second if report.started else None,
        "method": config.algorithm.method,
        "options": {name: getattr(method, name) for name in options(type(method))},
        "model": config.network.model,
        "data": config.dataset.data,
        "seed": config.training.seed,
        "codec": config.compression.codec,
        "error_codec": config.compression.error_codec,
        "workers": report.started.workers if report.started else config.machine.workers,
        "cuts": config.network.cuts,
        **({"resumed_at": [event.batches for event in report.resumed]} if report.resumed else {}),
        "stages": [stage(one) for one in result.stages] if result else [],
        "versions": {"delock": __version__, "torch": version("torch"), "python": platform.python_version()},
    }


def stage(report: StageReport) -> dict[str, Any]:
    """Returns one stage's part of a summary; staleness is the mean in updates, the histograms count batches."""
    return {
        "stage": report.stage,
        "parameters": report.parameters,
        "updates": report.updates,
        "staleness": report.mean_staleness,
        "layer_staleness": report.mean_layer_staleness,
        "staleness_histogram": _histogram(report.staleness),
        "layer_staleness_histogram": _histogram(report.layer_staleness),
        "idle": report.idle,
        "forward_seconds": report.forward,
        "backward_seconds": report.backward,
        "update_seconds": report.update,
        "waiting_seconds": report.waiting,
        **({"reuse_histogram": _histogram(report.reuse)} if report.reuse else {}),
        **({"visits_behind_histogram": _histogram(report.visits_behind)} if report.reuse else {}),
        **({"versions_behind_histogram": _histogram(report.versions_behind)} if report.reuse else {}),
        "peak_memory": report.peak_memory,
        "memory_growth": report.memory_growth,
        "allocator": report.allocator,
        "sent_up": sent(report.sent_up),
        "sent_down": sent(report.sent_down),
    }


def sent(traffic: Traffic) -> dict[str, Any]:
    """Returns bytes by their purpose, as a part of a summary."""
    ratios = {name: getattr(traffic, name) for name in ("total", "compression", "compression_with_codebooks")}
    return asdict(traffic) | ratios


def compared(reports: Mapping[str, RunReport], plain: str) -> list[dict[str, Any]]:
    """Returns the rows of a comparison: summaries, facts about stages, and speed-ups over plain and over the first bp of those that
    have finished and are not late.
    """
    summaries = {name: summary(report) for name, report in reports.items()}
    exact = [name for name, report in reports.items() if not report.config.algorithm.behind and name != plain]
    finished = (summaries[name] for name in exact if reports[name].status == "finished")
    bp = next((one for one in finished if one["method"] == "bp"), None)
    return [
        {
            "name": name,
            "speedup_over_bp": _ratio(one, bp),
            "speedup_over_plain": _ratio(one, summaries.get(plain)),
            "staleness": [stage["staleness"] for stage in one["stages"]],
            "layer_staleness": [stage["layer_staleness"] for stage in one["stages"]],
            "idle": _average(one["stages"], "idle"),
            "compression": _compression(one),
            "peak_memory": max((stage["peak_memory"] for stage in one["stages"]), default=None),
            "summary": one,
        }
        for name, one in summaries.items()
    ]


def _rate(record: StepRecord | EvaluationRecord) -> float:
    """Returns the mean samples per second so far."""
    return record.samples / record.seconds if record.seconds > 0 else 0.0


def _ratio(one: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """Returns the ratio of the speeds; None unless both runs have finished."""
    if base is None or one["status"] != "finished" or base["status"] != "finished" or not base["samples_per_second"]:
        return None
    return float(one["samples_per_second"] / base["samples_per_second"])


def _compression(one: Mapping[str, Any]) -> float | None:
    """Returns the ratio of raw to sent bytes of activations and errors; None without a codec."""
    if (one["codec"], one["error_codec"]) == ("none", "none"):
        return None
    ways = [stage[way] for stage in one["stages"] for way in ("sent_up", "sent_down")]
    took = sum(way["encoded"] + way["codebooks"] for way in ways)
    return sum(way["raw"] for way in ways) / took if took else None


def _average(stages: Sequence[Mapping[str, Any]], what: str) -> float | None:
    return sum(s[what] for s in stages) / len(stages) if stages else None


def _histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """Returns the counts with JSON's keys, which are text."""
    return {str(value): counts[value] for value in sorted(counts)}
