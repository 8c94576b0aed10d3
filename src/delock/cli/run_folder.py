"""Writes the folder of a run: it is made when the run starts, and no file of an earlier run is overwritten."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from delock.cli import seals
from delock.cli.growing_file import GrowingFile
from delock.cli.held_folder import HeldFolder, clear
from delock.cli.models.kept_files import FILES
from delock.cli.rescue import rescue, told, warning
from delock.errors import UsageError
from delock.records import Cut, EvaluationRecord, StepRecord, Visit, VisitsRecord

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CONFIG, METRICS, SUMMARY, MODEL, BOARD = "config.toml", "metrics.jsonl", "summary.json", "model.safetensors", "tensorboard"
CHECKPOINTS = "checkpoints"
ALPHABET = "alphabet.json"  # of a language model: what its tokens stand for
TIMELINE, PICTURES = "timeline.json", ("timeline.png", "timeline.svg")  # with --trace
TRACE = "trace.jsonl"  # of a free-running run: its plan as it happened
OURS = (
    CONFIG,
    METRICS,
    SUMMARY,
    MODEL,
    ALPHABET,
    TRACE,
    TIMELINE,
    *PICTURES,
    "compare.json",
    "compare.md",
    "compare.png",
    "compare.svg",
    FILES,
)


def load_visits(folder: Path, K: int) -> list[list[Visit]]:
    """Returns the visits of each of K stages from trace.jsonl; an incomplete last line of a run that was cut off is left out.

    Raises UsageError if the file does not exist or has any other content.
    """
    try:
        lines = seals.read(folder / TRACE)
    except OSError:
        raise UsageError(f"{folder} holds no {TRACE}, which a run with dgl-async and order free keeps from its first visits on") from None
    stages: list[list[Visit]] = [[] for _ in range(K)]
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            stages[range(K).index(values.pop("stage"))].append(Visit(**values))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise UsageError(f"line {number} of {folder / TRACE} is not a visit of one of {K} stages") from None
    return stages


class RunFolder:
    """Writes the files of a run. Without `out` the folder is runs/<date-time>-<name>, with a number if that is taken.

    goes_on: the run in it goes on; its files stay.
    A disk that is full, or a folder that is gone, costs no record and no weights: training goes on, and `settle` brings the run elsewhere.
    """

    def __init__(self, out: Path | None, name: str, *, overwrite: bool = False, goes_on: bool = False) -> None:
        path = out or Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
        self._held = HeldFolder(path, new=out is None, overwrite=overwrite or goes_on)
        self._goes_on = goes_on
        self._name = Path(os.path.abspath(path)).name
        self._inside: RunFolder | None = None
        self.path = path
        self.opened = False
        self._had_checkpoints = False  # of an earlier run; those of this one may be there before its first record
        self.lost: str | None = None  # what could not be written, and where it is instead
        self._texts: dict[str, str] = {}
        self._state: Mapping[str, Tensor] | None = None
        self._metrics = GrowingFile[StepRecord | EvaluationRecord](METRICS, lambda record: dumps(line(record)) + "\n", whole=True)
        self._trace = GrowingFile[VisitsRecord](TRACE, _visit_lines, whole=False, seals=True)
        self._unwritten: dict[str, OSError] = {}
        self._warned = False

    def inner(self, name: str) -> RunFolder:
        """Returns the folder of one of several runs in this one; opening it opens this one first."""
        folder = RunFolder(self.path / name, name, overwrite=True)
        folder._inside, folder._name, folder._held = self, f"{self._name}-{name}", self._held
        return folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder for the time of the block, and keeps other runs out; if it was not opened in it, it is as before afterwards.

        Raises UsageError if no folder can be made there, if it is a file or in use, and if it is not empty and `overwrite` is not given.
        """
        self._held.take()
        self.path = self._held.path
        self._had_checkpoints = (self.path / CHECKPOINTS).exists()
        try:
            yield
        finally:
            self._held.release(keep=self.opened)

    def open(self) -> None:
        """Begins to write, once; with `overwrite` it removes an earlier run's files, and no others."""
        if self.opened:
            return
        if self._inside:
            self._inside.open()
            self.path = self._inside.path / self.path.name
        self.opened = True
        self.attempt(".", self._empty)

    def _empty(self) -> None:
        self.path.mkdir(exist_ok=True)
        if not self._goes_on:
            clear(self.path, OURS, (BOARD, CHECKPOINTS) if self._had_checkpoints else (BOARD,), CONFIG)

    def write(self, name: str, text: str) -> None:
        """Writes one of the folder's text files."""
        self._texts[name] = text
        self.attempt(name, _replace, self.path / name, text.encode())

    def add(self, record: StepRecord | EvaluationRecord) -> None:
        """Appends a line to metrics.jsonl, on disk at once, so that records outlive the run."""
        self._metrics.add(record)
        self.attempt(METRICS, self._metrics.flush, self.path)

    def earlier_records(self, batches: int, evaluations: int, source: Path) -> list[str] | None:
        """Returns the records of the first `batches` and `evaluations` as lines; source: the folder of the run that goes on."""
        made = count(1)

        def wanted(record: dict[str, Any]) -> bool:
            return next(made) <= evaluations if record["event"] == "evaluation" else record["batches"] <= batches

        return self.attempt(METRICS, self._metrics.kept, wanted, source)

    def earlier_visits(self, cuts: Sequence[Cut], source: Path) -> list[str] | None:
        """Returns of a run's visits those that its stages had made at a checkpoint, as lines; None for a run without a trace."""

        def wanted(values: dict[str, Any]) -> bool:
            stage: int = values.pop("stage")
            return stage < len(cuts) and cuts[stage].keeps(Visit(**values))

        return self.attempt(TRACE, self._trace.kept, wanted, source) if (source / TRACE).is_file() else None

    def begin(self, records: Sequence[str] | None, visits: Sequence[str] | None) -> None:
        """Writes earlier records and visits, in front of those to come, where there are any."""
        if records is not None:
            self.attempt(METRICS, self._metrics.begin, records, self.path)
        if visits is not None:
            self.attempt(TRACE, self._trace.begin, visits, self.path)

    def add_visits(self, record: VisitsRecord) -> None:
        """Appends lines to trace.jsonl, one per visit, for `delock replay`."""
        self._trace.add(record)
        self.attempt(TRACE, self._trace.flush, self.path)

    @property
    def visits(self) -> int:
        """Returns the lines of trace.jsonl."""
        return self._trace.lines

    def save_model(self, state: Mapping[str, Tensor]) -> None:
        """Saves the weights under their names in the unsplit model."""
        self._state = state
        self.attempt(MODEL, _save, state, self.path)

    def attempt(self, name: str, write: Callable[..., T], *given: Any) -> T | None:
        """Returns write(*given), which writes a file of the folder; None, with a warning the first time, if that fails."""
        try:
            if self.lost is None and not self._held.holds():
                raise FileNotFoundError(errno.ENOENT, "the folder is gone")
            result = write(*given)
        except OSError as error:
            self._unwritten[name] = error
            if not self._warned:
                self._warned = True
                _warn(warning(self.path, name, error))
            return None
        self._unwritten.pop(name, None)
        return result

    def settle(self) -> None:
        """Tries a last time to write what could not be written; if it fails, all of the run goes to a new folder, and `lost` says so."""
        if self._unwritten and not self._settle_here():
            missing: list[str] = []
            place, failed = rescue(self._name, lambda folder: missing.extend(self._fill(folder)))
            self.lost = told(self.path, self._unwritten, place, failed, [*missing, *self._unknown()])
            self.path = place or self.path
        elif self._unwritten:
            self.lost = self.lost or told(self.path, self._unwritten, self.path, [], [])
        self._unwritten.clear()

    def _settle_here(self) -> bool:
        """Writes all that is known into the folder; returns False if it still cannot be written."""
        if self.lost is None and not self._held.holds():
            return False
        try:
            self.path.mkdir(exist_ok=True)
            self._fill(self.path)
        except OSError:
            return False
        self._unwritten = {name: self._unwritten[name] for name in self._unknown()}
        return True

    def _unknown(self) -> list[str]:
        """Returns the files that could not be written, and that nobody here can write again, such as pictures."""
        return [name for name in self._unwritten if name not in (".", METRICS, TRACE, MODEL, *self._texts)]

    def _fill(self, folder: Path) -> list[str]:
        """Writes all that is known of the run into a folder; returns the names of files of which a part is lost."""
        for name, text in self._texts.items():
            _replace(folder / name, text.encode())
        if self._state is not None:
            _save(self._state, folder)
        if folder == self.path:
            self._metrics.flush(folder)
            self._trace.flush(folder)
            return []
        return [file.name for file in (self._metrics, self._trace) if not file.move(self.path, folder)]


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


def _visit_lines(record: VisitsRecord) -> str:
    visits = ({name: getattr(visit, name) for name in Visit.__dataclass_fields__} for visit in record.visits)
    return "".join(dumps({"stage": record.stage, **values}) + "\n" for values in visits)


def _save(state: Mapping[str, Tensor], folder: Path) -> None:
    from delock.checkpoints.whole_model import dumps as model_bytes  # here: it loads torch

    _replace(folder / MODEL, model_bytes(state))


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is never found incomplete, and is on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _warn(text: str) -> None:
    with suppress(OSError):  # it may go to a file on the same disk
        print(f"warning: {text}", file=sys.stderr, flush=True)
