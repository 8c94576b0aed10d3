"""Reads the weights of the unsplit model out of a checkpoint, and writes them as one file or as Hugging Face's shards."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from delock.checkpoints.directory import manifest_of, read_tensors
from delock.checkpoints.weight_index import INDEX, index, is_head, sizes, weights_file
from delock.errors import UsageError

SUM = "crc32"  # in a file's metadata
ONE, LIMIT = "model.safetensors", 5 * 10**9  # bytes of a shard, as Hugging Face has it


def read_model(path: Path) -> dict[str, Tensor]:
    """Returns the state dict of the unsplit model from a checkpoint, or from a safetensors file with all of it.

    Raises UsageError for another folder or file, and for one that is damaged.
    """
    found: dict[str, Tensor] = {}
    for file, names in _where(path).items():
        tensors, metadata = read_tensors(file)
        if path.is_file():  # those of a checkpoint have their sums in its manifest
            _refuse_damaged(file, metadata, _sorted(tensors, tensors.__getitem__))
        found |= {name: tensors[name] for name in names}
    return found


def _checksum(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the CRC32 of the metadata, and of the names, kinds, shapes and bytes of tensors, by name."""
    crc = zlib.crc32(repr(sorted((key, value) for key, value in metadata.items() if key != SUM)).encode())
    for name, one in tensors:
        crc = zlib.crc32(f"{name} {one.dtype} {list(one.shape)}".encode(), crc)
        crc = zlib.crc32(one.contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _sorted(names: Iterable[str], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, get(name)) for name in sorted(names))


def _refuse_damaged(file: Path, metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UsageError for a file whose tensors, in the order of their names, are not those that its checksum, if any, was taken of."""
    if metadata.keys() - {"format"} and metadata.get(SUM) != _checksum(metadata, tensors):
        raise UsageError(f"{file} is damaged: its tensors are not as they were written; restore it, or train again")


def dumps(state: Mapping[str, Tensor]) -> bytes:
    """Returns a state dict as a safetensors file, with a checksum of its tensors; a tied weight is there under each of its names."""
    tensors, seen = dict[str, Tensor](), set[int]()
    for name, value in state.items():
        one = value.detach().cpu().contiguous()
        place = one.untyped_storage().data_ptr()
        tensors[name] = one.clone() if place in seen else one  # the format has no two names for one place
        seen.add(place)
    return bytes(save(tensors, {SUM: _checksum({}, _sorted(tensors, tensors.__getitem__))}))  # one entry: they have no order


def export(path: Path, target: Path, limit: int = LIMIT) -> list[Path]:
    """Writes the unsplit model of a checkpoint, or of a safetensors file, and returns the files.

    target: a file, if it ends in .safetensors, else a folder, in which a model of more than `limit` bytes is divided into shards with an
    index. No more than a shard is held in memory. Raises UsageError as `read_model`, and for a target that exists.
    """
    where = _where(path)
    if path.is_file():
        with _opened(path) as opened:
            _refuse_damaged(path, opened.metadata() or {}, _sorted(opened.keys(), opened.get_tensor))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists: give another --out, or remove it")
    if target.suffix == ".safetensors":
        target.parent.mkdir(parents=True, exist_ok=True)
        return [_write(target, where, [name for names in where.values() for name in names])]
    target.mkdir(parents=True, exist_ok=True)
    shards = _shards({name: size for names in where.values() for name, size in names.items()}, limit)
    if len(shards) == 1:
        return [_write(target / ONE, where, shards[0])]
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    written = [_write(target / name, where, shard) for name, shard in files.items()]
    return [*written, _replace(target / INDEX, lambda part: part.write_text(index(files), encoding="utf-8"))]


def _where(path: Path) -> dict[Path, dict[str, int]]:
    """Returns the files of a model, with the bytes of its tensors in them."""
    if path.is_file():
        return {path: sizes(path)}
    try:
        K = manifest_of(path).K
        own = {k: sizes(path / weights_file(k)) for k in range(K)}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no checkpoint: {error}") from error
    files = {path / weights_file(k): {name: size for name, size in own[k].items() if not is_head(name, k)} for k in own}
    names = [name for tensors in files.values() for name in tensors]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{path} is damaged: two stages hold {min(twice)}")
    return files


def _shards(names: Mapping[str, int], limit: int) -> list[dict[str, int]]:
    """Returns the names in their order, in parts of at most `limit` bytes; a tensor above it is a part of its own."""
    shards: list[dict[str, int]] = [{}]
    for name, size in names.items():
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def _write(path: Path, where: Mapping[Path, Mapping[str, int]], names: Mapping[str, int] | list[str]) -> Path:
    def save(part: Path) -> None:
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it: save_file would make a file for its owner alone
        save_file(dict(_read(where, names)), part, {"format": "pt"})
        part.chmod(mode)

    return _replace(path, save)


def _read(where: Mapping[Path, Mapping[str, int]], names: Mapping[str, int] | list[str]) -> Iterator[tuple[str, Tensor]]:
    for file, own in where.items():
        wanted = [name for name in own if name in names]
        if not wanted:
            continue
        with _opened(file) as opened:
            for name in wanted:
                yield name, opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file. Raises UsageError for a file, or within the block for a tensor, that cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file so that it is never found incomplete, and returns it."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path
