"""Turns text into tokens and back: the characters that occur in it, or the 256 bytes of UTF-8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delock.errors import UsageError


@dataclass(frozen=True)
class Alphabet:
    """Maps tokens to characters: token i is characters[i], sorted by code point; with characters=None, token i is byte i of UTF-8.

    Saving the string `characters` saves the alphabet. Raises UsageError for characters that are missing, unsorted or repeated.
    """

    characters: str | None

    def __post_init__(self) -> None:
        if self.characters is not None and (not self.characters or list(self.characters) != sorted(set(self.characters))):
            raise UsageError("an alphabet needs at least one character, and all of them sorted, each once: ''.join(sorted(set(text)))")

    def __len__(self) -> int:
        return 256 if self.characters is None else len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Returns the tokens of a text, (N,) int64. Raises UsageError for a character that is not in the alphabet."""
        if self.characters is None:
            return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.int64)
        codes, known = _code_points(text), _code_points(self.characters)
        tokens = np.minimum(np.searchsorted(known, codes), len(known) - 1)  # past the end: any token, the check below finds it
        strange = np.flatnonzero(known[tokens] != codes)
        if len(strange):
            raise UsageError(
                f"the character {text[strange[0]]!r} does not occur in the training text, so the model has no token for it: "
                "leave it out, or train by bytes (level byte)"
            )
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Returns the text of tokens (N,). Byte sequences that are not UTF-8, which a model may well generate, become U+FFFD."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        if self.characters is None:
            return bytes(numbers).decode("utf-8", "replace")
        return "".join(self.characters[i] for i in numbers)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
