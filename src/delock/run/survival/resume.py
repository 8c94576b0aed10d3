"""Finds the checkpoint that a run goes on from, and refuses options that may not change on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from delock import codecs
from delock.checkpoints.directory import discard_unfinished, newest_first, verified
from delock.checkpoints.folder_lock import FolderLock
from delock.checkpoints.manifest import Manifest
from delock.data.endless import Stream
from delock.data.iterable import weigher
from delock.data.named_sets import sets_of
from delock.errors import UsageError
from delock.methods import spelled
from delock.options import Checkpoint
from delock.partition.network import FORWARD
from delock.records import Resumed
from delock.run.request import Request
from delock.run.survival.made_with import made_with
from delock.run.survival.parts import cuts

NEWEST = "newest"
MODEL = "model"  # the condition that is the model's outline
FREE = ("cuts", "layout")  # conditions that may be others in other stages


@dataclass(frozen=True)
class Begin:
    """Says where a run begins: at a checkpoint."""

    path: str
    manifest: Manifest

    @property
    def tick(self) -> int:
        """Returns the tick before which every stage was saved."""
        return self.manifest.tick

    def restages(self, cuts: Sequence[int | str]) -> bool:
        """Returns True if stages with these cuts are not those of the checkpoint."""
        return list(self.manifest.options["cuts"]) != list(cuts)

    def first(self, cuts: Sequence[int | str]) -> int:
        """Returns the batch with which stages with these cuts begin, or have begun."""
        return self.manifest.batches if self.restages(cuts) else self.manifest.first


def find(options: Checkpoint, *, writes: bool = True) -> tuple[Begin | None, tuple[str, ...]]:
    """Returns the checkpoint to go on from, if there is one, and what is to be said. Damaged ones are passed over.

    writes: later ones that are there would be in the way.

    Raises UsageError for one that does not exist or is damaged, and where none is whole.
    """
    folder, resume = Path(options.folder), options.resume
    there = newest_first(folder)
    if resume is None:
        return None, ()
    if str(resume) == NEWEST:
        return _newest(there, folder)
    path = next((one for one in (Path(resume), folder / resume) if one.exists()), None)
    if path is None:
        holds = f"and {folder} holds {', '.join(one.name for one in there[:3]) or 'none'}"
        raise UsageError(f"{resume} is no checkpoint: it does not exist, {holds}; give the folder of one, or {NEWEST!r}")
    if inside := newest_first(path):
        return _newest(inside, path)
    begin = Begin(str(path), verified(path))
    later = [one.name for one in there if one.parent.resolve() == path.parent.resolve() and one.name > path.name]
    if later and writes:
        raise UsageError(f"{folder} also holds a later checkpoint, {later[0]}: go on from that one, or give the run another folder")
    return begin, ()


@contextmanager
def held(options: Checkpoint) -> Iterator[None]:
    """Keeps the folder of checkpoints for one run within the block; what an earlier one has left half written in it goes.

    Raises UsageError for a folder that another run is using, and for one with checkpoints of an earlier run, from which this one does not
    go on.
    """
    folder = Path(options.folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _lock(folder)
    try:
        there = newest_first(folder)
        if there and options.resume is None:
            which = f"{options.folder} holds checkpoints of an earlier run ({there[0].name})"
            raise UsageError(f"{which}: go on from them with resume, or give another folder")
        discard_unfinished(folder)
        yield
    finally:
        if lock:
            lock.release()
        with suppress(OSError):  # there is something in it
            for path in made:
                path.rmdir()


def _lock(folder: Path) -> FolderLock | None:
    """Makes and locks the folder. Returns None for one that cannot be used any more; the next checkpoint will say so."""
    lock = FolderLock(folder, "folder of checkpoints", "give another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError:
        return None
    return lock


def _newest(there: Sequence[Path], folder: Path) -> tuple[Begin | None, tuple[str, ...]]:
    notes: list[str] = []
    for path in there:
        try:
            return Begin(str(path), verified(path)), tuple(notes)
        except UsageError as error:
            notes.append(f"passed over: {error}")
    if notes:
        raise UsageError(f"no checkpoint in {folder} is whole: {notes[0]}")
    return None, (f"there is no checkpoint in {folder}: the run begins anew",)


def settled(request: Request, begin: Begin | None) -> Request:
    """Returns the request with the cuts and the layout of the checkpoint, where it leaves them open and has as many stages."""
    if begin is None:
        return request
    saved, K = begin.manifest.options, begin.manifest.K
    if (len(request.cuts) + 1 if request.cuts is not None else request.stages or K) != K:
        return request
    layout = saved["layout"] if request.execution.layout == "auto" else request.execution.layout
    cuts = request.cuts if request.cuts is not None else saved["cuts"]
    return replace(request, cuts=cuts, execution=replace(request.execution, layout=layout))


def conditions(request: Request, cuts: Sequence[int | str], samples: int, layout: str) -> dict[str, Any]:
    """Returns what must be the same when the run goes on, by the names of options, as plain values."""
    execution, compression, length = request.execution, request.compression, request.length()
    weighed = weigher(request.train)
    return {
        "method": spelled(request.method),
        "cuts": list(cuts),
        "layout": layout,
        "seed": request.seed,
        "clip": request.clip,
        "amp": execution.amp,
        "chunks": execution.chunks,
        "compile": execution.compile,
        "codec": codecs.spelled(compression.activations),
        "error_codec": codecs.spelled(compression.errors),
        "batches per epoch": None if isinstance(request.train, Stream) else len(request.train),
        "samples of a batch": samples,
        "weight of the data": _named(weighed and weighed.weight),
        "eval_every": length.every,
        "test batches": length.evaluation,
        "test sets": [f"{name} of {len(one)}" for name, one in sets_of(request.test).items() if name] if request.test is not None else [],
        "metrics": [*request.metrics],
        "loss": _named(request.loss),
        "schedule": _named(request.schedule),
        "callbacks": [*map(repr, request.callbacks)],
        MODEL: request.network.outline(),
    }


def refuse_changed(now: Mapping[str, Any], begin: Begin, batches: int, *, free: bool = False) -> None:
    """Raises UsageError for a condition that has changed, and for a run that is over where it is to go on.

    free: the stages run freely. They may all be done there but for an evaluation, and none may have made more updates than it is to make.
    """
    then, where = begin.manifest.options, _at(begin)
    same = not begin.restages(now["cuts"])
    _refuse_other_model(now[MODEL], begin)
    for name in (name for name in now if name != MODEL):
        if (same or name not in FREE) and now[name] != then.get(name, now[name]):
            was = f"{name} was {_said(then[name])} when {where} was made, and is {_said(now[name])} now"
            raise UsageError(f"{was}: use the same, or begin a new run")
    at = max(begin.manifest.updates) if free else begin.manifest.batches
    if at > batches or (at == batches and not free):
        raise UsageError(f"{where} is at batch {at}, but the run is to end at batch {batches}: let it be longer")


def _refuse_other_model(now: Mapping[str, str], begin: Begin) -> None:
    """Raises UsageError for a model of other modules, or that computes something else with them. Another torch may write both otherwise."""
    then: Mapping[str, str] = begin.manifest.options.get(MODEL, now)
    if begin.manifest.made_with.get("torch") != torch.__version__:
        return
    for path in {**now, **then}:
        was, is_now = then.get(path, "not there"), now.get(path, "not there")
        if path == FORWARD and was != is_now and was.partition(" ")[0] == is_now.partition(" ")[0]:
            raise UsageError(f"the model's forward does something else than when {_at(begin)} was made: use the same, or begin a new run")
        if path != FORWARD and was != is_now:
            what = f"the module {path}" if path else "the model"
            raise UsageError(f"{what} was {was} when {_at(begin)} was made, and is {is_now} now: use the same, or begin a new run")


def resumed(begin: Begin | None, notes: Sequence[str]) -> Resumed:
    """Returns the record of a run that goes on, or begins anew; it says what differs from the circumstances of the checkpoint."""
    if begin is None:
        return Resumed(0, 0, 0, "", tuple(notes))
    then = begin.manifest
    here: dict[str, Any] = {"torch": torch.__version__}
    if then.made_with.get("device") == "cpu":
        here["processor"] = made_with(torch.device("cpu"))["processor"]
    differ = [
        f"{name} was {then.made_with.get(name)} when the checkpoint was made, and is {now} now: the last bits of results may differ"
        for name, now in here.items()
        if then.made_with.get(name) != now
    ]
    return Resumed(then.batches, then.trained, then.evaluations, begin.path, (*notes, *differ), cuts(begin.path, then))


def _at(begin: Begin) -> str:
    return f"the checkpoint {begin.path}"


def _said(value: Any) -> str:
    return str(value) if value is not None else "not given"


def _named(function: Any) -> str | None:
    """Returns the name of a function or of its class; of a partial, that of its function."""
    function = getattr(function, "func", function)
    return None if function is None else getattr(function, "__qualname__", type(function).__qualname__)
