"""Measures several stages on one GPU as captured ticks, beside backpropagation captured as a CUDA graph, in samples per second.

    python benchmarks/gpu/run.py --rounds 5 --out benchmarks/gpu

Every method takes turns with the baseline, A B A B, on the same random images, which lie on the GPU. A turn is a number of batches after
the pipeline has filled. A ratio is taken within one round; the table has medians. A network that does not fit into memory has a row that
says so.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from delock.engine.engine import run_here
from delock.engine.graphs.period import find_period
from delock.engine.graphs.sgd import capturable
from delock.engine.graphs.streams import make_streams
from delock.engine.graphs.ticks import Ticks
from delock.links.mailbox import Mailbox
from delock.methods import BP, DGL, DSP, FDG, FR, Method
from delock.nets import build
from delock.plan import Plan, windows
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.run.worker import Worker

SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
METHODS: dict[str, Method] = {"fdg": FDG(), "fdg mixed": FDG(at="mixed"), "dsp": DSP(), "fr": FR(), "dgl": DGL()}
ENDLESS = 1_000_000  # batches: no run comes to its end


@dataclass
class Fixed:
    """Loads the same batches again and again."""

    batches: Sequence[tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.batches)

    def sizes(self) -> list[int]:
        """Returns the number of samples of each batch."""
        return [len(x) for x, _ in self.batches]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all batches."""
        yield from self.batches


class Contender:
    """Holds a network in K stages under a method, at some point of an endless run."""

    def __init__(self, model: str, rows: int, method: Method, K: int, device: torch.device, captured: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(rows, 3, 32, 32, generator=generator).to(device) for _ in range(4)]
        labels = [torch.randint(10, (rows,), generator=generator).to(device) for _ in range(4)]
        found = dict.fromkeys(field.name for field in fields(Request)) | {
            "model": build(model, classes=10, in_channels=3, image_size=32),
            "train": Fixed(list(zip(images, labels, strict=True))),
            "loss": cross_entropy,
            "method": method,
            "optimizer": capturable(SGD) if captured else SGD,
            "stages": K,
            "steps": ENDLESS,
            "metrics": {},
            "seed": 0,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "layout": "default",
            "chunks": 1,
            "link": "gloo",
            "log_every": ENDLESS,
            "workers": "inline",
        }
        request = Request(**found)  # type: ignore[arg-type]  # what is not said here is off
        jobs = prepare(request, None).jobs(request)
        box = Mailbox()
        workers = [Worker(job, box.end(job.k), device, lambda event: None) for job in jobs]
        self.engines, self.rows, self.device = [worker.engine for worker in workers], rows, device
        self.length = replace(jobs[0].length, every=0)
        self.plans: Iterator[Plan] | None = None
        self.method, self.K = method, K
        self.execute: Any = functools.partial(run_here, engines=self.engines)
        if captured:
            made = find_period(method, K)
            self.execute = Ticks(self.engines, made, make_streams(device, K), batches=ENDLESS, every=ENDLESS).run

    def turn(self, batches: int) -> float:
        """Returns the samples per second over this number of batches; the first turn fills the pipeline before."""
        if self.plans is None:
            self.plans = windows(self.method, self.K, self.length, batches)
            for _ in range(1 + self.method.span(self.K) // batches):
                self.execute(next(self.plans))
        plan = next(self.plans)
        self._wait()
        begun = time.perf_counter()
        self.execute(plan)
        self._wait()
        return batches * self.rows / (time.perf_counter() - begun)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rounds(base: Contender, other: Contender, count: int, batches: int) -> dict[str, float]:
    """Runs A and B in turns, and returns the medians of both rates, and of the ratio within a round."""
    pairs = [(base.turn(batches), other.turn(batches)) for _ in range(count)]
    return {
        "base": statistics.median(a for a, _ in pairs),
        "rate": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "least": min(b / a for a, b in pairs),
        "most": max(b / a for a, b in pairs),
    }


def rivals(names: Sequence[str], stages: Sequence[int]) -> Iterator[tuple[str, Method, int, bool]]:
    """Returns everything that is compared with the baseline: name, method, K, captured."""
    yield "bp, not captured", BP(), 1, False
    for name in names:
        for K in stages:
            yield f"{name}, K = {K}", METHODS[name], K, True


def table(results: dict[str, dict[str, dict[str, float] | str]], where: str) -> str:
    """Returns a GitHub table per network."""
    lines = []
    for title, found in results.items():
        bases = [one["base"] for one in found.values() if isinstance(one, dict)]
        lines += [f"{title}; backpropagation captured: {statistics.median(bases):.0f} samples/s" if bases else title, ""]
        lines += ["| | samples/s | x captured backpropagation | range |", "|---|---:|---:|---:|"]
        for name, one in found.items():
            row = one if isinstance(one, str) else f"{one['rate']:.0f} | {one['ratio']:.2f} | {one['least']:.2f} .. {one['most']:.2f}"
            lines.append(f"| {name} | {row} |" + (" | |" if isinstance(one, str) else ""))
        lines.append("")
    return "\n".join([*lines, where, ""])


def main() -> None:
    """Compares every network and method, and writes the files again after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100, help="in a turn")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "resnet110"])
    parser.add_argument("--rows", nargs="+", type=int, default=[32, 128, 512], help="batch sizes")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fdg", "dsp", "dgl"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark captures CUDA graphs, and torch sees no GPU here")
    device = torch.device("cuda", 0)
    where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, {time.strftime('%Y-%m-%d')}"
    results: dict[str, dict[str, dict[str, float] | str]] = {}
    for model in options.models:
        for rows in options.rows:
            found = results.setdefault(f"{model}, batch {rows}", {})
            base = Contender(model, rows, BP(), 1, device)
            for name, method, K, captured in rivals(options.methods, options.stages):
                try:
                    found[name] = rounds(base, Contender(model, rows, method, K, device, captured), options.rounds, options.batches)
                except torch.OutOfMemoryError:
                    found[name] = "out of memory"
                torch.cuda.empty_cache()
                print(f"{model}, batch {rows}, {name}: {found[name]}", flush=True)
                (options.out / "results.json").write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")
                (options.out / "table.md").write_text(table(results, where))


if __name__ == "__main__":
    main()
