"""Reads and writes options in a TOML file, under their flat names."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delock.cli.config import small_file
from delock.cli.config.flat import GONE, RENAMED
from delock.errors import UsageError


def read(path: Path) -> dict[str, Any]:
    """Returns the options in a TOML file by flat name; names of older versions become today's.

    Raises UsageError if the file does not exist, is not TOML, or has tables.
    """
    try:
        values = tomllib.loads(small_file.text(path))
    except RecursionError:
        raise UsageError(f"{path} is not a TOML file of options: its lists are nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits, too
        raise UsageError(f"{path} is not a TOML file: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from None
    for name, value in values.items():
        if isinstance(value, dict):
            raise UsageError(f"{path}: [{name}] begins a table, but all options stand at the top level: take that line out")
    names = {name: name.replace("-", "_") for name in values}
    return {RENAMED.get(names[name], names[name]): value for name, value in values.items() if names[name] not in GONE}


def write(values: Mapping[str, Any], comment: str) -> str:
    """Returns a TOML document of flat options: text, paths, numbers, booleans and tuples of these."""
    return f"# {comment}\n" + "".join(f"{name} = {_text(value)}\n" for name, value in values.items())


def _text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's but for DEL
        case tuple():
            return f"[{', '.join(map(_text, value))}]"
        case _:
            return repr(value)
