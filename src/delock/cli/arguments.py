"""The words behind a command as a config: options of the command line over those of a file over the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TypeVar

import tyro

from delock.cli.complaint import complaint
from delock.cli.config import build, flat, override, table, toml
from delock.errors import UsageError

C = TypeVar("C")

FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)


def parse(config: type[C], words: Sequence[str], command: str, description: str) -> C:
    """The config that the words ask for. Raises UsageError for words and a file that do not fit; --help leaves by SystemExit."""
    path = _file(words) if "config" in table(config) else None
    values = {key.replace("-", "_"): value for key, value in toml.read(path).items()} if path else {}
    if "config" in values:
        raise UsageError(f"{path}: a config file cannot name another one; take the line `config` out")
    default = build(config, values, str(path))
    try:
        with redirect_stderr(StringIO()):  # its errors are boxes of many lines; ours is one line
            asked = tyro.cli(config, args=list(words), prog=f"delock {command}", description=description, default=default, config=FLAT)
    except SystemExit as leave:
        if leave.code:
            raise UsageError(complaint(words, table(config), command)) from None
        raise
    if not path:
        return asked
    given = _names(words, table(config))
    return build(config, override(values, {name: value for name, value in flat(asked).items() if name in given}), str(path))


def _file(words: Sequence[str]) -> Path | None:
    """The value of --config, which must be known before the words are parsed: the file gives the defaults."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
        if word == "--config" and after:
            return Path(after)
    return None


def _names(words: Sequence[str], known: Iterable[str]) -> set[str]:
    """The options that the words name: --batch-size 8, --batch_size=8, --no-augment."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {name for name in known if name in names or f"no_{name}" in names}
