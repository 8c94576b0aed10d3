"""Writes the folder of a run: it is made when the run starts, and no file of an earlier run is overwritten."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from delock.errors import UsageError
from delock.records import EvaluationRecord, StepRecord, Visit, VisitsRecord

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, SUMMARY, MODEL, BOARD = "config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "tensorboard"
CHECKPOINTS = "checkpoints"
ALPHABET = "alphabet.json"  # of a language model: what its tokens stand for
TIMELINE, PICTURES = "timeline.json", ("timeline.png", "timeline.svg")  # with --trace
TRACE = "trace.jsonl"  # of a free-running run: its plan as it happened
OURS = (CONFIG, METRICS, SUMMARY, MODEL, ALPHABET, TRACE, TIMELINE, *PICTURES, "compare.json", "compare.md", "compare.png", "compare.svg")


def load_visits(folder: Path, K: int) -> list[list[Visit]]:
    """Returns the visits of each of K stages from trace.jsonl; an incomplete last line of a run that was cut off is left out.

    Raises UsageError if the file does not exist or has any other content.
    """
    try:
        lines = (folder / TRACE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise UsageError(f"{folder} holds no {TRACE}, which a run with dgl-async and order free keeps from its first visits on") from None
    stages: list[list[Visit]] = [[] for _ in range(K)]
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            stages[range(K).index(values.pop("stage"))].append(Visit(**values))
        except (ValueError, TypeError, AttributeError, LookupError):
            if number < len(lines) or line.endswith("}"):
                raise UsageError(f"line {number} of {folder / TRACE} is not a visit of one of {K} stages") from None
    return stages


class RunFolder:
    """Writes a folder that does not exist before `open`. Without `out` it is runs/<date-time>-<name>, with a number if that is taken.

    Raises UsageError if no folder can be made there, if `out` is a file, and if it is not empty and `overwrite` is not given.
    """

    def __init__(self, out: Path | None, name: str, *, overwrite: bool = False) -> None:
        self.path = out or Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
        self._chosen = out is not None
        self._inside: RunFolder | None = None
        self.opened = False
        self._metrics: IO[str] | None = None
        self._trace: IO[str] | None = None
        try:
            _refuse(self.path)
            if out is not None and out.exists() and any(out.iterdir()) and not overwrite:
                raise UsageError(f"the run folder {out} exists: give another --out, or --overwrite to replace the run in it")
        except OSError as error:
            raise UsageError(f"cannot use the run folder {self.path}: {error.strerror}; give another --out") from None

    def inner(self, name: str) -> RunFolder:
        """Returns the folder of one of several runs in this one; opening it opens this one first."""
        folder = RunFolder(self.path / name, name, overwrite=True)
        folder._inside = self
        return folder

    def open(self) -> None:
        """Makes the folder, once; with `overwrite` it removes an earlier run's files, and no others."""
        if self.opened:
            return
        if self._inside:
            self._inside.open()
            self.path = self._inside.path / self.path.name
        try:
            if self._chosen:
                self.path.mkdir(parents=True, exist_ok=True)
                _clear(self.path)
            else:
                self.path = _new(self.path)
        except OSError as error:
            raise UsageError(f"cannot make the run folder {self.path}: {error.strerror}; give another --out") from None
        self.opened = True

    def write(self, name: str, text: str) -> None:
        """Writes one of the folder's text files."""
        self._replace(name, text.encode())

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        """Appends a line to metrics.jsonl, on disk at once, so that records outlive the run."""
        if self._metrics is None:
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        self._metrics.write(dumps(line(record)) + "\n")
        self._metrics.flush()

    def add_visits(self, record: VisitsRecord) -> None:
        """Appends lines to trace.jsonl, one per visit, for `delock replay`."""
        if self._trace is None:
            self._trace = (self.path / TRACE).open("a", encoding="utf-8")
        for visit in record.visits:
            values = {name: getattr(visit, name) for name in Visit.__dataclass_fields__}
            self._trace.write(dumps({"stage": record.stage, **values}) + "\n")
        self._trace.flush()

    def save_model(self, state: Mapping[str, Tensor]) -> None:
        """Saves the weights under their names in the unsplit model."""
        from safetensors.torch import save  # here: it loads torch

        whole = save({name: value.detach().cpu().contiguous() for name, value in state.items()})
        self._replace(MODEL, whole)  # save_file would make a file that only its owner may read

    def _replace(self, name: str, content: bytes) -> None:
        """Writes a file so that it is never found incomplete."""
        part = self.path / f".{name}.part"
        try:
            part.write_bytes(content)
            part.replace(self.path / name)
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes metrics.jsonl and trace.jsonl."""
        for file in (self._metrics, self._trace):
            if file is not None:
                file.close()


def line(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    """Returns a record as a flat mapping; test metrics are called test_accuracy and the like."""
    values = {name: getattr(record, name) for name in type(record).__dataclass_fields__}
    metrics = {f"test_{name}": value for name, value in values.pop("metrics", {}).items()}
    return {"event": "step" if isinstance(record, StepRecord) else "evaluation", **values, **metrics}


def dumps(value: Any, indent: int | None = None) -> str:
    """Returns JSON, which has no infinity and no NaN: they become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _refuse(path: Path) -> None:
    """Raises UsageError if a folder cannot be made: before hours of work rather than after."""
    place = next((place for place in (path, *path.parents) if place.exists()), None)
    if place is not None and not place.is_dir():
        where = "it" if place == path else place
        raise UsageError(f"cannot use the run folder {path}: {where} is a file; give another --out")
    if place is None or not os.access(place, os.W_OK):
        raise UsageError(f"cannot use the run folder {path}: {place or 'the place'} may not be written to; give another --out")


def _new(path: Path) -> Path:
    """Makes a folder that did not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise UsageError(f"there are too many run folders called {path}: give another --out")


def _clear(path: Path) -> None:
    """Removes the files of a run, and of the runs of a comparison in it, from a folder."""
    for name in OURS:
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / BOARD, ignore_errors=True)
    for inner in [config.parent for config in path.glob(f"*/{CONFIG}")]:
        _clear(inner)
        if not any(inner.iterdir()):
            inner.rmdir()
