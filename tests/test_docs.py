"""The documentation tells the truth: its charts and numbers are what the code says, its code runs, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

import delock
from delock.cli import main
from delock.methods import ADL, METHODS, options
from delock.plan import unroll
from delock.records import Result
from delock.timeline import in_flight, longest_step

pytestmark = pytest.mark.usefixtures("own_random")

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def plan(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """The values that `delock plan WORDS --json` prints."""
    assert main(["plan", *words.split(), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def section(page: str, heading: str) -> str:
    """The text below a heading of the second level."""
    [text] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return str(text)


def table(text: str, first: str) -> list[list[str]]:
    """Rows of the table whose head begins with `first`."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            break
    next(lines)
    return [cells(line) for line in _until_blank(lines)]


def _until_blank(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line:
            return
        yield line


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


CHARTS = re.findall(r"```text\n\$ delock plan (.*)\n([^`]*)```", METHODS_PAGE)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("words", "drawn"), CHARTS, ids=[words for words, _ in CHARTS])
def test_charts(words: str, drawn: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn.splitlines() == plan(words, capsys)["chart"]


@pytest.mark.usefixtures("own_random")
def test_stalenesses_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(METHODS_PAGE, "`delock plan --method`")
    assert {row[0].split()[0] for row in rows} == set(METHODS)
    for words, *told in rows:
        stages = plan(f"--stages 3 --method {words}", capsys)["stages"]
        assert isinstance(stages, list)
        names = ("staleness", "layer_staleness", "graphs", "inputs", "versions")
        assert told == [", ".join(f"{stage[name]:g}" for stage in stages) for name in names], words


@pytest.mark.slow
@pytest.mark.usefixtures("own_random")
def test_times_and_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(METHODS_PAGE, "`delock plan --stages 4 --method`")
    assert {row[0].split()[0] for row in rows} == set(METHODS)
    for words, *told in rows:
        near, far = (plan(f"--stages 4 --method {words} --link-delay {delay}", capsys) for delay in (0, 1))
        speedup = near["speedup_over_bp"]
        assert isinstance(speedup, dict)
        found = (near["time_per_batch"], far["time_per_batch"], speedup["dataflow"], speedup["lockstep"])
        assert told == [f"{value:.2f}" for value in found], words


@pytest.mark.usefixtures("own_random")
def test_parts_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for name, *told in table(METHODS_PAGE, "`delock plan --stages 4 --micro-batches 4 --method`"):
        stages = plan(f"--stages 4 --micro-batches 4 --method {name}", capsys)["stages"]
        assert isinstance(stages, list)
        late = [" ".join(map(str, stage["staleness_per_part"])) for stage in stages]
        assert told == [*late, ", ".join(str(stage["versions"]) for stage in stages)], name


def test_longest_steps() -> None:
    for words, *told in table(METHODS_PAGE, "updates late"):
        share, by = re.fullmatch(r"(\d of 4 parts|all) by (\d)", words).groups()  # type: ignore[union-attr]
        late, lag = (1.0 if share == "all" else int(share[0]) / 4), int(by)
        shares = {0: 1 - late, lag: late}
        assert told == [f"{longest_step(shares, 0.9, horizon):.2f}" for horizon in (0.0, 2 * late * lag)], words


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_row_and_section(name: str) -> None:
    assert f"[`{name}`](#{name})" in [row[0] if row[0].endswith(")") else "" for row in _overview()]
    text = section(METHODS_PAGE, name)
    for fact in ("$ delock plan --method " + name, "**Options:**", "**Memory", "**Deviations:**", "**Source:**"):
        assert fact in text
    for option in options(METHODS[name]):
        assert f"`{option}`" in text


def _overview() -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in METHODS_PAGE.splitlines() if line.startswith("| [`")]


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("M", range(1, 5))
@pytest.mark.parametrize("order", ["forward-first", "backward-first"])
def test_the_formula_for_what_adl_holds(K: int, M: int, order: str) -> None:
    held = in_flight(unroll(ADL(M, order=order), K, 40))  # type: ignore[arg-type]
    for k in range(K):
        late = 2 * (K - 1 - k) - (order == "backward-first" and k < K - 1)
        assert (held[k].graphs, held[k].versions) == (late + 1, ceil(late / M) + 1)


def blocks(page: str = "docs/api.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """The results of `delock.fit`, which runs a few batches only, in one process, in an empty folder."""
    fit, found = delock.fit, list[Result]()

    def short(*args: Any, **options: Any) -> Result:
        batches = min(options.pop("batches", 4), 4)
        options.pop("epochs", None)
        found.append(fit(*args, **options, batches=batches, workers="inline"))
        return found[-1]

    monkeypatch.setattr(delock, "fit", short, raising=False)
    monkeypatch.chdir(tmp_path)
    return found


def test_the_first_program(tmp_path: Path) -> None:
    """As a reader would run it: two processes, it learns, and the weights are on disk."""
    program = tmp_path / "train.py"
    program.write_text(blocks()[0])
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"accuracy (\d\.\d+)", done.stdout)
    assert accuracy
    assert float(accuracy[1]) > 0.85
    assert torch.load(tmp_path / "model.pt").keys() == {f"{i}.{name}" for i in range(0, 9, 2) for name in ("weight", "bias")}


def test_the_other_pieces_of_code(runs: list[Result]) -> None:
    """One after the other behind the first program."""
    names = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks():
            exec(compile(block, "api.md", "exec", dont_inherit=True), names)
    assert len(runs) == sum("delock.fit(" in block for block in blocks())


def test_the_program_of_the_readme(runs: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    [program] = blocks("README.md")
    with torch.random.fork_rng(devices=[]):
        exec(compile(program, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    assert len(runs) == 1
    assert "accuracy" in capsys.readouterr().out


def test_refusals_are_quoted() -> None:
    """Every quoted beginning of an error in restrictions.md is in the code."""
    written = []
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        written += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "restrictions.md").read_text(encoding="utf-8")
    quotes = [quote for row in table(page, "what | the error begins or says") for quote in row[1].replace("`", "").split(", ")]
    assert len(quotes) > 25
    assert [quote for quote in quotes if not any(quote in text for text in written)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
