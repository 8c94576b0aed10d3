"""The runner of benchmarks/quality: what it makes, does not make again, and shows; its tiny set is run as a user would."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from delock.errors import UsageError
from delock.nets import build

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "quality"
MODULES = ("rows", "tasks", "todo", "sets", "store", "tables", "run")
Part = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def part() -> Iterator[Part]:
    """Gives the benchmark's modules by name; their short names are free again afterwards."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)


def start(out: Path) -> subprocess.Popen[str]:
    """The program at work on its tiny set, one run at a time."""
    command = [sys.executable, "-u", str(FOLDER / "run.py"), "run", "toy", "--jobs", "1", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def told(out: Path) -> list[str]:
    """The lines of the program, which ends well."""
    with start(out) as program:
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    return [line for line in said.splitlines() if line.startswith("[")]


@pytest.mark.slow
def test_a_killed_runner_goes_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "toy"
    with start(tmp_path) as program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith("[1/7] bp-k1-adamw-lr1e-05-seed0: ")
        program.send_signal(signal.SIGKILL)
        program.stdout.read()  # to the end: the process of the runs has ended, too
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert all(json.loads(path.read_text())["score"] for path in runs.glob("*.json"))
    (runs / "half.fresh").touch()

    assert len(told(tmp_path)) == 11 - len(before)
    after = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert before.items() <= after.items()
    # bp: the grid of two grew while its best was the highest rate, then the best got its second seed
    rates = ("1e-05", "0.0001", "0.001", "0.01", "0.1", "1")
    bp = [f"bp-k1-adamw-lr{rate}-seed0.json" for rate in rates] + ["bp-k1-adamw-lr0.1-seed1.json"]
    ddg = [f"ddg-k2-scadamw-lr{rate}.json" for rate in ("0.03-seed0", "0.3-seed0", "3-seed0", "0.3-seed1")]
    assert sorted(after) == sorted(bp + ddg)

    assert told(tmp_path) == []
    shown = (tmp_path / "toy.md").read_text()
    assert "| bp |" in shown
    assert "| ddg, K = 2 | scadamw |" in shown
    assert "*" not in shown.split("\n\n", 1)[1], "every best rate lies inside its grid"


def records(part: Part, row: Any, score: Callable[[float], float | None], *rates: float) -> dict[str, Any]:
    """Records of a row at these rates, as if they had been run."""
    name = part("rows").Run
    return {name(row, rate, 0).name: {"score": score(rate), "seconds": 2.0, "cpu_seconds": 1.0} for rate in rates}


def rates_run(part: Part, row: Any, score: Callable[[float], float | None]) -> list[float]:
    """The rates in the order in which they are run, one after the other."""
    todo, found, order = part("todo"), dict[str, Any](), list[float]()
    while run := next(todo.wanted([row], 1, found), None):
        order.append(run.rate)
        found |= records(part, row, score, run.rate)
    return order


def test_a_grid_grows_until_its_best_is_inside(part: Part) -> None:
    row = part("rows").Row("bp", 1, "adamw", (0.002, 0.004, 0.008, 0.016))
    assert rates_run(part, row, lambda rate: abs(rate - 0.004)) == [0.004, 0.008, 0.002, 0.016]
    assert rates_run(part, row, lambda rate: abs(rate - 0.001)) == [0.004, 0.008, 0.002, 0.016, 0.001, 0.0005]
    assert rates_run(part, row, lambda rate: -rate)[4:] == [0.032, 0.064, 0.128, 0.256], "four more at most"
    assert rates_run(part, row, lambda rate: None)[4:] == [0.001, 0.0005, 0.00025, 0.000125], "all diverged: lower"
    assert rates_run(part, row, lambda rate: rate if rate < 0.002 else None)[4:] == [0.001, 0.0005, 0.00025, 0.000125]


def test_what_is_left_is_foretold(part: Part) -> None:
    row = part("rows").Row("bp", 1, "adamw", (0.002, 0.004, 0.008))
    other = part("rows").Row("bp", 1, "muon", (0.01, 0.02))
    found = records(part, row, lambda rate: 1.0, 0.002, 0.004)
    assert part("todo").outlook([row, other], 3, found) == {row: 3, other: 4}
    assert part("todo").seconds_left([row, other], 3, found) == 14.0


def test_tables_mark_an_edge_and_compare_with_backpropagation(part: Part) -> None:
    Row, Set = part("rows").Row, part("todo").Set
    bp, late = Row("bp", 1, "adamw", (0.1, 0.2, 0.4)), Row("ddg", 4, "scadamw", (0.1, 0.2), (("micro_batches", 4),))
    of = Set("A set.", part("sets").SCREEN, (bp, late, Row("bp", 1, "muon", (1.0, 2.0))))
    found = records(part, bp, lambda rate: 3 + abs(rate - 0.2), 0.1, 0.2, 0.4)
    found |= records(part, late, lambda rate: 3.25 if rate == 0.1 else None, 0.1, 0.2)
    lines = part("tables").table(of, found).splitlines()
    assert "| bp | 3.000 |  | - |" in lines
    assert "| ddg, K = 4, 4 parts |  | 3.250* |  |" in lines
    assert "| ddg, K = 4, 4 parts | scadamw | 3.250* | +0.250 | 0.1 | 0.1: 3.250, 0.2: diverged | 1 |" in lines


def test_a_diverged_run_is_a_result(part: Part) -> None:
    sets, rows = part("sets"), part("rows")
    run = rows.Run(rows.Row("bp", 1, "sgd", (1.0, 2.0)), 1e30, 0)
    before = torch.get_num_threads()
    try:
        record = part("tasks").trained(sets.TOY, run)
    finally:
        torch.set_num_threads(before)
    assert record["score"] is None
    assert "diverged" in record
    assert "NaN" not in json.dumps(record)


def test_a_method_that_is_not_there_is_skipped(part: Part) -> None:
    row = part("rows").Row("bp", 1, "adamw", (0.1, 0.2))
    of = part("todo").Set("", part("sets").TOY, (row, part("rows").Row("bp", 1, "adamw", (0.1, 0.2), (("nought", 1),))))
    possible, lines = of.possible()
    assert possible == [row]
    assert [line.split(":")[0] for line in lines] == ["skipped bp-k1-nought1-adamw"]


def test_records_are_alone_and_of_today(part: Part, tmp_path: Path) -> None:
    store, rows = part("store"), part("rows")
    of = part("sets").SETS["toy"]
    run = rows.Run(of.rows[0], of.rows[0].rates[0], 0)
    settings = json.loads(json.dumps(of.task.settings(run)))
    with store.alone(tmp_path):
        store.write(tmp_path / f"{run.name}.json", {"settings": settings, "score": 1.0})
        store.refuse_stale(of, tmp_path)
        with pytest.raises(UsageError, match="another runner is at work"), store.alone(tmp_path):
            pass
    store.write(tmp_path / f"{run.name}.json", {"settings": {**settings, "updates": 6}, "score": 1.0})
    with pytest.raises(UsageError, match="with other settings"):
        store.refuse_stale(of, tmp_path)


def test_every_set_names_each_run_once(part: Part) -> None:
    for name, of in part("sets").SETS.items():
        slugs = [row.slug for row in of.rows]
        assert len(set(slugs)) == len(slugs), name
        assert {row.K for row in of.rows} <= {K for K, _ in of.task.cuts}, name
        assert all(
            abs(b / a - row.rates[1] / row.rates[0]) < 1e-9 for row in of.rows for a, b in zip(row.rates, row.rates[1:], strict=False)
        )


def test_group_norm_takes_the_place_of_batch_norm(part: Part) -> None:
    model = part("tasks").grouped(build("resnet20", classes=10, in_channels=3, image_size=32))
    kinds = [type(module).__name__ for module in model.modules()]
    assert (kinds.count("GroupNorm"), kinds.count("BatchNorm2d")) == (19, 0)
