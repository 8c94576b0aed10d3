"""Writes a file of lines that grows during a run. A line that cannot be written now is written with a later one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from delock.cli.seals import read, sealed
from delock.errors import UsageError

T = TypeVar("T")


class GrowingFile(Generic[T]):
    """Appends the lines of items to a file, on disk at once.

    `whole`: all items are kept, so that they can be written elsewhere. `seals`: every line, a JSON object, is sealed.
    """

    def __init__(self, name: str, text: Callable[[T], str], *, whole: bool, seals: bool = False) -> None:
        self.name, self.text, self.whole, self.seals = name, text, whole, seals
        self._seal = 0  # of the last line
        self.lines = 0  # in the file
        self._items: list[T] = []
        self._written = 0  # of the items
        self._begun = False
        self._earlier = b""  # lines of before a cut

    def add(self, item: T) -> None:
        """Takes an item, whose lines `flush` will write."""
        self._items.append(item)

    def flush(self, folder: Path) -> None:
        """Appends what is not yet written. An OSError leaves the file as it was before, with whole lines."""
        if self._written == len(self._items):
            return
        text, seal = self._sealed("".join(map(self.text, self._items[self._written :])), self._seal)
        data = text.encode()
        with (folder / self.name).open("ab", buffering=0) as file:
            before = file.tell()
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), before)
                raise
        if not self.whole:
            self._items.clear()
        self._written, self._begun, self._seal = len(self._items), True, seal
        self.lines += text.count("\n")

    def kept(self, wanted: Callable[[dict[str, Any]], bool], source: Path) -> list[str]:
        """Returns the lines of the file in a folder that are wanted.

        Raises UsageError for a sealed line that is not as it was written, and for a line that is no record.
        """
        path = source / self.name
        lines = self._lines(path) if path.exists() else []
        return [line for number, line in enumerate(lines, 1) if _is(wanted, line, number, path)]

    def begin(self, kept: Sequence[str], target: Path) -> None:
        """Writes these lines as the file in a folder; the next ones come behind them."""
        text, self._seal = self._sealed("".join(f"{line}\n" for line in kept), 0)
        self._earlier = text.encode()
        part = target / f".{self.name}.part"
        part.write_bytes(self._earlier)
        part.replace(target / self.name)
        self._items, self._written, self._begun, self.lines = [], 0, bool(kept), len(kept)

    def _lines(self, path: Path) -> list[str]:
        """Returns the whole lines of the file, without seals; what follows the last one is a line that was cut off."""
        if self.seals:
            return read(path)
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        try:
            return whole.decode().split("\n") if newline else []
        except UnicodeDecodeError as error:
            raise UsageError(_no_record(whole.count(b"\n", 0, error.start) + 1, path)) from None

    def _sealed(self, text: str, before: int) -> tuple[str, int]:
        return sealed(text.splitlines(), before) if self.seals else (text, before)

    def move(self, old: Path, new: Path) -> bool:
        """Writes all lines into another folder. Returns False if earlier ones are neither kept here nor to be read in the old folder."""
        if self._begun and not self.whole:
            try:
                earlier = (old / self.name).read_bytes()
            except OSError:
                return False
            (new / self.name).write_bytes(earlier)
        elif self._earlier:
            (new / self.name).write_bytes(self._earlier)
        before = self._written
        self._written = 0 if self.whole else before
        try:
            self.flush(new)
        except OSError:
            self._written = before
            raise
        return True


def _is(wanted: Callable[[dict[str, Any]], bool], line: str, number: int, path: Path) -> bool:
    try:
        return wanted(json.loads(line))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        raise UsageError(_no_record(number, path)) from None


def _no_record(number: int, path: Path) -> str:
    return f"line {number} of {path} is not a record of a run: remove it, or begin a new run"
