"""Finds the first error in words of a command line that the parser has refused, and describes it in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from delock.cli.config.flat import Option, brief, converted, described, hint


def complaint(words: Sequence[str], known: Mapping[str, Option], command: str) -> str:
    """Returns the first error, and its remedy; `known`: the command's options by flat name."""
    for option, values in _options(words):
        if wrong := _wrong(option, values, known, f"delock {command} --help lists them"):
            return wrong
    return f"the options are not understood: {' '.join(words)}; delock {command} --help lists them"


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Returns each option with the values behind it; "" holds values before the first option."""
    option, values = "", list[str]()
    for word in words:
        if word.startswith("-") and not _numbers(word):
            yield option, values
            option, equals, value = word.partition("=")
            values = [value] if equals else []
        else:
            values.append(word)
    yield option, values


def _wrong(option: str, values: list[str], known: Mapping[str, Option], listed: str) -> str | None:
    if not option:
        return f"{values[0]!r} belongs to no option; {listed}" if values else None
    name = option.removeprefix("--").replace("-", "_")
    switches = {f"no_{other}": found for other, found in known.items() if found.kind is bool}
    found = {**known, **switches}.get(name) if option.startswith("--") else None
    if found is None:
        return f"there is no option {option}" + (hint(name, [*known, *switches], _flag, ": ") or f"; {listed}")
    if found.kind is bool:
        return f"{option} takes no value, but was given {' '.join(values)}" if values else None
    if not _many(found.kind) and len(values) != 1:
        return f"{option} needs one value ({described(found.kind)}), but was given {' '.join(values) or 'none'}"
    unfit = [value for value in values if not _fits(value, found.kind)]
    return f"{option} is {brief(unfit[0])!r}, but it must be {described(found.kind)}" if unfit else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _many(kind: Any) -> bool:
    return any(get_origin(one) is tuple for one in (kind, *get_args(kind)))


def _fits(text: str, kind: Any) -> bool:
    """Returns True if a text, or the number it stands for, is of the kind, or of the kind of its entries."""
    for value in (text, *_numbers(text)):
        try:
            converted([value] if _many(kind) else value, kind)
        except TypeError:
            continue
        return True
    return False


def _numbers(text: str) -> list[int | float]:
    found: list[int | float] = []
    for number in (int, float):
        try:
            found.append(number(text))
        except ValueError:
            continue
    return found
