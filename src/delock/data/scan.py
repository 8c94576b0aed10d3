"""Lists the images of a directory in ImageNet's layout, without opening one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from delock.errors import UsageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Listing:
    """Lists the images of one part, training or test."""

    classes: list[str]  # sorted
    files: list[Path]  # sorted by class and name
    labels: Tensor  # (N,) int64
    stamp: str  # name, size in bytes and date of every file


def scan(directory: Path) -> tuple[Listing, Listing]:
    """Returns the training and the test images; the test images are those of DIR/test, or of DIR/val if there is no DIR/test.

    Raises UsageError for a missing directory, a missing or empty class, and classes that differ between the two parts.
    """
    if not directory.is_dir():
        raise UsageError(f"data directory {directory} does not exist (or is no directory): expected one with train/CLASS/*.jpg in it")
    parts = [directory / "train", next((p for p in (directory / "test", directory / "val") if p.is_dir()), directory / "test")]
    for part in parts:
        if not part.is_dir():
            raise UsageError(f"{directory} has no {part.name} directory: expected train/CLASS/*.jpg and test/CLASS/*.jpg (or val)")
    train, test = (_listing(part) for part in parts)
    if train.classes != test.classes:
        raise UsageError(_difference(parts[0], train.classes, parts[1], test.classes))
    return train, test


def _listing(part: Path) -> Listing:
    classes = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UsageError(f"{part} holds no class: expected one directory per class, with its images in it")
    files: list[Path] = []
    labels: list[int] = []
    stamp: list[str] = []
    for label, name in enumerate(classes):
        found = sorted(_stamps(part / name))
        if not found:
            raise UsageError(f"class directory {part / name} holds no image ({', '.join(SUFFIXES)})")
        files += [part / name / file for file, _ in found]
        labels += [label] * len(found)
        stamp += [f"{name}/{file}\t{facts}" for file, facts in found]
    return Listing(classes, files, torch.tensor(labels), "\n".join(stamp))


def _stamps(directory: Path) -> list[tuple[str, str]]:
    """Returns (name, "bytes date") of each image."""
    stamps = []
    for entry in os.scandir(directory):
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file():
            facts = entry.stat()
            stamps.append((entry.name, f"{facts.st_size}\t{facts.st_mtime_ns}"))
    return stamps


def _difference(train: Path, ours: list[str], test: Path, theirs: list[str]) -> str:
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    facts = [f"{test} lacks {', '.join(missing[:3])}"] if missing else []
    facts += [f"{train} lacks {', '.join(extra[:3])}"] if extra else []
    return f"training and test images must have the same classes: {'; '.join(facts)}"
