"""Cuts a text into windows of tokens for a language model: a file, or the language reference that comes with Python."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delock.data.alphabet import Alphabet
from delock.data.hashing import splitmix64
from delock.data.loader import Loader
from delock.errors import UsageError
from delock.keys import key

Level = Literal["char", "byte"]
Tokens = NDArray[Any]  # (N,) of the smallest unsigned type that holds the alphabet


@dataclass(frozen=True)
class TextData:
    """Holds a text, ready to train on: inputs are tokens (B, context) int64, targets (B, context) int64 the token after each of them."""

    train: Loader
    test: Loader
    alphabet: Alphabet
    context: int
    name: str

    @property
    def vocabulary(self) -> int:
        """Returns the number of different tokens."""
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """Returns the tokens of a text, as `Alphabet.encode` does."""
        return self.alphabet.encode(text)

    def decode(self, tokens: Tensor) -> str:
        """Returns the text of tokens, as `Alphabet.decode` does."""
        return self.alphabet.decode(tokens)


class RandomWindows:
    """Loads windows that begin anywhere in the text: sample i of epoch e begins at a place that follows from (seed, e, i) alone.

    Every batch is full. A pickle of the loader holds the text.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, batches: int, seed: int) -> None:
        self.tokens, self.context, self.batch_size, self.batches, self.seed = tokens, context, batch_size, batches, seed

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int]:
        return [self.batch_size] * self.batches

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch_key, places = key(self.seed, "text", e), np.uint64(len(self.tokens) - self.context)
        for b in range(self.batches):
            samples = np.arange(b * self.batch_size, (b + 1) * self.batch_size)
            yield _windows(self.tokens, (splitmix64(epoch_key, samples) % places).astype(np.int64), self.context)


class Passages:
    """Loads windows that follow one another without overlap, the same in every epoch; the last batch holds the remaining windows.

    Every token but the first is a target once. A last window that is not full is left out: so all windows are of one length, and
    the mean over samples that an evaluation takes is the mean over tokens. A pickle of the loader holds the text.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int) -> None:
        self.tokens, self.context, self.batch_size = tokens, context, batch_size
        self.windows = (len(tokens) - 1) // context

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def sizes(self) -> list[int]:
        return [min(self.batch_size, self.windows - i) for i in range(0, self.windows, self.batch_size)]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, self.windows, self.batch_size):
            starts = np.arange(i, min(i + self.batch_size, self.windows)) * self.context
            yield _windows(self.tokens, starts, self.context)


def load_text(
    path: str | Path | None = None,
    *,
    level: Level = "char",
    context: int,
    batch_size: int,
    seed: int = 0,
    test_fraction: float = 0.1,
    batches_per_epoch: int | None = None,
    test_batch_size: int | None = None,
) -> TextData:
    """Returns the text of a file as a training and a validation loader; validation reads the last `test_fraction` of the tokens.

    path: a text file; None is the embedded text, the language reference that Python prints in help() (`pydoc_data.topics`, 465,000
    characters under 3.11). It differs between Python versions, and so do results on it; `TextData.name` includes the version.
    level: "char" makes the characters that occur in the text the tokens; the file must be UTF-8, and line ends stay as they are. "byte"
    reads any file as 256 different tokens.
    context: the number of tokens in a window.
    seed: decides the training windows; the validation windows are always the same (see RandomWindows and Passages).
    batches_per_epoch: by default an epoch reads about as many tokens as the training text has.
    test_batch_size: by default batch_size.
    Raises UsageError for a file that is missing, empty, or not UTF-8, a context longer than either part, and numbers out of range.
    """
    _check_numbers(context=context, batch_size=batch_size, batches_per_epoch=batches_per_epoch, test_batch_size=test_batch_size)
    if not 0 < test_fraction < 1:
        raise UsageError(f"the test fraction must lie between 0 and 1, not {test_fraction}: 0.1 keeps a tenth of the text for validation")
    raw, name = _embedded() if path is None else _read(Path(path))
    alphabet, tokens = _tokens(raw, level, name)
    end = int(len(tokens) * (1 - test_fraction))
    train, test = tokens[:end], tokens[end:]
    longest = min(len(train), len(test)) - 1  # a window is predicted up to the token after it
    if context > longest:
        remedy = f"a context of at most {longest}, or a longer text" if longest > 0 else "a longer text"
        raise UsageError(
            f"a context of {context} is too long for {name}: of its {len(tokens)} tokens {len(train)} are for training and {len(test)} "
            f"for validation, and each part must be longer than the context. Use {remedy}"
        )
    batches = batches_per_epoch or max(1, round(len(train) / (context * batch_size)))
    return TextData(
        RandomWindows(train, context, batch_size, batches, seed),
        Passages(test, context, test_batch_size or batch_size),
        alphabet,
        context,
        name,
    )


def _windows(tokens: Tokens, starts: NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    places = starts[:, None] + np.arange(context)  # (B, T)
    return torch.from_numpy(tokens[places].astype(np.int64)), torch.from_numpy(tokens[places + 1].astype(np.int64))


def _tokens(raw: bytes, level: Level, name: str) -> tuple[Alphabet, Tokens]:
    if level == "byte":
        return Alphabet(None), np.frombuffer(raw, np.uint8)
    if level != "char":
        raise UsageError(f"unknown level {level!r}: tokens are characters (char) or bytes (byte)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8: its byte {raw[error.start]:#04x} at offset {error.start} is part of no character. "
            "Convert it to UTF-8, or read it by bytes (level byte)"
        ) from error
    alphabet = Alphabet("".join(sorted(set(text))))
    return alphabet, alphabet.encode(text).numpy().astype(np.min_scalar_type(len(alphabet) - 1))


def _read(path: Path) -> tuple[bytes, str]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"text file {path} does not exist: give the path of a text, or none for the text inside Python") from error
    except OSError as error:  # a directory, no permission
        raise UsageError(f"text file {path} cannot be read: {error.strerror}. Give the path of a text that you may read") from error
    if not raw:
        raise UsageError(f"text file {path} is empty: give one with a text in it")
    return raw, path.name


def _embedded() -> tuple[bytes, str]:
    try:
        from pydoc_data.topics import topics  # here: half a megabyte that only this reader needs
    except ImportError as error:
        raise UsageError("this Python was installed without pydoc_data, the embedded text: give the path of a text file") from error
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    return text.encode(), f"pydoc_data.topics of Python {platform.python_version()}"


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {number}")
