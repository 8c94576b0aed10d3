"""Finders of what the laws of the house forbid: each is a function of source trees, so that a small offender can be given to it."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "delock"
QUESTIONS = ("What", "Who", "Whether", "How", "Where", "Of", "Which", "See")
Sources = Mapping[str, ast.Module]  # a file's path below a folder, "plan/walk.py", and its tree


def sources(folder: Path = PACKAGE) -> dict[str, ast.Module]:
    """Every Python file below a folder."""
    return {str(path.relative_to(folder)): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}


# -- imports -----------------------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules, or names in them, that code imports, in functions and for type checking too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "relative imports hide the floor: write delock.x"
                yield from (f"{module}.{alias.name}" for alias in names)


def imported_files(tree: ast.AST, files: Iterable[str]) -> set[str]:
    """The files of the package that code imports: the module of a name, or the package that hands it on."""
    found = set()
    for dotted in imports(tree):
        first, *parts = dotted.split(".")
        while first == "delock" and parts:
            place = "/".join(parts)
            hit = {f"{place}.py", f"{place}/__init__.py"} & set(files)
            if hit:
                found |= hit
                break
            parts.pop()
        else:
            if first == "delock" and "__init__.py" in files:
                found.add("__init__.py")
    return found


def graph(package: Sources) -> dict[str, set[str]]:
    """The files that every file imports."""
    return {file: imported_files(tree, package) - {file} for file, tree in package.items()}


def circles(package: Sources) -> list[list[str]]:
    """Files that import each other, directly or through others."""
    edges = graph(package)
    reach = {file: reached(edges, file) for file in edges}
    groups = {tuple(sorted(other for other in reach[file] if file in reach[other])) for file in edges if file in reach[file]}
    return [list(group) for group in sorted(groups)]


def reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """All files that are imported from a file on."""
    found: set[str] = set()
    front = set(edges[start])
    while front:
        found |= front
        front = set().union(*(edges[file] for file in front)) - found
    return found


def unit(file: str) -> str:
    """The module or folder directly below delock that a file belongs to; "delock" for what delock itself offers."""
    first = file.split("/")[0].removesuffix(".py")
    return {"__init__": "delock", "__main__": "cli"}.get(first, first)


def floors(text: str) -> dict[str, int]:
    """The floor of every unit, from the table in CONTRIBUTING.md: | 3 | `plan/` `links/` | ... |."""
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    return {unit(name): int(number) for number, units in rows for name in re.findall(r"`([^`]+)`", units)}


def not_downward(package: Sources, floor: Mapping[str, int]) -> list[str]:
    """Imports that run up or along a floor, and units that are not in the table, or no longer."""
    units = {unit(file) for file in package}
    found = [f"{name}: in CONTRIBUTING's table or in the package, but not in both" for name in sorted(units ^ set(floor))]
    pairs = [(file, other) for file, others in graph(package).items() for other in sorted(others) if unit(file) != unit(other)]
    height = {file: floor.get(unit(file), 0) for file in package}
    return found + [f"{a} (floor {height[a]}) imports {b} (floor {height[b]})" for a, b in pairs if height[b] >= height[a]]


def import_outside(package: Sources, folder: str, of: str, *allowed: str) -> list[str]:
    """Imports of files in folder `of`, but for the allowed ones, by files in `folder`."""
    pairs = [(file, other) for file, others in graph(package).items() if unit(file) == folder for other in sorted(others)]
    return [f"{file} imports {other}" for file, other in pairs if unit(other) == of and other not in allowed]


def beyond(package: Sources, folder: str, *allowed: str) -> list[str]:
    """Imports by files in `folder` of other units than the allowed ones, and of anything outside Python's own library."""
    found = []
    for file, tree in package.items():
        if unit(file) == folder:
            outside = {dotted.split(".")[0] for dotted in imports(tree)} - {"delock", *sys.stdlib_module_names}
            others = {unit(other) for other in imported_files(tree, package)} - {folder, *allowed}
            found += [f"{file} imports {name}" for name in sorted(outside | others)]
    return found


# -- names -------------------------------------------------------------------------------------------------------------------------


def repeated(places: Iterable[tuple[str, str]]) -> list[str]:
    """Names with more than one place."""
    found = defaultdict(list)
    for name, place in places:
        found[name].append(place)
    return [f"{name}: {', '.join(where)}" for name, where in sorted(found.items()) if len(where) > 1]


def same_basenames(package: Iterable[str]) -> list[str]:
    """Modules of one name in two folders; commands of the command line are called what they do."""
    return repeated((Path(file).stem, file) for file in package if unit(file) != "cli" and Path(file).stem not in ("__init__", "base"))


def same_classes(package: Sources) -> list[str]:
    """Public classes of one name."""
    classes = ((node.name, file) for file, tree in package.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return repeated((name, file) for name, file in classes if not name.startswith("_"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring: of modules, classes, functions, and of attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield child.lineno, text


def questions(tree: ast.Module) -> list[str]:
    """Docstrings that begin like a question or a reference, where a sentence is wanted."""
    return [f"{line}: {text[:60]}" for line, text in docstrings(tree) if text.split()[:1] and text.split()[0].rstrip(",:") in QUESTIONS]


# -- lengths ---------------------------------------------------------------------------------------------------------------------


def long_files(lines: Mapping[str, int], most: Mapping[str, int]) -> list[str]:
    """Files with more lines than a file in their first folder may have."""
    allowed = {file: most[file.split("/")[0]] for file in lines}
    return [f"{file} has {count} lines, {allowed[file]} are allowed" for file, count in lines.items() if count > allowed[file]]


def lengths(package: Sources) -> list[int]:
    """Lines of every function, from `def` to its end."""
    functions = [node for tree in package.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(function.end_lineno or function.lineno) - function.lineno + 1 for function in functions]


def cached(tree: ast.Module) -> list[str]:
    """Functions whose results are kept for the life of a process, and functions or lines that make such functions without a decorator."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    decorators = {id(part) for f in functions for decorator in f.decorator_list for part in ast.walk(decorator)}
    kept = [f.name for f in functions if any(named(decorator, "lru_cache", "cache") for decorator in f.decorator_list)]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute) and named(node, "lru_cache")]
    around = {id(part): f"in {f.name}" for f in functions for part in ast.walk(f)}
    return kept + [around.get(id(node), f"line {node.lineno}") for node in uses if id(node) not in decorators]


def named(node: ast.AST, *names: str) -> bool:
    """An expression is one of these names, bare, as an attribute, or called."""
    match node:
        case ast.Call(func=func):
            return named(func, *names)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in names
    return False


def asked_for(tree: ast.Module, kind: str) -> list[int]:
    """Lines with isinstance(..., kind), alone or among others."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and named(node.func, "isinstance") and len(node.args) == 2]
    return [call.lineno for call in calls if any(named(node, kind) for node in ast.walk(call.args[1]))]


# -- state -------------------------------------------------------------------------------------------------------------------------


def kept_state(tree: ast.Module) -> list[str]:
    """Mutable objects of a module, and global statements."""
    assignments = [(node.lineno, *assigned(node)) for node in tree.body]
    found = [f"{line} {target}" for line, target, value in assignments if value is not None and target != "__all__" and mutable(value)]
    return found + [f"{node.lineno} global" for node in ast.walk(tree) if isinstance(node, ast.Global)]


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


def suspect() -> re.Pattern[str]:
    """A path of some machine's users, or a package index."""
    places = "|".join(("home", "root", "work", "Users", "workspace"))
    machine = rf"(?<![\w.:/<$}}])/(?:{places})/\w"
    registry = (r"pypi\." + "org", "python" + "hosted", r"--(?:extra-)?index-" + "url", r"https?://\S+/simp" + r"le\b")
    return re.compile("|".join((machine, *registry)))
