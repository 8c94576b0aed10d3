"""Hugging Face's index of sharded weights: which file holds which tensor of the unsplit model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from delock.errors import UsageError

INDEX = "model.safetensors.index.json"


def weights_file(k: int) -> str:
    """Returns the name of the file with the weights of stage k."""
    return f"weights-{k}.safetensors"


def is_head(name: str, k: int) -> bool:
    """Returns True if a tensor of stage k belongs to its auxiliary head, and not to the unsplit model."""
    return name.startswith(f"heads.{k}.")


def sizes(file: Path) -> dict[str, int]:
    """Returns the bytes of every tensor in a safetensors file, by name; only the header is read. Raises UsageError for another file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length) if length <= file.stat().st_size else b"")
        header.pop("__metadata__", None)
        return {name: end - begin for name, (begin, end) in ((name, one["data_offsets"]) for name, one in header.items())}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def index(files: Mapping[str, Mapping[str, int]]) -> str:
    """Returns the index as JSON. files: file -> the bytes of its tensors by name."""
    where = {name: file for file, tensors in files.items() for name in tensors}
    total = sum(size for tensors in files.values() for size in tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"


def stage_index(folder: Path, K: int) -> str:
    """Returns the index of a folder with the weights of K stages; auxiliary heads are left out."""
    own = {k: sizes(folder / weights_file(k)) for k in range(K)}
    return index({weights_file(k): {name: size for name, size in own[k].items() if not is_head(name, k)} for k in range(K)})
