"""The laws of the house: imports run down, the light floors load no torch, and files are as readable and portable as agreed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import laws
from laws import PACKAGE, ROOT, sources

LIGHT = (
    *("delock", "delock.ops", "delock.plan", "delock.methods", "delock.codecs", "delock.timeline", "delock.records"),
    *("delock.options", "delock.draw", "delock.cli"),
)
HEAVY = ("torch", "torchvision", "matplotlib", "sklearn")
LONGEST = {"src": 350, "examples": 350, "benchmarks": 350, "tests": 400}  # lines of a file
CACHED = {  # functions that keep results for the life of a process, and why they may: the same arguments always give the same value
    "links/wire.py:_layout": "a run has a handful of layouts, and making one takes longer than sending a small message",
    "links/wire.py:_read_layout": "the same, at the receiver's end",
    "links/wire.py:_dense": "the same, for every tensor that is laid out densely",
    "launch/by_value.py:in cached_again": "a function that the user has given a cache, made again in a stage",
}
FILES = sources()
EVERYWHERE = {f"{folder}/{file}": tree for folder in LONGEST for file, tree in sources(ROOT / folder).items()}


def none(found: list[str]) -> None:
    assert not found, "\n".join(found)


# -- imports -----------------------------------------------------------------------------------------------------------------------


def test_an_import_runs_down() -> None:
    none(laws.not_downward(FILES, laws.floors((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))))


def test_no_files_import_each_other() -> None:
    none([" <-> ".join(circle) for circle in laws.circles(FILES)])


def test_methods_know_only_ops() -> None:
    none(laws.beyond(FILES, "methods", "ops", "errors"))


def test_one_link_knows_codecs() -> None:
    assert laws.import_outside(FILES, "links", "codecs") == ["links/coded.py imports codecs/__init__.py"]
    assert laws.import_outside(FILES, "engine", "codecs") == []


def test_a_stage_sees_a_step_and_a_message_at_a_time() -> None:
    assert laws.import_outside(FILES, "stage", "plan", "plan/steps.py") == []
    assert laws.import_outside(FILES, "stage", "links", "links/message.py") == []


def test_a_method_is_asked_not_its_class() -> None:
    none([file for file, tree in FILES.items() if laws.asked_for(tree, "AsyncDGL") and not file.startswith("engine/asynchronous/")])


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[heavy for heavy in {HEAVY} if heavy in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


# -- files and names ---------------------------------------------------------------------------------------------------------------


def test_the_package_has_few_rooms() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 30


def test_a_name_is_given_once() -> None:
    none(laws.same_basenames(FILES) + laws.same_classes(FILES))


def test_every_file_says_what_it_is() -> None:
    """In its first line: no comment, no blank line comes before the docstring."""
    none([file for file, tree in EVERYWHERE.items() if not ast.get_docstring(tree) or tree.body[0].lineno > 1])


def test_a_docstring_is_a_sentence() -> None:
    none([f"{file}:{line}" for file, tree in EVERYWHERE.items() for line in laws.questions(tree)])


def test_no_file_is_long() -> None:
    none(laws.long_files({file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in EVERYWHERE}, LONGEST))


def test_functions_are_short() -> None:
    assert median(laws.lengths(FILES)) <= 6


# -- state -------------------------------------------------------------------------------------------------------------------------


def test_no_module_keeps_state() -> None:
    """No mutable object and no global statement: rank, link, seed and device are passed."""
    none([f"{file}:{line}" for file, tree in FILES.items() for line in laws.kept_state(tree)])


def test_results_are_kept_only_where_there_is_a_reason() -> None:
    kept = {f"{file}:{name}" for file, tree in FILES.items() for name in laws.cached(tree)}
    assert kept == set(CACHED)
    assert all(CACHED.values())


# -- portable ----------------------------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """Files of the git checkout; skips where this is none."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if listed.returncode:
        pytest.skip(f"git ls-files failed: {listed.stderr.strip()}")
    return [ROOT / path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


def test_no_file_names_a_machine_or_a_registry() -> None:
    pattern, found = laws.suspect(), []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{path.relative_to(ROOT)}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if pattern.search(line)]
    none(found)


# -- offenders ---------------------------------------------------------------------------------------------------------------------


def package(**files: str) -> dict[str, ast.Module]:
    """A small package: plan__walk="..." is the file plan/walk.py."""
    return {file.replace("__", "/") + ".py": ast.parse(text) for file, text in files.items()}


def test_the_laws_can_be_broken() -> None:
    """Each finder on a small offender, beside something like it that is allowed."""
    below = laws.floors("| floor | what |\n|---|---|\n| 1 | `ops.py` `plan/` | order |\n| 2 | `cli/` | commands |\n")
    assert below == {"ops": 1, "plan": 1, "cli": 2}
    up = package(ops="", plan__a="def f():\n    from delock.cli import x", plan__b="import delock.plan.a", cli__x="import delock.ops")
    assert laws.not_downward(up, below) == ["plan/a.py (floor 1) imports cli/x.py (floor 2)"]
    along = package(ops="", plan__a="from delock import ops", cli__x="")
    assert laws.not_downward(along, below) == ["plan/a.py (floor 1) imports ops.py (floor 1)"]
    assert len(laws.not_downward(package(ops="", new__x="", cli__x=""), below)) == 2  # `new` has no floor, `plan` is gone

    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from delock.b import B"
    assert laws.circles(package(a=typed, b="from delock.c import C", c="import delock.a", d="import delock.a")) == [
        ["a.py", "b.py", "c.py"]
    ]
    assert laws.circles(package(a="import delock.b", b="import torch", c="import delock.a, delock.b")) == []
    coded = package(links__mailbox="from delock.codecs.vq import VQ", codecs__vq="", links__x="import delock.links.mailbox")
    assert laws.import_outside(coded, "links", "codecs") == ["links/mailbox.py imports codecs/vq.py"]
    assert laws.import_outside(coded, "links", "codecs", "codecs/vq.py") == []

    learned = package(methods__a="import torch\nimport math\nfrom delock.ops import Op\nfrom delock.links import Link", ops="", links__a="")
    learned["links/__init__.py"] = ast.parse("")
    assert laws.beyond(learned, "methods", "ops") == ["methods/a.py imports links", "methods/a.py imports torch"]

    assert laws.same_basenames(["a/x.py", "b/x.py", "cli/x.py", "a/base.py", "b/base.py", "a/__init__.py"]) == ["x: a/x.py, b/x.py"]
    assert laws.same_classes(package(a="class A: ...\nclass _B: ...", b="class A: ...\nclass _B: ...")) == ["A: a.py, b.py"]
    doubt = '"""A."""\nclass C:\n    """What it is."""\n    x: int\n    """See y."""\n    def f():\n        """Whatever."""\n        "Who"'
    assert [line.split(":")[0] for line in laws.questions(ast.parse(doubt))] == ["3", "5", "8"]
    assert laws.long_files({"src/a.py": 3, "src/b.py": 2, "tests/a.py": 3}, {"src": 2, "tests": 3}) == [
        "src/a.py has 3 lines, 2 are allowed"
    ]
    assert sorted(laws.lengths(package(a="@cache\ndef f():\n    def g(): ...\n    return g\n"))) == [1, 3]

    state = "X = {}\nY: list[int] = []\nZ = (1,)\n__all__ = []\ndef f():\n    global Z"
    assert laws.kept_state(ast.parse(state)) == ["1 X", "2 Y", "6 global"]
    for decorator in ("cache", "lru_cache(maxsize=2)", "functools.lru_cache", "functools.cache"):
        assert laws.cached(ast.parse(f"@{decorator}\ndef f(): ...\n@property\ndef g(): ...")) == ["f"]
    assert laws.cached(ast.parse("g = lru_cache(2)(f)\ncache = 1")) == ["line 1"]
    asking = "isinstance(m, AsyncDGL)\nisinstance(m, BP | methods.AsyncDGL)\nisinstance(m, (BP, AsyncDGL))\nisinstance(m, BP)\nf(AsyncDGL)"
    assert laws.asked_for(ast.parse(asking), "AsyncDGL") == [1, 2, 3]
    for line in ("cd /ho" + "me/me/delock", "see https://py" + "pi.org/project/x", "pip install --index-" + "url x"):
        assert laws.suspect().search(line)
    for line in ("$HO" + "ME/x", "runs/ho" + "me/x", "https://example.org/wo" + "rk/x", "pip install uv"):
        assert not laws.suspect().search(line)
