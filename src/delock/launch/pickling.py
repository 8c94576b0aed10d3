"""Pickles target and payload for a rank by value, and says clearly which part cannot be pickled."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import UntypedStorage

from delock.errors import UsageError
from delock.launch.parcel import Parcel, Unpickler

_REMEDY = 'Define it at the top level of a module (no lambda, no function or class inside a function), or use workers="inline".'
_INTO_A_FILE = 'Put it into a file and import it from there, or use workers="inline".'
_DEPTH = 12  # levels of containers and attributes to search for the part at fault


def pack(target: Callable[..., object], payload: object, rank: int) -> Parcel:
    """Returns both to be sent, with tensors by value. Raises UsageError that names the part of the payload which cannot be pickled.

    It raises it too for what is defined in a program without a file, which a process cannot import.
    """
    try:
        parcel = Parcel((target, payload))
    except Exception as error:  # pickle raises whatever an object's own reduction raises
        what = "the target" if _fault(target) else _after("payload", _path(payload, _DEPTH))
        raise UsageError(f"what stage {rank} needs cannot be sent to its process: {what}: {error}. {_REMEDY}") from error
    if b"__main__" in parcel.pickled and not main_has_a_file():
        _OfThisProgram(parcel, rank).load()
    return parcel


class _OfThisProgram(Unpickler):
    """Raises UsageError for the first name of the main program that is to be loaded."""

    def __init__(self, parcel: Parcel, rank: int) -> None:
        super().__init__(io.BytesIO(parcel.pickled), parcel.storages)
        self.rank = rank

    def persistent_load(self, pid: Any) -> Any:
        """Returns a copy: an object may write into its tensors when it is loaded."""
        return super().persistent_load(pid).clone()

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "__main__":
            raise UsageError(
                f"the process of stage {self.rank} cannot rebuild {name}, which is defined in a program without a file (a notebook, "
                f"standard input or python -c), so that no process can import it. {_INTO_A_FILE}"
            )
        return super().find_class(module, name)


def main_has_a_file() -> bool:
    """Says whether a process can import the main program, as multiprocessing does: by its name, or from its file."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (file is not None and Path(file).exists())


@contextmanager
def hidden_false_file() -> Iterator[None]:
    """Hides, within the block, a `__file__` of the main program that does not exist, as "<stdin>": processes would try to run it."""
    main = vars(sys.modules["__main__"])
    false = {} if main_has_a_file() or "__file__" not in main else {"__file__": main.pop("__file__")}
    try:
        yield
    finally:
        main.update(false)


def unpack(pickled: bytes, storages: Sequence[UntypedStorage]) -> tuple[Callable[..., Any], Any]:
    """Returns target and payload. Raises UsageError if a name in them does not exist in this process, such as one defined in a notebook."""
    try:
        target, payload = Unpickler(io.BytesIO(pickled), storages).load()
    except (AttributeError, ImportError) as error:
        raise UsageError(f"a stage's process cannot rebuild what it was sent: {error}. {_REMEDY}") from error
    return target, payload


def _fault(value: object) -> bool:
    try:
        Parcel(value)
    except Exception:
        return True
    return False


def _path(value: object, depth: int) -> str:
    """Returns the path of the first part of `value` that cannot be pickled, as one would write it: model.fc.hook.

    A part whose name does not begin with a dot or a bracket is known to the user by that name alone.
    """
    if depth > 0:
        for name, part in _parts(value):
            if _fault(part):
                return _after(name, _path(part, depth - 1))
    return ""


def _after(name: str, rest: str) -> str:
    return name + rest if rest[:1] in ("", ".", "[") else rest


def _parts(value: object) -> Iterable[tuple[str, object]]:
    if callable(in_words := getattr(value, "parts_in_words", None)):
        return [*in_words()]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)]
    members = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    for inside in ("_modules", "_parameters", "_buffers"):  # of a torch module, which has them as attributes
        members |= members.pop(inside, {}) if isinstance(members.get(inside), Mapping) else {}
    return [(f".{name}", part) for name, part in members.items()]
