"""The laws of the house: imports run down, the light floors load no torch, and files are as readable and portable as agreed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "delock"
FLOORS = (
    ("errors", "keys", "ops"),
    ("tensors", "optim", "methods", "codecs", "data", "nets", "launch"),
    ("plan", "links", "execution"),
    ("timeline", "records", "partition"),
    ("stage", "memory"),
    ("engine",),
    ("run", "draw"),
    ("api", "recipes"),
    ("cli", "__main__"),
)
LIGHT = ("delock", "delock.ops", "delock.plan", "delock.methods", "delock.codecs", "delock.timeline", "delock.draw", "delock.cli")
HEAVY = ("torch", "torchvision", "matplotlib", "sklearn")
LONGEST = 400  # lines of a file


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def unit(path: Path) -> str:
    """The module or package directly below delock that a file belongs to; "" for delock itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of all modules, or names in them, that code imports, in functions too, but for type checking only."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for other in child.orelse:
                    yield from imports(other)
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "relative imports hide the floor: write delock.x"
                yield from (f"{module}.{alias.name}" for alias in names)
            case _:
                yield from imports(child)


def used(path: Path) -> set[str]:
    """The units below delock that a file imports."""
    return {dotted.split(".")[1] for dotted in imports(parse(path)) if dotted.startswith("delock.")}


def floor(which: str) -> int:
    found = [number for number, units in enumerate(FLOORS, 1) if which in units]
    assert found, f"delock.{which} has no floor yet: say in {Path(__file__).name} where it belongs"
    return found[0]


def test_an_import_runs_down() -> None:
    wrong = [
        f"{name(path)} (floor {floor(unit(path))}) imports delock.{other} (floor {floor(other)})"
        for path in python_files("src")
        if unit(path)
        for other in sorted(used(path))
        if (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists()  # else a name that delock/__init__.py offers
        if floor(other) > floor(unit(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_methods_know_only_ops() -> None:
    for path in python_files("src/delock/methods"):
        assert used(path) <= {"ops", "errors", "methods"}, name(path)
        outside = {dotted.split(".")[0] for dotted in imports(parse(path))} - {"delock"}
        assert outside <= sys.stdlib_module_names, name(path)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[heavy for heavy in {HEAVY} if heavy in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_every_file_says_what_it_is() -> None:
    silent = []
    for path in python_files("src", "tests", "examples", "benchmarks"):
        text = path.read_text(encoding="utf-8")
        if not text.startswith(('"""', 'r"""')) or not ast.get_docstring(parse(path)):
            silent.append(name(path))
    assert not silent, f"no docstring in the first line of: {', '.join(silent)}"


def test_no_file_is_long() -> None:
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files("src", "examples", "benchmarks")}
    assert not {path: count for path, count in lines.items() if count > LONGEST}


def test_no_module_keeps_state() -> None:
    """No mutable object and no global statement: rank, link, seed and device are passed."""
    found = []
    for path in python_files("src"):
        for node in parse(path).body:
            target, value = assigned(node)
            if value is not None and target != "__all__" and mutable(value):
                found.append(f"{name(path)}:{node.lineno} {target}")
        found += [f"{name(path)}:{node.lineno} global" for node in ast.walk(parse(path)) if isinstance(node, ast.Global)]
    assert not found, "\n".join(found)


def assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    match node:
        case ast.Assign(targets=[target, *_], value=value):
            return ast.unparse(target), value
        case ast.AnnAssign(target=target, value=value):
            return ast.unparse(target), value
        case _:
            return "", None


def mutable(value: ast.expr) -> bool:
    match value:
        case ast.Dict() | ast.List() | ast.Set() | ast.DictComp() | ast.ListComp() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id=made) | ast.Attribute(attr=made)):
            return made in ("dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray", "local")
        case _:
            return False


def tracked() -> list[Path]:
    """Files of the git checkout; skips where this is none."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if listed.returncode:
        pytest.skip(f"git ls-files failed: {listed.stderr.strip()}")
    return [ROOT / path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


def suspect() -> re.Pattern[str]:
    """A path of some machine's users, or a package index."""
    places = "|".join(("home", "root", "work", "Users", "workspace"))
    machine = rf"(?<![\w.:/<$}}])/(?:{places})/\w"
    registry = (r"pypi\." + "org", "python" + "hosted", r"--(?:extra-)?index-" + "url", r"https?://\S+/simp" + r"le\b")
    return re.compile("|".join((machine, *registry)))


def test_no_file_names_a_machine_or_a_registry() -> None:
    pattern = suspect()
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{name(path)}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found, "\n".join(found)


def test_the_laws_can_be_broken() -> None:
    """Each finder on a small offender."""
    loading = "import a\nfrom delock.api import fit\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import b.c\n"
    tree = ast.parse(loading + "X = {}\nY: list[int] = []\nZ = (1,)\n__all__ = []")
    assert list(imports(tree)) == ["a", "delock.api.fit", "b.c"]
    assert [assigned(node)[0] for node in tree.body if (value := assigned(node)[1]) and mutable(value)] == ["X", "Y", "__all__"]
    assert (floor("api"), floor("ops"), unit(PACKAGE / "plan" / "walk.py"), unit(PACKAGE / "cli.py")) == (8, 1, "plan", "cli")
    for line in ("cd /ho" + "me/me/delock", "see https://py" + "pi.org/project/x", "pip install --index-" + "url x"):
        assert suspect().search(line)
    for line in ("$HO" + "ME/x", "runs/ho" + "me/x", "https://example.org/wo" + "rk/x", "pip install uv"):
        assert not suspect().search(line)
