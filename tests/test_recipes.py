"""The programs on the pages about models run, as a reader would copy them, and so do the commands below them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import delock
from delock.cli import main

pytestmark = pytest.mark.usefixtures("own_random")

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("bring-your-model", "models-vision", "models-language", "models-own", "own-loop", "callbacks")


class Recipe(NamedTuple):
    """A section's program, with the file's name that it begins with, and the commands below it."""

    file: str
    program: str
    commands: tuple[tuple[str, ...], ...]


def recipes(text: str) -> list[Recipe]:
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        commands = [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
        for program in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            [file] = re.findall(r'\A"""(\w+\.py)"""\n', program)
            found.append(Recipe(file, program, tuple(tuple(shlex.split(line)) for line in commands)))
    return found


RECIPES = [one for page in PAGES for one in recipes((DOCS / f"{page}.md").read_text(encoding="utf-8"))]
NAMES = [one.file for one in RECIPES]


def inline(function: Any, *args: Any, **options: Any) -> Any:
    return function(*args, **{**options, "workers": "inline"})


def test_there_are_recipes_of_every_kind() -> None:
    assert len(RECIPES) >= 10
    assert len(set(NAMES)) == len(NAMES)


SELDOM = ("padded.py", "prepare.py")  # a minute of tracing of models whose like others have
EACH = [pytest.param(one, id=one.file, marks=[pytest.mark.slow] if one.file in SELDOM else []) for one in RECIPES]


@pytest.mark.parametrize("recipe", EACH)
def test_a_recipe_runs(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; what a program claims, it asserts itself."""
    for name in ("fit", "session"):
        monkeypatch.setattr(delock, name, partial(inline, getattr(delock, name)), raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / recipe.file).write_text(recipe.program, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(recipe.program, recipe.file, "exec", dont_inherit=True), names)
        for program, *words in recipe.commands:
            assert program == "delock"
            assert main([*words, *(["--workers", "inline"] if words[0] == "train" else [])]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_runs_in_processes(recipe: Recipe, tmp_path: Path) -> None:
    """As a user starts it."""
    (tmp_path / recipe.file).write_text(recipe.program, encoding="utf-8")
    for words in [[recipe.file], *(["-m", *words] for words in recipe.commands)]:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_recipe_runs_under_torchrun(tmp_path: Path) -> None:
    """A rank per stage; every rank compares its weights with plain PyTorch's."""
    [recipe] = [one for one in RECIPES if one.file == "unet.py"]
    (tmp_path / recipe.file).write_text(recipe.program, encoding="utf-8")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", recipe.file]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
