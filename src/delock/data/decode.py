"""Decodes image files into one uint8 tensor."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delock.data.source import OnProgress
from delock.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

CHUNK = 64  # files per task of the pool: enough to hide what a task costs, few enough to show progress


def decode(files: list[Path], image_size: int | None, on_progress: OnProgress | None = None) -> Tensor:
    """Returns the images as (N, 3, S, S) uint8, RGB, in the order of `files`; S is `image_size`, or the size of the first image.

    With an image_size, an image of another size is cut to a square about its centre and resized (bilinear, antialiased).
    on_progress(done, total): called with numbers of images while they are decoded.
    Raises UsageError for a file that is not a readable image and, without an image_size, for an image that is not square or not as
    large as the first.
    """
    size = image_size or _own_size(files[0])
    pixels = np.empty((len(files), 3, size, size), np.uint8)

    def fill(start: int) -> int:
        stop = min(start + CHUNK, len(files))
        for i in range(start, stop):
            pixels[i] = _read(files[i], size, resize=image_size is not None, first=files[0]).transpose(2, 0, 1)
        return stop

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: decoding releases the interpreter's lock
        try:
            for done in pool.map(fill, range(0, len(files), CHUNK)):
                if on_progress is not None:
                    on_progress(done, len(files))
        except BaseException:  # a broken image, or Ctrl-C: do not decode the rest first
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels)


def _own_size(file: Path) -> int:
    height, width, _ = _read(file, None, resize=False, first=file).shape
    if height != width:
        raise UsageError(f"{file} is {width} x {height}, not square: give --image-size to cut and resize all images")
    return int(height)


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    """Returns an image of 16 bits with their upper 8: Pillow would make all that is above 255 white.

    Raises UsageError for pixels that are deeper.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has at most 16
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = "whole numbers of 32 bits" if image.mode == "I" else "floating numbers"
        raise UsageError(f"the pixels of {file} are {what}, and what is white among them is not known: convert it to 8 or 16 bits")
    return image


def _read(file: Path, size: int | None, *, resize: bool, first: Path) -> NDArray[np.uint8]:
    """Returns one image as (H, W, 3) uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = _eight_bits(opened, file).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # raised by PIL's readers
        raise UsageError(f"cannot read the image {file}: {error}. Repair or remove it") from error
    if size is not None and image.size != (size, size):
        if not resize:
            raise UsageError(
                f"{file} is {image.width} x {image.height}, but {first} is {size} x {size}: give --image-size to resize all images"
            )
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
