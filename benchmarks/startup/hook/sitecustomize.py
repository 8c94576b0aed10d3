"""Loaded by every Python process that has this folder in PYTHONPATH: notes when the parts of a start begin and end.

A line of the file DELOCK_MARKS is: process, part, begin, end, in seconds of the system's monotonic clock, which all processes share.
"import" is the outermost import at work: whatever a function loads is counted there, and not where the function stands.
"""

import builtins
import functools
import importlib
import os
import sys
import threading
from importlib.machinery import PathFinder
from time import monotonic

MARKS = os.environ["DELOCK_MARKS"]
SHORTEST = 0.0005  # an import that takes less is of something already there
# part -> functions: of this checkout, and of commit edfd028
PARTS = {
    "parse": ["delock.cli.arguments.parse"],
    "data": ["delock.cli.workload.load_data"],
    "network": ["delock.cli.workload.build_model"],
    "measure": ["delock.partition.measure.measure", "delock.nets.measure.measure"],
    "optimizers": ["delock.memory.optimizer.optimizer_bytes", "delock.setup.optimizer.optimizers"],
    "processes": ["delock.launch.processes.run_processes"],
    "rank": ["delock.launch.child.main"],
    "group": ["delock.launch.child._open_group"],
    "train": ["delock.run.worker.Worker.run", "delock.train.Worker.run"],
    "update": ["delock.stage.stage.Stage.update"],
    "command": ["delock.cli.main"],
}
PATHS = {path: part for part, paths in PARTS.items() for path in paths}


def note(part, begin):
    """One line, whole: processes write to one file."""
    with open(MARKS, "a") as file:
        file.write(f"{os.getpid()} {part} {begin:.6f} {monotonic():.6f}\n")


def timed(part, function):
    """The function, with its time noted."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        begin = monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            note(part, begin)

    return run


class Finder:
    """Finds the modules with functions to be timed, and wraps these when the module has been executed."""

    def find_spec(self, name, path=None, target=None):
        """As importlib asks."""
        if not any(wanted.startswith(f"{name}.") and wanted[len(name) + 1 :].count(".") <= 1 for wanted in PATHS):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for wanted, part in PATHS.items():
                    owner, _, function = wanted[len(name) + 1 :].rpartition(".")
                    place = getattr(module, owner, None) if owner else module
                    if wanted.startswith(f"{name}.") and function in vars(place or object):
                        setattr(place, function, timed(part, getattr(place, function)))

            spec.loader.exec_module = exec_module
        return spec


def outermost(load, state={"inside": False}):  # noqa: B006  one state for all of them
    """An import function, with the time noted that the outermost call on the main thread takes."""

    @functools.wraps(load)
    def run(*args, **kwargs):
        if state["inside"] or threading.current_thread() is not threading.main_thread():
            return load(*args, **kwargs)
        begin, state["inside"] = monotonic(), True
        try:
            return load(*args, **kwargs)
        finally:
            state["inside"] = False
            if monotonic() - begin > SHORTEST:
                note("import", begin)

    return run


note("python", monotonic())
sys.meta_path.insert(0, Finder())
builtins.__import__ = outermost(builtins.__import__)
importlib.import_module = outermost(importlib.import_module)
