"""Runs the parts that need a GPU, each in a process and a time of its own, and prints a table of them last. Started by run.sh."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = Path(__file__).resolve().parent / "wheels"
WHOLE = 450.0  # seconds that all parts may take together
SHOWN = 40  # last lines of a part that failed
COUNT = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
NEEDED = ("numpy", "torch", "pytest", "pytest_timeout")
TESTS = ("-m", "pytest", "-q", "--tb=short", "-p", "pytest_timeout", "-p", "no:cacheprovider", "--timeout=60", "-o", "addopts=")
SHORT = ["--models", "resnet20", "--rows", "32", "128", "--rounds", "3", "--batches", "50"]


@dataclass(frozen=True)
class Part:
    """Holds what to run: words for python3, how many GPUs it needs, and the most seconds that it may take."""

    name: str
    words: Sequence[str]
    gpus: int = 1
    seconds: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """Says in a word and in detail how a part ended."""

    part: Part
    word: str  # passed, failed, skipped
    detail: str
    seconds: float = 0.0


def parts(folder: Path) -> list[Part]:
    """Returns all parts; the benchmark writes into the folder."""
    here = "tests/gpu/test_"
    return [
        Part("training in one process", [*TESTS, f"{here}training_on_gpu.py"]),
        Part("captured ticks", [*TESTS, f"{here}graphs_on_gpu.py"]),
        Part("processes and the command line", [*TESTS, f"{here}processes_on_gpu.py", "-k", "not nccl"]),
        Part("NCCL between GPUs", [*TESTS, f"{here}processes_on_gpu.py", "-k", "nccl"], gpus=2, seconds=60.0),
        Part("benchmark", ["benchmarks/gpu/run.py", *SHORT, "--out", str(folder)], seconds=150.0),
    ]


def unpacked(wheels: Path, into: Path) -> None:
    """Unpacks the wheels that this Python lacks."""
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            metadata.distribution(wheel.name.split("-")[0])
        except metadata.PackageNotFoundError:
            zipfile.ZipFile(wheel).extractall(into)


def environment(site: Path) -> dict[str, str]:
    """Returns the environment of the parts, with the package and what was unpacked; pytest loads only the plugins that are named."""
    path = os.pathsep.join([str(ROOT / "src"), str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **more}


def missing(site: Path) -> list[str]:
    """Returns the packages that neither this Python nor the folder has."""
    return [name for name in NEEDED if PathFinder.find_spec(name, [*sys.path, str(site)]) is None]


def gpus(site: Path) -> tuple[int, str]:
    """Returns the number of GPUs that torch sees, and the name of the first."""
    said = subprocess.run([sys.executable, "-c", COUNT], env=environment(site), capture_output=True, text=True, check=True).stdout
    count, _, name = said.strip().partition(" ")
    return int(count), name


def run(part: Part, env: dict[str, str], log: Path, limit: float) -> Outcome:
    """Runs a part, and all that it starts, in a group of processes that ends with it."""
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *part.words], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - began
    if code is None:
        return Outcome(part, "failed", f"not done after {limit:.0f} s", seconds)
    how = f"exit code {code}" if code else "done"
    return Outcome(part, "failed" if code else "passed", summary(log.read_text()) or how, seconds)


def summary(text: str) -> str:
    """Returns pytest's own count, such as "3 failed, 20 passed, 1 skipped"."""
    found = re.findall(r"^(?:=+ )?(\d+ (?:failed|passed|skipped|error|deselected)[^=\n]*?) in [\d.]+s", text, re.MULTILINE)
    return found[-1] if found else ""


def every(todo: Sequence[Part], there: int, env: dict[str, str], folder: Path, whole: float = WHOLE) -> list[Outcome]:
    """Runs one part after the other, while there is time."""
    ends, outcomes = time.monotonic() + whole, []
    for number, part in enumerate(todo):
        left = ends - time.monotonic()
        if there < part.gpus:
            count = "a GPU" if part.gpus == 1 else f"{part.gpus} GPUs"
            outcome = Outcome(part, "skipped", f"needs {count}, and torch sees {there or 'none'}")
        elif left < 1:
            outcome = Outcome(part, "failed", f"no time was left of {whole:.0f} s")
        else:
            log = folder / f"{number}.log"
            outcome = run(part, env, log, min(part.seconds, left))
            if outcome.word == "failed":
                print(f"---- {part.name}", *log.read_text().splitlines()[-SHOWN:], sep="\n", flush=True)
        outcomes.append(outcome)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns a line per part."""
    wide = max(len(outcome.part.name) for outcome in outcomes)
    return "\n".join(f"{one.part.name:<{wide}}  {one.word:<7}  {one.seconds:6.1f} s  {one.detail}" for one in outcomes)


def main() -> int:
    """Returns the exit code: 0 unless something failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", nargs="?", type=Path, help="for logs and the benchmark's files")
    asked = options.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        site, folder = Path(temporary) / "site", asked or Path(temporary) / "out"
        folder.mkdir(parents=True, exist_ok=True)
        unpacked(WHEELS, site)
        if lacking := missing(site):
            print(f"python3 lacks {', '.join(lacking)}: run tests/gpu/fetch.sh where there is a network, and bring tests/gpu/wheels along")
            return 1
        there, name = gpus(site)
        outcomes = every(parts(folder.resolve()), there, environment(site), folder)
        ratios = folder / "table.md"
        print(ratios.read_text() if ratios.exists() else "", f"{name or 'no GPU'}, Python {sys.version.split()[0]}", sep="\n")
        print(table(outcomes))
    return int(any(outcome.word == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
