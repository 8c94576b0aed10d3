"""Writes checkpoints into a folder and finds them there. Each is a folder of files that appears whole, by a rename, or not at all.

    checkpoints/
        batch-00000500/     weights-0.safetensors  optimizer-0.safetensors  in-flight-0.safetensors  ...  manifest.json
                            model.safetensors.index.json: the weights of all stages as the shards of one model
        .batch-00001000/    being written: a stage adds its files and then done-k.json; who finds all of those first
                            renames it, so that no other stage knows it, writes the manifest, and gives it its name

Stages share nothing but the folder. It may be that of many hosts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delock.checkpoints.encoding import decode, encode
from delock.checkpoints.files import save
from delock.checkpoints.manifest import Manifest
from delock.checkpoints.weight_index import INDEX, stage_index
from delock.errors import UsageError

MANIFEST = "manifest.json"
NAME = re.compile(r"batch-(\d{8,})")
WIDE = "complex128"  # metadata: names of tensors (..., 2) that are pairs of real and imaginary parts
CHUNK = 1 << 22
LONGEST = 1 << 26  # bytes of a manifest


def name_of(batches: int) -> str:
    """Returns the name of the checkpoint after that many batches."""
    return f"batch-{batches:08d}"


# ---- writing -----------------------------------------------------------------------------------------------------------------------


class Writer:
    """Writes the part of one stage of a checkpoint. begin, add, add, done: in this order."""

    def __init__(self, folder: Path, batches: int, k: int, K: int) -> None:
        self.folder, self.k, self.K = folder, k, K
        self.final, self.place = folder / name_of(batches), folder / f".{name_of(batches)}"
        self.files: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """Makes the folder that is being written."""
        self.place.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, tree: Any, *, private: bool = False) -> None:
        """Writes a tree as KIND-k.safetensors. private: for its owner's eyes only, as training data may be in it.

        No name of a tensor comes twice in a checkpoint: there are readers of weights that look into every file of a folder.
        """
        structure, tensors = encode(tree, f"stage {self.k}: {kind}", f"{kind}.{self.k}.")
        self.add_tensors(kind, tensors, {"structure": json.dumps(structure, allow_nan=False)}, private=private)

    def add_tensors(
        self, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, private: bool = False
    ) -> None:
        """Writes tensors by name."""
        path = self.place / f"{kind}-{self.k}.safetensors"
        path.touch(mode=0o600 if private else 0o666)
        wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]  # which the format has not
        given = {**tensors, **{name: torch.view_as_real(tensors[name].resolve_conj()) for name in wide}}
        self.files[path.name] = save(path, given, {**(metadata or {}), **({WIDE: json.dumps(wide)} if wide else {})})

    def done(self, updates: int, rest: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> Manifest | None:
        """Says that this stage's files are written. The last stage to say so completes the checkpoint, and gets its manifest.

        rest: the entries of the manifest that all stages know: tick, batches, made_with, options. known: those that this stage alone knows.
        """
        _write(self.place / f"done-{self.k}.json", json.dumps({"updates": updates, "files": self.files, "known": known or {}}))
        if not all((self.place / f"done-{k}.json").exists() for k in range(self.K)):
            return None
        own = self.place.with_name(f"{self.place.name}.all")
        try:
            os.rename(self.place, own)
        except FileNotFoundError:  # another stage saw all of them at the same moment, and was faster
            return None
        return self._complete(own, rest)

    def _complete(self, own: Path, rest: Mapping[str, Any]) -> Manifest:
        """Writes the manifest into the folder with the files of all stages, which nobody else knows by this name, and gives it its own."""
        said = [own / f"done-{k}.json" for k in range(self.K)]
        found = [json.loads(path.read_text()) for path in said]
        files = {name: tuple(measure) for one in found for name, measure in one["files"].items()}
        _write(own / INDEX, stage_index(own, self.K))
        files[INDEX] = _measure(own / INDEX)
        manifest = Manifest(updates=tuple(one["updates"] for one in found), files=files, **rest, **_joined(found))
        _write(own / MANIFEST, manifest.dumps())
        for path in said:
            path.unlink()
        _sync(own)
        if self.final.exists():  # damaged, and passed over: the run went on from an earlier one
            _remove(self.final)
        os.rename(own, self.final)
        _sync(self.folder)
        return manifest


def prune(folder: Path, keep: int, judged: tuple[str, bool] | None = None) -> None:
    """Removes all but the newest `keep` checkpoints, and what is half written and older than the last two.

    judged: a measure, and whether more of it is better: the best by it stays, too.
    """
    whole = newest_first(folder)
    kept = {*whole[: max(1, keep)], *([_best(whole, *judged)] if judged else [])}
    for path in whole:
        if path not in kept:
            _remove(path)
    for path in folder.glob(".batch-*") if len(whole) > 1 else ():
        if path.name[1:] < whole[1].name:  # a newer one may be what a slower stage writes
            _remove(path)


def discard_unfinished(folder: Path) -> None:
    """Removes what is half written, before a run begins: its parts must not be taken for those of the run, which may be other ones."""
    for path in folder.glob(".batch-*"):
        _remove(path)


def _best(whole: Sequence[Path], name: str, most: bool) -> Path | None:
    """Returns the checkpoint with the best measure, the oldest of equals; None if none has it."""
    measures = {path: manifest_of(path).measures for path in reversed(whole)}
    having = [path for path, found in measures.items() if name in found]
    return (max if most else min)(having, key=lambda path: measures[path][name], default=None)


def _joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for one in found for name, value in one["known"].items()}


def _remove(path: Path) -> None:
    """Removes a checkpoint; its manifest first, so that what is left of it is none."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _measure(path: Path) -> tuple[int, int]:
    """Returns the bytes and the CRC32 of a file."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def _sync(folder: Path) -> None:
    with suppress(OSError):  # some file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- reading -----------------------------------------------------------------------------------------------------------------------


def newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder that have a manifest, the newest first."""
    found = [path for path in folder.glob("batch-*") if NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name[6:]), reverse=True)


def verified(path: Path, *, contents: bool = True) -> Manifest:
    """Returns the manifest of a checkpoint whose files are as they were written. Raises UsageError that names what is damaged.

    contents: read all files; without it only their sizes are compared.
    """
    try:
        manifest = manifest_of(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no checkpoint: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise UsageError(f"{path} is damaged: {name} is missing")
        if (path / name).stat().st_size != expected[0] or (contents and _measure(path / name) != expected):
            raise UsageError(f"{path} is damaged: {name} is not as it was written")
    return manifest


def manifest_of(path: Path) -> Manifest:
    """Returns the manifest of a checkpoint as it stands there. Raises UsageError for one that is not as it was written; OSError."""
    file = path / MANIFEST
    if not file.is_file() or file.stat().st_size > LONGEST:  # a pipe would never end
        raise OSError(f"{MANIFEST} is missing, or not a file of one")
    return Manifest.loads(file.read_text())


def read(path: Path, kind: str, k: int, *, outline: bool = False) -> Any:
    """Returns the tree of KIND-k.safetensors; as an outline its tensors have shapes and no values. Raises UsageError for another file."""
    file = path / f"{kind}-{k}.safetensors"
    tensors, metadata = read_tensors(file, outline=outline)
    try:
        return decode(json.loads(metadata["structure"]), tensors)
    except (KeyError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} has no structure that can be read: {error}") from error


def read_tensors(file: Path, *, outline: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file by name, and its metadata; as an outline, they have shapes and no values.

    Raises UsageError for a file that is not one.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            get = partial(_outline if outline else _aligned, opened)
            tensors, metadata = {name: get(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    try:
        return tensors | {name: torch.view_as_complex(tensors[name]) for name in json.loads(metadata.get(WIDE, "[]"))}, metadata
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{file} does not say rightly which of its tensors are complex: {error}") from error


def _aligned(opened: Any, name: str) -> Tensor:
    """Returns a tensor that begins where torch lets its own begin: on some processors the last bits of a sum depend on it."""
    return opened.get_tensor(name).clone()  # type: ignore[no-any-return]


def _outline(opened: Any, name: str) -> Tensor:
    return torch.empty(opened.get_slice(name).get_shape(), dtype=torch.float32, device="meta")
