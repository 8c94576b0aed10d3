"""Maps options by name: a config is a mapping from the flat names of the command line to values, checked against their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from delock.cli.config.options import AlgorithmOptions
from delock.errors import UsageError
from delock.options import WORDS

C = TypeVar("C")

_METHOD = tuple(field.name for field in fields(AlgorithmOptions) if field.name != "method")
REPLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "method": _METHOD,
        "model": ("cuts",),
        "depth": ("cuts",),
        "stages": ("cuts",),
        "cuts": ("stages",),
        "epochs": ("batches",),
        "batches": ("epochs",),
        "optimizer": ("horizon", "lr", "momentum", "nesterov", "beta1", "beta2", "weight_decay"),
    }
)
"""Options that go where an option overrides one that came from elsewhere: their values were meant for the old one."""


RENAMED: Mapping[str, str] = MappingProxyType({"steps": "batches", "straggle": "slow", "turns": "order"})
"""Names that options once had, and have in the files of older runs."""


GONE: Mapping[str, str] = MappingProxyType({"port": "stages on one host meet without one"})
"""Options that there were once, with the reason why they are not needed; files of older runs may have them."""

LONGEST = 100  # characters


@dataclass(frozen=True)
class Option:
    """Holds the group of an option, its name there, and its type."""

    group: str
    name: str
    kind: Any


def table(config: type[Any]) -> Mapping[str, Option]:
    """Returns all options of a config class by flat name. Names are unique over its groups."""
    found: dict[str, Option] = {}
    for group, options in get_type_hints(config).items():
        kinds = get_type_hints(options)
        found |= {option.name: Option(group, option.name, kinds[option.name]) for option in sayable(options)}
    return MappingProxyType(found)


def sayable(options: type[Any]) -> list[Field[Any]]:
    """Returns the fields of a group that can be written as text: all but those for Python only."""
    return [option for option in fields(options) if option.metadata.get("flag", True)]


def flat(config: Any) -> dict[str, Any]:
    """Returns every option by its flat name, without those that are None."""
    values = {name: getattr(getattr(config, option.group), name) for name, option in table(type(config)).items()}
    return {name: value for name, value in values.items() if value is not None}


def build(config: type[C], values: Mapping[str, Any], source: str) -> C:
    """Returns the config with those options, the others at their defaults; `source` names the origin of the values in errors.

    Values may be as a TOML file has them: lists for tuples, text for paths. A hyphen in a name counts as an underscore. Raises UsageError
    for a name that is not an option (with the nearest), and for a value of another type or out of range.
    """
    known = table(config)
    groups: dict[str, dict[str, Any]] = {option.group: {} for option in known.values()}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"{source}: there is no option {brief(key)!r}{hint(name, known, repr)}")
        option = known[name]
        try:
            groups[option.group][name] = converted(value, option.kind)
        except TypeError:
            raise UsageError(f"{source}: {key} is {brief(repr(value))}, but it must be {described(option.kind)}") from None
        if isinstance(value, str | Path) and "\0" in str(value):
            raise UsageError(f"{source}: {key} is {brief(str(value))!r}, but no text of an option has a NUL")
    kinds = get_type_hints(config)
    return config(**{group: _group(kinds[group], given) for group, given in groups.items()})


def _group(kind: type[C], given: Mapping[str, Any]) -> C:
    """Returns the group with those options; an error names them as the command line does."""
    try:
        return kind(**given)
    except UsageError as error:
        text = str(error)
        for name in given:
            text = re.sub(rf"\b{name}\b", name.replace("_", "-"), text)
        raise UsageError(text) from None


def hint(name: str, known: Collection[str], spelled: Callable[[str], str], joint: str = "; ") -> str:
    """Returns the remedy for a name that is not an option: today's name, or the nearest."""
    if name in GONE:
        return f" any more: {GONE[name]}"
    if RENAMED.get(name) in known:
        return f" any more: it is called {spelled(RENAMED[name])}"
    near = get_close_matches(name, known, n=1)
    return f"{joint}did you mean {spelled(near[0])}?" if near else ""


def override(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with `given` on top, without values of options that a given one replaces (REPLACES)."""
    gone = {old for name in given if given[name] != values.get(name) for old in REPLACES.get(name, ())}
    if "correct" in given:
        gone.add("ahead")  # which is what --correct ahead has become in a file
        if ("spike" in given["correct"]) != ("spike" in values.get("correct", ())):
            gone |= {"horizon", "beta1", "beta2"}  # it alone has the first, and betas have other defaults with it
    return {name: value for name, value in values.items() if name not in gone} | dict(given)


def converted(value: Any, kind: Any) -> Any:
    """Returns the value in its type. Raises TypeError for a value of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in inner:
            try:
                return converted(value, one)
            except TypeError:
                continue
    elif origin is Literal and isinstance(value, str) and value in inner:
        return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(converted(item, inner[0]) for item in value)
    elif kind is Path and isinstance(value, str | Path):
        return Path(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError


def brief(text: str) -> str:
    """Returns a text of a user as an error message can repeat it: the beginning of a long one."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def described(kind: Any) -> str:
    """Returns a type in the words of an error message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # neither None nor the objects that a text may stand for can be written
        return " or ".join(described(one) for one in inner if get_origin(one) or (one in WORDS and one is not NoneType))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return f"a list, each entry {described(inner[0])}"
    return WORDS[kind]
