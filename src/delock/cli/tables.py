"""Makes tables of plain text cells: the prediction for every stage, its measurements, and runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delock.records import StagePrediction, StageReport, Started, Traffic, mean

Cells = list[str]  # a head may be of two lines
SHOWN = 5  # stages in a row of a comparison
BUFFERS = ("read behind\n(visits)", "read behind\n(updates)", "batches read\n0/1/2/more")
SENDS = ("sends up", "compression", "with\ncodebooks")
STALENESS, LAYERWISE, IDLE = "staleness\n(updates)", "layer-wise\n(parts)", "idle"  # without parts a batch is one


def prediction_table(started: Started) -> tuple[Cells, list[Cells]]:
    """Returns head and rows of the facts about every stage before the run; an auxiliary head's cost is a share of its stage's."""
    headed = [s for s in started.stages if s.head_flops is not None]
    head = ["stage", "layers", "parameters", "forward", "backward", STALENESS, LAYERWISE, IDLE]
    head += ["memory\n(grows by)"]
    head += ["head\n(flops)", "head\n(parameters)"] if headed else []
    sends = SENDS if any(books for _, books in started.encoded) else SENDS[:2] if started.encoded else ()
    head += sends
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
            memory(s.memory),
            *([_cell(s.head_flops, percent1), _cell(s.head_parameters, percent1)] if headed else []),
            *_sends(started, s.stage)[: len(sends)],
        ]
        for s in started.stages
    ]


def _sends(started: Started, k: int) -> Cells:
    """Returns the size of stage k's messages up, and the ratio to their size without the codec."""
    if k >= len(started.encoded):
        return ["-"] * len(SENDS)
    raw, (payload, books) = started.messages[k], started.encoded[k]
    return [megabytes(payload + books), f"{raw / payload:.1f}", f"{raw / (payload + books):.1f}"]


def stage_table(reports: Sequence[StageReport], predicted: Sequence[StagePrediction]) -> tuple[Cells, list[Cells]]:
    """Returns head and rows of the measurements of every stage, with the growth of its memory beside the prediction."""
    served = "/".join(sorted({r.allocator for r in reports} - {""}))
    grown = f"grown by\n({served})" if served else "grown by"
    head = ["stage", "updates", IDLE, STALENESS, LAYERWISE, "peak\nmemory", grown, "predicted"]
    rows = [
        [
            str(r.stage),
            str(r.updates),
            percent(r.idle),
            f"{r.mean_staleness:.2f}",
            f"{r.mean_layer_staleness:g}",
            *map(memory, (r.peak_memory, r.memory_growth, before.memory)),
        ]
        for r, before in zip(reports, predicted, strict=True)
    ]
    if any(r.reuse for r in reports):
        head += BUFFERS
        rows = [[*row, *_buffer(r)] for row, r in zip(rows, reports, strict=True)]
    for way, sent in (("up", [r.sent_up for r in reports]), ("down", [r.sent_down for r in reports])):
        if any(one.raw != one.encoded for one in sent):
            columns = 3 if any(one.codebooks for one in sent) else 2
            head += [f"sent\n{way}", *SENDS[1:]][:columns]
            rows = [[*row, *_sent(one)[:columns]] for row, one in zip(rows, sent, strict=True)]
    return head, rows


def _sent(one: Traffic) -> Cells:
    """Returns the bytes that were sent, and the ratio to the activations, or errors, without the codec."""
    ratios = [_cell(ratio, "{:.1f}".format) for ratio in (one.compression, one.compression_with_codebooks)]
    return [megabytes(one.total) if one.messages else "-", *ratios]


def _buffer(report: StageReport) -> Cells:
    """Returns how far reads were behind the newest batch, on average, and how many batches were read 0, 1, 2 times and more often."""
    if not report.reuse:
        return ["-"] * len(BUFFERS)
    often = [report.reuse.get(n, 0) for n in range(3)]
    times = [*often, sum(report.reuse.values()) - sum(often)]
    return [f"{mean(report.visits_behind):.2f}", f"{mean(report.versions_behind):.2f}", "/".join(map(str, times))]


def comparison_table(rows: Sequence[Mapping[str, Any]], K: int, metric: str) -> tuple[Cells, list[Cells]]:
    """Returns head and rows of a comparison; a dash stands for an unknown value. Staleness is a mean per stage, idle one over the stages.

    metric: the test metric to show. The speed is in tokens if the summaries have it, else in samples.
    """
    unit = next((unit for row in rows for unit in ("tokens", "samples") if f"{unit}_per_second" in row["summary"]), "samples")
    speeds = [f"{unit}\n/s", f"over bp,\nK = {K}", "over\nplain"]
    quality = f"test {words(metric)}".rsplit(" ", 1)
    head = ["method", "\n".join(quality), "train\nloss", *speeds, STALENESS, LAYERWISE, IDLE, "peak\nmemory"]
    coded = any(row["compression"] for row in rows)
    head += ["compression"] if coded else []
    body = []
    for row in rows:
        one = row["summary"]
        finished = one["status"] == "finished"
        cells = [
            row["name"] if finished else f"{row['name']} ({one['status']})",
            _cell(one.get(f"test_{metric}"), percent1 if metric == "accuracy" else "{:.3f}".format),
            _cell(one["train_loss"], "{:.3f}".format),
            _cell(one[f"{unit}_per_second"] or None, "{:.0f}".format),
            _cell(row["speedup_over_bp"], "{:.2f}".format),
            _cell(row["speedup_over_plain"], "{:.2f}".format),
            per_stage([f"{mean:.1f}" for mean in row["staleness"]]),
            per_stage([f"{mean:g}" for mean in row["layer_staleness"]]),
            _cell(row["idle"], percent),
            _cell(row["peak_memory"], memory),
            *([_cell(row["compression"], "{:.1f}".format)] if coded else []),
        ]
        body.append(cells)
    return head, body


def markdown(head: Cells, rows: Sequence[Cells]) -> str:
    """Returns a table as GitHub shows it: the first column to the left, numbers to the right."""
    lines = [[name.replace("\n/", "/").replace("\n", " ") for name in head], ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n" for cells in lines)


def per_stage(cells: Sequence[str]) -> str:
    """Joins the values of all stages, of many stages the first two and the last: 6.0/4.0/2.0/0.0; a dash for none."""
    return "/".join(cells if len(cells) <= SHOWN else [*cells[:2], "..", cells[-1]]) or "-"


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds."""
    return f"{1000 * seconds:.1f} ms"


def percent(share: float) -> str:
    """Returns a share in whole per cent."""
    return f"{100 * share:.0f} %"


def percent1(share: float) -> str:
    """Returns a share in per cent with one decimal."""
    return f"{100 * share:.1f} %"


def words(metric: str) -> str:
    """Returns the name of a metric in a sentence: bits per character."""
    return metric.replace("_", " ")


def metric_text(name: str, value: float) -> str:
    """Returns a test metric with its name: an accuracy in per cent with two decimals, another one as a number."""
    return f"test {words(name)} " + (f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.3f}")


def per_second(samples_per_second: float, tokens: int | None) -> str:
    """Returns a speed, in tokens if a sample has this number of tokens, else in samples."""
    return f"{samples_per_second * tokens:,.0f} tokens/s" if tokens else f"{samples_per_second:,.0f} samples/s"


def memory(count: int | None) -> str:
    """Returns bytes as MB; a dash if unknown."""
    return f"{count / 1e6:.0f} MB" if count else "-"


def megabytes(count: float) -> str:
    """Returns bytes as MB, with two decimals."""
    return f"{count / 1e6:.2f} MB"


def _cell(value: Any, text: Any) -> str:
    return "-" if value is None else str(text(value))
