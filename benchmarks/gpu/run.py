"""Measures several stages on one GPU as captured ticks, beside backpropagation captured as a CUDA graph, in samples per second.

    python benchmarks/gpu/run.py --rounds 5 --out benchmarks/gpu

Every method takes turns with the baseline, A B A B, on the same random images, which lie on the GPU. A turn is a number of batches after
the pipeline has filled. A ratio is taken within one round; the table has medians. A network that does not fit into memory has a row that
says so. Two more rivals are not captured, a plain PyTorch loop and Delock's engine: both read every loss.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.engine.engine import run_here
from delock.engine.graphs.period import find_period
from delock.engine.graphs.sgd import capturable
from delock.engine.graphs.streams import make_streams
from delock.engine.graphs.ticks import Ticks
from delock.links.mailbox import Mailbox
from delock.methods import BP, DGL, DSP, FDG, FR, Method
from delock.nets import build
from delock.options import Execution, Placement, Report
from delock.plan import Plan, windows
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.run.worker import Worker

SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
METHODS: dict[str, Method] = {"fdg": FDG(), "fdg mixed": FDG(at="mixed"), "dsp": DSP(), "fr": FR(), "dgl": DGL()}
ENDLESS = 1_000_000  # batches: no run comes to its end
PRECISIONS = ("single", "bf16")
Rival: TypeAlias = "Callable[[], Contender | Plain]"


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


@dataclass(frozen=True)
class Work:
    """Names a network, samples in a batch and a precision: single, with TF32 in convolutions as torch has it, or bf16, channels last."""

    model: str
    rows: int
    precision: str = "single"

    @property
    def bf16(self) -> bool:
        """Returns whether it computes by autocast in bfloat16, with images channels last."""
        return self.precision == "bf16"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.rows}" + (", bfloat16, channels last" if self.bf16 else "")

    def network(self) -> nn.Module:
        """Returns the network, with the same weights every time."""
        return build(self.model, classes=10, in_channels=3, image_size=32)

    def data(self, device: torch.device) -> Fixed:
        """Returns four batches of random images."""
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(self.rows, 3, 32, 32, generator=generator).to(device) for _ in range(4)]
        labels = [torch.randint(10, (self.rows,), generator=generator).to(device) for _ in range(4)]
        return Fixed(list(zip(images, labels, strict=True)))


class Plain:
    """Trains by a loop in plain PyTorch."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device, self.steps = work, device, itertools.count()
        layout = torch.channels_last if work.bf16 else torch.contiguous_format
        self.model = work.network().to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.batches = [(x.contiguous(memory_format=layout), y) for x, y in work.data(device).batches]
        self.optimizer = SGD(self.model.parameters())
        self.turn(3)

    def turn(self, batches: int) -> float:
        """Returns the samples per second over this number of batches."""
        wait(self.device)
        begun = time.perf_counter()
        for _ in range(batches):
            x, y = self.batches[next(self.steps) % len(self.batches)]
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.work.bf16):
                loss = cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            loss.item()
        wait(self.device)
        return batches * self.work.rows / (time.perf_counter() - begun)


class Contender:
    """Holds a network in K stages under a method, at some point of an endless run."""

    def __init__(self, work: Work, method: Method, K: int, device: torch.device, captured: bool = True) -> None:
        request = Request(
            model=work.network(),
            train=work.data(device),
            test=None,
            loss=cross_entropy,
            method=method,
            optimizer=capturable(SGD) if captured else SGD,
            stages=K,
            batches=ENDLESS,
            device=str(device),
            workers="inline",
            execution=replace(Execution(amp="bf16", layout="channels-last") if work.bf16 else Execution(), captured=captured),
            placement=Placement(threads=torch.get_num_threads()),
            report=Report(log_every=ENDLESS),
        )
        jobs = prepare(request).jobs()
        box = Mailbox()
        workers = [Worker(job, box.end(job.k), device, lambda event: None) for job in jobs]
        self.engines, self.rows, self.device = [worker.engine for worker in workers], work.rows, device
        self.length = replace(jobs[0].length, every=0)
        self.plans: Iterator[Plan] | None = None
        self.size = 0  # ticks of a plan
        self.method, self.K = method, K
        self.execute: Any = functools.partial(run_here, engines=self.engines)
        if captured:
            made = find_period(method, K)
            self.execute = Ticks(self.engines, made, make_streams(device, K), batches=ENDLESS, every=ENDLESS).run

    def turn(self, batches: int) -> float:
        """Returns the samples per second over this number of batches, the same in every turn; the first one fills the pipeline before."""
        if self.plans is None:
            self.plans, self.size = windows(self.method, self.K, self.length, batches), batches
            for _ in range(1 + self.method.span(self.K) // batches):
                self.execute(next(self.plans))
        assert batches == self.size, "all turns are as long as the first"
        plan = next(self.plans)
        wait(self.device)
        begun = time.perf_counter()
        self.execute(plan)
        wait(self.device)
        return batches * self.rows / (time.perf_counter() - begun)


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(base: Contender, other: Contender | Plain, count: int, batches: int) -> dict[str, float]:
    """Runs A and B in turns, and returns the medians of both rates, and of the ratio within a round."""
    pairs = [(base.turn(batches), other.turn(batches)) for _ in range(count)]
    return {
        "base": statistics.median(a for a, _ in pairs),
        "rate": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "least": min(b / a for a, b in pairs),
        "most": max(b / a for a, b in pairs),
    }


def rivals(work: Work, names: Sequence[str], stages: Sequence[int], device: torch.device) -> Iterator[tuple[str, Rival]]:
    """Yields the name of every rival of the baseline, and a function that builds it."""
    yield "plain PyTorch, not captured", functools.partial(Plain, work, device)
    yield "bp, not captured", functools.partial(Contender, work, BP(), 1, device, captured=False)
    for name in names:
        for K in stages:
            yield f"{name}, K = {K}", functools.partial(Contender, work, METHODS[name], K, device)


def table(results: dict[str, Any]) -> str:
    """Returns a GitHub table per network, batch size and precision."""
    lines = []
    for title, work in results.items():
        rows = work["rivals"]
        bases = [one["base"] for one in rows.values() if isinstance(one, dict)]
        lines += [f"**{title}**; backpropagation captured: {statistics.median(bases):.0f} samples/s" if bases else title, ""]
        lines += ["| | samples/s | x captured backpropagation | range | GB |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {name} | {row(one)} |" for name, one in rows.items()]
        lines += ["", work["where"], ""]
    return "\n".join(lines)


def row(one: dict[str, float] | str) -> str:
    """Returns the cells of a rival, or the reason that there are none."""
    if isinstance(one, str):
        return f"{one} | | | "
    held = f"{one['bytes'] / 1e9:.2f}" if "bytes" in one else ""
    return f"{one['rate']:.0f} | {one['ratio']:.2f} | {one['least']:.2f} .. {one['most']:.2f} | {held}"


def measured(base: Contender, rival: Rival, options: argparse.Namespace) -> dict[str, float] | str:
    """Measures a rival; "bytes" is the most memory that torch reserved for it and its graphs, above what was reserved before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_reserved(base.device)
    try:
        found = rounds(base, rival(), options.rounds, options.batches)
        return found | {"bytes": torch.cuda.max_memory_reserved(base.device) - before}
    except torch.OutOfMemoryError:
        return "out of memory"


def main() -> None:
    """Compares everything that was asked for. Results that the folder holds already stay there until they are measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100, help="in a turn")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "resnet110"])
    parser.add_argument("--rows", nargs="+", type=int, default=[32, 128, 512], help="batch sizes")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fdg", "dsp", "dgl"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["single", "bf16"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark captures CUDA graphs, and torch sees no GPU here")
    device = torch.device("cuda", 0)
    where = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, {time.strftime('%Y-%m-%d')}"
    file = options.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for work in itertools.starmap(Work, itertools.product(options.models, options.rows, options.precisions)):
        found: dict[str, Any] = {}
        results[str(work)] = {"where": where, "rivals": found}
        base = Contender(work, BP(), 1, device)
        base.turn(options.batches)
        for name, rival in rivals(work, options.methods, options.stages, device):
            found[name] = measured(base, rival, options)
            print(f"{work}, {name}: {found[name]}", flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "table.md").write_text(table(results))


if __name__ == "__main__":
    main()
