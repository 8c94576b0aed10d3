"""Parses the words behind a command into a config: options of the command line over those of a file over the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import field, fields, make_dataclass
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from delock.cli.complaint import complaint
from delock.cli.config import build, override, shown, table, toml
from delock.cli.config.flat import sayable
from delock.errors import UsageError
from delock.options import WORDS

C = TypeVar("C")

FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)


def parse(config: type[C], words: Sequence[str], command: str, description: str) -> C:
    """Returns the config that the words describe. Raises UsageError for words and a file that do not fit; --help leaves by SystemExit."""
    path = _file(words) if "config" in table(config) else None
    values = toml.read(path) if path else {}
    if "config" in values:
        raise UsageError(f"{path}: a config file cannot name another one; take the line `config` out")
    form = _form(build(config, values, str(path)))
    try:
        with redirect_stderr(StringIO()):  # its errors are boxes of many lines; ours is one line
            asked = tyro.cli(form, args=list(words), prog=f"delock {command}", description=description, config=FLAT)
    except SystemExit as leave:
        if leave.code:
            raise UsageError(complaint(words, table(config), command)) from None
        raise
    said = _names(words, table(config))
    given = {name: getattr(getattr(asked, option.group), name) for name, option in table(config).items() if name in said}
    return build(config, override(values, given), str(path or "options"))


def _form(config: Any) -> type[Any]:
    """Returns a dataclass for tyro with the options of a config, at their present values.

    Its groups check nothing, so that `build` refuses values out of range, in one line. An option that may be an object is text, and an
    option for Python only is left out. tyro finds the help of an option in the class from which its group is derived.
    """
    groups = {name: _group(kind, getattr(config, name)) for name, kind in get_type_hints(type(config)).items()}
    return make_dataclass("Form", [(name, group, field(default_factory=group)) for name, group in groups.items()])


def _group(kind: type[Any], values: Any) -> type[Any]:
    kinds, flat = get_type_hints(kind, include_extras=True), sayable(kind)
    options = [(one.name, _as_text(kinds[one.name]), field(default=getattr(values, one.name), init=one in flat)) for one in fields(kind)]
    unchecked = {"__post_init__": lambda self: None, "__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, options, bases=(kind,), namespace=unchecked, frozen=True)


def _as_text(kind: Any) -> Any:
    """Returns the type, or text if text may stand for an object; one value or several is a number of values."""
    inner = get_args(kind)
    if several := next((one for one in inner if get_origin(one) is tuple and len(inner) > 2), None):
        return Annotated[several | None, shown("none", "VALUE ...")]
    if get_origin(kind) is Annotated or str not in inner or all(one in WORDS for one in inner):
        return kind
    return Annotated[str | None, shown("none")] if NoneType in inner else str


def _file(words: Sequence[str]) -> Path | None:
    """Returns the value of --config, which must be known before the words are parsed, because the file gives the defaults."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
        if word == "--config" and after:
            return Path(after)
    return None


def _names(words: Sequence[str], known: Iterable[str]) -> set[str]:
    """Returns the options that the words name: --batch-size 8, --batch_size=8, --no-augment."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {name for name in known if name in names or f"no_{name}" in names}
