"""A run, and several side by side, as plain values and tables: summary.json, compare.json, compare.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

from delock.config import TrainConfig, make_method
from delock.methods import options
from delock.records import EvaluationRecord, Event, Result, StageReport, Started, StepRecord

Status = Literal["running", "finished", "interrupted", "failed"]
Cells = list[str]  # a head may be of two lines
SHOWN = 5  # stages in a row of a comparison
STALENESS, LAYERWISE, IDLE = "staleness\n(updates)", "layer-wise\n(batches)", "idle"


@dataclass
class Story:
    """What a run has told so far: enough for a summary, however it ends."""

    config: TrainConfig
    status: Status = "running"
    started: Started | None = None
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    result: Result | None = None
    error: str | None = None

    @property
    def batches(self) -> int:
        """Batches in the whole run, 0 before it has started."""
        return self.started.batches if self.started else 0

    def hear(self, event: Event) -> None:
        """Take note of one event."""
        match event:
            case Started():
                self.started = event
                self.config = settled(self.config, event.cuts)
            case StepRecord():
                self.steps.append(event)
            case EvaluationRecord():
                self.evaluations.append(event)


def settled(config: TrainConfig, cuts: tuple[int, ...]) -> TrainConfig:
    """The config with the cuts that are used."""
    return replace(config, network=replace(config.network, cuts=cuts, stages=len(cuts) + 1))


def opening(config: TrainConfig, started: Started) -> str:
    """One line on what will run."""
    K = len(started.stages)
    processes = f"in {K} processes" if K > 1 else "in one process"
    where = {"processes": processes, "inline": "in this process", "torchrun": "on torchrun's ranks"}
    stages = f"{K} stages {where[started.workers]}" if K > 1 else f"uncut {where[started.workers]}"
    epochs = f"{started.epochs:.4g} epoch" + ("s" if started.epochs != 1 else "")
    length = f"{epochs} ({started.batches} batches of {config.dataset.batch_size})"
    return f"{started.method}: {config.network.model} on {config.dataset.data}, {stages}, {length}"


def closing(story: Story) -> str:
    """One line on what has come out."""
    told = summary(story)
    metrics = [f"test {name} {accuracy_or_number(name, value)}" for name, value in story.evaluations[-1].metrics.items()]
    speed = f"{told['seconds']:.1f} s of training, {told['samples_per_second']:,.0f} samples/s"
    return ", ".join([*metrics, f"train loss {told['train_loss']:.4f}", speed])


def summary(story: Story) -> dict[str, Any]:
    """The content of summary.json: final figures as far as the run has come, then what they depend on."""
    config, result = story.config, story.result
    last = story.evaluations[-1] if story.evaluations else None
    step = story.steps[-1] if story.steps else None
    method = make_method(config.algorithm)
    metrics = {f"test_{name}": value for name, value in last.metrics.items()} if last else {}
    seconds, samples = (result.seconds, result.samples) if result else (step.seconds, step.samples) if step else (0.0, 0)
    return {
        "status": story.status,
        **({"error": story.error} if story.error else {}),
        **metrics,
        "test_loss": last.test_loss if last else None,
        "train_loss": last.train_loss if last else step.loss if step else None,
        "epochs": step.epoch if step else 0.0,
        "steps": step.step if step else 0,
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds > 0 else 0.0,
        "predicted_samples_per_second": story.started.samples_per_second if story.started else None,
        "method": config.algorithm.method,
        "options": {name: getattr(method, name) for name in options(type(method))},
        "model": config.network.model,
        "data": config.dataset.data,
        "seed": config.training.seed,
        "workers": story.started.workers if story.started else config.machine.workers,
        "cuts": config.network.cuts,
        "stages": [stage(report) for report in result.stages] if result else [],
        "versions": {"delock": version("delock"), "torch": version("torch"), "python": platform.python_version()},
    }


def stage(report: StageReport) -> dict[str, Any]:
    """One stage's part of a summary; staleness is the mean in updates, the histograms count batches."""
    return {
        "stage": report.stage,
        "parameters": report.parameters,
        "updates": report.updates,
        "staleness": report.mean_staleness,
        "layer_staleness": _mean(report.layer_staleness),
        "staleness_histogram": _histogram(report.staleness),
        "layer_staleness_histogram": _histogram(report.layer_staleness),
        "idle": report.idle,
        "forward_seconds": report.forward,
        "backward_seconds": report.backward,
        "update_seconds": report.update,
        "waiting_seconds": report.waiting,
        "peak_memory": report.peak_memory,
        "memory_growth": report.memory_growth,
    }


def prediction_table(started: Started) -> tuple[Cells, list[Cells]]:
    """Head and rows of what is known of every stage before the run."""
    head = ["stage", "layers", "parameters", "forward", "backward", STALENESS, LAYERWISE, IDLE]
    return head, [
        [
            str(s.stage),
            str(s.layers),
            f"{s.parameters:,}",
            milliseconds(s.forward),
            milliseconds(s.backward),
            f"{s.staleness:.2f}",
            str(s.layer_staleness),
            percent(s.idle),
        ]
        for s in started.stages
    ]


def stage_table(reports: Sequence[StageReport]) -> tuple[Cells, list[Cells]]:
    """Head and rows of what every stage did."""
    head = ["stage", "updates", IDLE, STALENESS, LAYERWISE, "peak memory"]
    rows = [
        [str(r.stage), str(r.updates), percent(r.idle), f"{r.mean_staleness:.2f}", f"{_mean(r.layer_staleness):g}", memory(r.peak_memory)]
        for r in reports
    ]
    return head, rows


def compared(stories: Mapping[str, Story], plain: str) -> list[dict[str, Any]]:
    """The rows of a comparison: summaries, what their stages show, and speed-ups over the row `plain` and the first other one of bp."""
    summaries = {name: summary(story) for name, story in stories.items()}
    bp = next((one for name, one in summaries.items() if one["method"] == "bp" and name != plain), None)
    return [
        {
            "name": name,
            "speedup_over_bp": _ratio(one, bp),
            "speedup_over_plain": _ratio(one, summaries.get(plain)),
            "staleness": [stage["staleness"] for stage in one["stages"]],
            "layer_staleness": [stage["layer_staleness"] for stage in one["stages"]],
            "idle": _average(one["stages"], "idle"),
            "peak_memory": max((stage["peak_memory"] for stage in one["stages"]), default=None),
            "summary": one,
        }
        for name, one in summaries.items()
    ]


def comparison_table(rows: Sequence[Mapping[str, Any]], K: int) -> tuple[Cells, list[Cells]]:
    """Head and rows of a comparison; what is not known is a dash. Staleness is a mean per stage, idle one over the stages."""
    speeds = ["samples\n/s", f"over bp,\nK = {K}", "over\nplain"]
    head = ["method", "test\naccuracy", "train\nloss", *speeds, STALENESS, LAYERWISE, IDLE, "peak\nmemory"]
    body = []
    for row in rows:
        one = row["summary"]
        finished = one["status"] == "finished"
        cells = [
            row["name"] if finished else f"{row['name']} ({one['status']})",
            _cell(one.get("test_accuracy"), percent1),
            _cell(one["train_loss"], "{:.3f}".format),
            _cell(one["samples_per_second"] or None, "{:.0f}".format),
            _cell(row["speedup_over_bp"], "{:.2f}".format),
            _cell(row["speedup_over_plain"], "{:.2f}".format),
            per_stage([f"{mean:.1f}" for mean in row["staleness"]]),
            per_stage([f"{mean:g}" for mean in row["layer_staleness"]]),
            _cell(row["idle"], percent),
            _cell(row["peak_memory"], memory),
        ]
        body.append(cells)
    return head, body


def markdown(head: Cells, rows: Sequence[Cells]) -> str:
    """A table as GitHub shows it: the first column to the left, numbers to the right."""
    lines = [[name.replace("\n/", "/").replace("\n", " ") for name in head], ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in lines)


def per_stage(cells: Sequence[str]) -> str:
    """What there is of each stage, of many stages the first two and the last: 6.0/4.0/2.0/0.0; a dash for nothing."""
    return "/".join(cells if len(cells) <= SHOWN else [*cells[:2], "..", cells[-1]]) or "-"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{1000 * seconds:.1f} ms"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f} %"


def percent1(share: float) -> str:
    """A share in per cent with one decimal, for accuracies."""
    return f"{100 * share:.1f} %"


def accuracy_or_number(name: str, value: float) -> str:
    """A metric: an accuracy in per cent with two decimals, another one as a number."""
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4g}"


def memory(count: int) -> str:
    """Bytes as MB; a dash where the system did not tell."""
    return f"{count / 1e6:.0f} MB" if count else "-"


def _cell(value: Any, text: Any) -> str:
    return "-" if value is None else str(text(value))


def _ratio(one: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """How many times as fast; None unless both have finished."""
    if base is None or one["status"] != "finished" or base["status"] != "finished" or not base["samples_per_second"]:
        return None
    return float(one["samples_per_second"] / base["samples_per_second"])


def _average(stages: Sequence[Mapping[str, Any]], what: str) -> float | None:
    return sum(s[what] for s in stages) / len(stages) if stages else None


def _mean(histogram: Mapping[int, int]) -> float:
    count = sum(histogram.values())
    return sum(value * n for value, n in histogram.items()) / count if count else 0.0


def _histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """With JSON's keys, which are text."""
    return {str(value): counts[value] for value in sorted(counts)}
