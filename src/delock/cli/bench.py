"""`delock bench`: runs a benchmark of a checkout's benchmarks folder, or lists them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from delock.errors import UsageError

ABOUT = """usage: delock bench [NAME [OPTIONS]]

Run a benchmark; without a name, list them. They live in the folder benchmarks of a checkout, each with a README that has its
results. OPTIONS are the benchmark's own: delock bench NAME --help shows them.

examples:
  delock bench
  delock bench throughput --rounds 5
  delock bench slowdown/speed --out /tmp"""


def run(words: Sequence[str]) -> int:
    """Lists the benchmarks, or runs one and returns its exit code."""
    if words and words[0] in ("-h", "--help"):
        print(ABOUT)
        return 0
    scripts = found(folder())
    if not words:
        width = max(map(len, scripts))
        print("\n".join(f"  {name:<{width}}  {about(path)}" for name, path in scripts.items()))
        return 0
    name, *rest = words
    if name not in scripts:
        near = get_close_matches(name, scripts, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(scripts)}"
        raise UsageError(f"there is no benchmark {name!r}: {hint}")
    if "--out" not in rest and '"--out"' in scripts[name].read_text(encoding="utf-8"):
        rest = [*rest, "--out", str(scripts[name].parent)]
    return subprocess.run([sys.executable, str(scripts[name]), *rest], check=False).returncode


def folder() -> Path:
    """Returns the benchmarks folder of this folder, or of the checkout of the package."""
    for place in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (place / "benchmarks" / "README.md").is_file():
            return Path(os.path.relpath(place / "benchmarks"))
    raise UsageError("there is no folder benchmarks here: it comes with a checkout of Delock, not with the installed package")


def found(place: Path) -> dict[str, Path]:
    """Returns the scripts by name: NAME for NAME/run.py, NAME/SCRIPT for another."""
    paths = sorted(path for path in place.glob("*/*.py") if "__main__" in path.read_text(encoding="utf-8"))
    return {path.parent.name if path.stem == "run" else f"{path.parent.name}/{path.stem}": path for path in paths}


def about(path: Path) -> str:
    """Returns the first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n", 1)[0]
