"""Cases with every pair of options, and runs of them, for tests of resumed runs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import delock
from delock.checkpoints.directory import newest_first
from delock.data.iterable import as_loader
from delock.methods import DGL, Interlocking, Method
from delock.records import Event
from delock.run.inline import run_inline
from delock.run.job import StageJob, StageResult
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.run.survival.resume import Begin, find

from harness import assert_equal, every_method
from odd_data import DATA, OPTIMIZERS, SCHEDULES, R, listed
from odd_layers import CUTS, ODD, Case, heads, network

K = 3
BATCHES = 9
DERIVED = ("SpectralOld", "Spectral", "WeightNorm")

# ---- cases -------------------------------------------------------------------------------------------------------------------------

METHODS = {str(method): method for method in every_method(K)}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "family": tuple(dict.fromkeys(method.name for method in METHODS.values())),
    "parts": (1, 2, 3),
    "ahead": (None, "part", "mean"),
    "optimizer": tuple(OPTIMIZERS),
    "feedback": (False, True),
    "schedule": tuple(SCHEDULES),
    "odd": tuple(ODD),
    "norm": (False, True),
    "dropout": (False, True),
    "recompute": (False, True),
    "amp": ("no", "bf16"),
    "compile": (False, True),
    "layout": ("default", "channels-last"),
    "chunks": (1, 2),
    "dtype": (torch.float32, torch.float64),
    "codec": ("none", "bf16", "int8", "vq:codes=4:dim=2:every=2"),
    "error_codec": ("none", "bf16", "int8"),
    "clip": (None, 0.5),
    "data": tuple(DATA),
    "eval_every": (None, 1, 3),
    "window": (1, 2, 256),
}


COMPILED = {"family", "parts", "odd", "norm", "dropout", "amp", "layout", "chunks", "dtype"}  # what a compiler sees, which takes long


def possible(case: Case) -> bool:
    """Options, or some of them, go together."""
    has = case.get
    if "family" in case and not fitting(case):
        return False
    derived = has("odd") in DERIVED
    compiled = has("compile") and (
        has("odd") in ("Replaced", "Growing", "Extra", "Late", "Numbers", "SpectralOld", "Spectral", "Complex", "WeightNorm")
        or has("recompute")
    )
    single = has("norm") and (
        has("chunks") == 2 or (has("parts") == 3 and has("data") in ("four left", "weighed")) or has("data") == "one left"
    )
    double = has("dtype") == torch.float64 and has("amp") == "bf16"
    numbers = has("odd") == "Complex" and (has("optimizer") not in (None, "sgd", "amsgrad", "rmsprop") or has("amp") == "bf16")
    twice = derived and has("chunks") == 2
    return not (compiled or single or double or numbers or twice)


def fitting(case: Case) -> list[Method]:
    """The methods that the options, or some of them, leave."""

    def fits(method: Method) -> bool:
        derived = case.get("odd") in DERIVED or case.get("recompute") or case.get("amp") == "bf16" or case.get("compile")
        errors = not isinstance(method, DGL) and not (isinstance(method, Interlocking) and method.n_wise == 1)
        parts, ahead = method.micro_batches, getattr(method, "ahead", None)
        wanted = case.get("parts", parts) == parts and ("ahead" not in case or case["ahead"] == ahead)
        return (
            wanted
            and method.name == case["family"]
            and not (method.mixed and derived)
            and (errors or case.get("error_codec", "none") == "none")
        )

    return [method for method in METHODS.values() if fits(method)]


@cache
def covering(seed: int = 0) -> tuple[Case, ...]:
    """Cases in which every possible pair of options is at least once, and every method, drawn greedily."""
    draw = random.Random(seed)
    wanted = {pair for a, b in itertools.combinations(OPTIONS, 2) for pair in _pairs(a, b) if _reachable(dict(pair))}
    methods, cases = set(METHODS), list[Case]()
    while wanted:
        first = dict(min(wanted, key=lambda pair: (str(pair[0]), str(pair[1]))))
        case = max((_filled(first, wanted, draw) for _ in range(3)), key=lambda one: len(wanted & _all_pairs(one)))
        wanted -= _all_pairs(case)
        cases.append({**case, **_chosen(case, methods, draw)})
        methods.discard(cases[-1]["method"])
    for name in sorted(methods):
        method = METHODS[name]
        given = {"family": method.name, "parts": method.micro_batches, "ahead": getattr(method, "ahead", None), "compile": False}
        given |= {"recompute": False, "amp": "no", "odd": "none"} if method.mixed else {}
        cases.append({**_filled(given, wanted, draw), "method": name, "at": draw.random()})
    return tuple(cases)


def few(count: int, seed: int = 0) -> list[Case]:
    """Returns that number of cases that run in a moment: of all families, kinds of state, optimizers and schedules, as far as they go."""
    draw, cases, methods, used = random.Random(seed), list[Case](), set(METHODS), Counter[Any]()
    kinds = [name for name in DATA if "workers" not in name]
    for _ in range(count):
        case: dict[str, Any] = {"compile": False}
        for name, values in (
            ("optimizer", OPTIMIZERS),
            ("odd", ODD),
            ("schedule", SCHEDULES),
            ("data", kinds),
            ("family", OPTIONS["family"]),
        ):
            case[name] = min((value for value in values if _reachable({**case, name: value})), key=lambda value: used[value])
            used[case[name]] += 1
        case = _filled(case, set(), draw)
        cases.append({**case, **_chosen(case, methods, draw)})
        methods.discard(cases[-1]["method"])
    return cases


def plain(method: str, **more: Any) -> Case:
    """Returns the case with nothing odd in it but what is given."""
    names = [name for name in METHODS if name.startswith(method)]
    first = {name: values[0] for name, values in OPTIONS.items()}
    return {**first, "method": names[0], "at": 0.5, **more}


def _pairs(a: str, b: str) -> Iterator[Any]:
    for x, y in itertools.product(OPTIONS[a], OPTIONS[b]):
        if "compile" not in (a, b) or {a, b} & COMPILED or not {"compile": True}.items() <= {a: x, b: y}.items():
            yield ((a, x), (b, y))


@cache
def _families() -> list[tuple[str, int, Any]]:
    return [(method.name, method.micro_batches, getattr(method, "ahead", None)) for method in METHODS.values()]


def _reachable(case: dict[str, Any]) -> bool:
    """Some method has these options."""
    return any(
        possible({**case, "family": name, "parts": parts, "ahead": ahead})
        for name, parts, ahead in _families()
        if all(case.get(key, value) == value for key, value in (("family", name), ("parts", parts), ("ahead", ahead)))
    )


def _all_pairs(case: Case) -> set[Any]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(OPTIONS, 2)}


def _filled(given: dict[str, Any], wanted: set[Any], draw: random.Random) -> dict[str, Any]:
    """The case with a value for every option, each time the one with the most new pairs; what is slow only where it must be."""
    case = {"compile": False, **given} if any(not dict(pair).get("compile") for pair in wanted) or not wanted else dict(given)
    if not _reachable(case):
        case = dict(given)
    for name in draw.sample([name for name in OPTIONS if name not in case], k=len(OPTIONS) - len(case)):
        found = [value for value in OPTIONS[name] if _reachable({**case, name: value})]
        draw.shuffle(found)
        case[name] = max(found, key=lambda value: _news(case, name, value, wanted))
    return {name: case[name] for name in OPTIONS}


def _news(case: Case, name: str, value: Any, wanted: set[Any]) -> int:
    order = list(OPTIONS)
    pairs = (tuple(sorted(((name, value), (other, case[other])), key=lambda one: order.index(one[0]))) for other in case)
    return sum(pair in wanted for pair in pairs)


def _chosen(case: Case, left: set[str], draw: random.Random) -> dict[str, Any]:
    """A method for the case, one that has not been there if there is one, and where in the run it is interrupted."""
    names = [str(method) for method in fitting(case)]
    return {"method": draw.choice([name for name in names if name in left] or names), "at": draw.random()}


# ---- runs --------------------------------------------------------------------------------------------------------------------------


def made(case: Case, keeps: delock.Checkpoint | None = None, begin: Begin | None = None) -> list[StageJob]:
    """Jobs of a run as `fit` makes them, with the window of the case."""
    dtype, seed = case["dtype"], 3
    optimizer = OPTIMIZERS[case["optimizer"]]
    request = Request(
        model=network(case),
        train=as_loader(DATA[case["data"]](dtype), seed),
        test=as_loader(listed(10, dtype, 1), seed) if case["eval_every"] else None,
        loss=nn.functional.cross_entropy,
        method=METHODS[case["method"]],
        optimizer=R.error_feedback(optimizer) if case["feedback"] else optimizer,
        schedule=SCHEDULES[case["schedule"]],
        cuts=CUTS,
        batches=BATCHES,
        eval_every=case["eval_every"],
        clip=case["clip"],
        heads=heads(case, METHODS[case["method"]]),
        metrics={"accuracy": R.accuracy} if case["eval_every"] else {},
        seed=seed,
        workers="inline",
        execution=delock.Execution(case["amp"], case["layout"], case["chunks"], case["compile"]),
        compression=delock.Compression(case["codec"], case["error_codec"]),
        report=delock.Report(log_every=1),
        checkpoint=keeps,
    )
    jobs = prepare(request, begin).jobs()
    for job in jobs:
        job.window = case["window"]
    return jobs


def inline(jobs: Sequence[StageJob], events: list[Event] | None = None) -> list[StageResult]:
    """A run in this process."""
    return run_inline(jobs, torch.device("cpu"), (lambda event: None) if events is None else events.append)


def same(a: list[StageResult], b: list[StageResult]) -> None:
    """Two runs are the same to the last bit, in all that they report but times."""
    assert_equal(a, b)
    for one, other in zip(a, b, strict=True):
        assert one.samples == other.samples
        found = [[(e.train_loss, e.metrics, e.samples) for e in run.evaluations] for run in (one, other)]
        assert found[0] == found[1]
        assert (one.report.updates, one.report.sent_up, one.report.sent_down) == (
            other.report.updates,
            other.report.sent_up,
            other.report.sent_down,
        )


def resumed(case: Case, folder: Path, at: float) -> list[StageJob]:
    """Returns jobs that go on from one of the checkpoints in a folder; at: which, 0 is the first and 1 behind the last."""
    there = sorted(newest_first(folder))
    path = there[int(at * len(there))]
    for later in there[there.index(path) + 1 :]:
        later.rename(later.with_name(f"aside-{later.name}"))
    options = delock.Checkpoint(folder, resume=path.name)
    return made(case, options, find(options)[0])


def keep_all(folder: Path) -> delock.Checkpoint:
    """A checkpoint whenever one can be made."""
    return delock.Checkpoint(folder, every=1, keep=1000)
