"""Reads off compiled code which names it looks up: globals, and modules that it imports when it runs."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType

LOADS = ("LOAD_GLOBAL", "LOAD_NAME")


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yields the code of a function, and of those inside it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from codes(one)


def loaded(code: CodeType) -> set[str]:
    """Returns the global names that code looks up, that of functions inside it included."""
    return _arguments(code, LOADS)


def stored(code: CodeType) -> set[str]:
    """Returns the global names that code binds or deletes, that of functions inside it included."""
    return _arguments(code, ("STORE_GLOBAL", "DELETE_GLOBAL"))


def imports(code: CodeType) -> set[str]:
    """Returns the modules that code imports when it runs."""
    return _arguments(code, ("IMPORT_NAME",))


def _arguments(code: CodeType, operations: tuple[str, ...]) -> set[str]:
    return {step.argval for one in codes(code) for step in dis.get_instructions(one) if step.opname in operations}
