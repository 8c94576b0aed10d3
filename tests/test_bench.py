"""`delock bench`: finds what is there, runs it, and says what is not."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from delock.cli import main

SCRIPT = '''"""Says what it was told."""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("word")
    parser.add_argument("--out")
    asked = parser.parse_args()
    with open(asked.out + "/told", "w") as file:
        file.write(asked.word)
    raise SystemExit(3)
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one benchmark."""
    (tmp_path / "benchmarks" / "echo").mkdir(parents=True)
    (tmp_path / "benchmarks" / "README.md").touch()
    (tmp_path / "benchmarks" / "echo" / "run.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "benchmarks" / "echo"


def test_list_run_and_miss(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "echo  Says what it was told." in capsys.readouterr().out
    assert main(["bench", "echo", "hello"]) == 3  # its own exit code
    assert (checkout / "told").read_text() == "hello"
    assert main(["bench", "ecko"]) == 2
    assert "did you mean 'echo'" in capsys.readouterr().err


def test_the_benchmarks_of_this_checkout_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"throughput", "depth", "stragglers", "slowdown", "slowdown/speed", "overhead", "interlocking/periods"} <= set(listed)


def _has(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or find_spec(f"{module.__name__}.{name}") is not None


def missing(program: str) -> Iterator[str]:
    """Yields the names that a program imports from delock and that are not there."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "delock":
            module = importlib.import_module(node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not _has(module, alias.name))


def test_what_benchmarks_and_examples_import_is_there() -> None:
    root = Path(__file__).parent.parent
    found = [name for folder in ("benchmarks", "examples") for path in (root / folder).rglob("*.py") for name in missing(path.read_text())]
    assert found == []
    assert list(missing("from delock.plan import unroll, never")) == ["delock.plan.never"]
