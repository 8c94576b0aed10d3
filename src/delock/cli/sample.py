"""`delock sample`: writes text with a language model that `delock train` has trained, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from unicodedata import category

from delock.cli import kept_run
from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, check_ranges, is_text, resolved, shown
from delock.cli.config.small_file import json_object
from delock.cli.models.facts import Facts
from delock.cli.run_folder import ALPHABET
from delock.cli.workload import build_for
from delock.errors import UsageError
from delock.keys import MOST_SEED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from delock.data import Alphabet

ABOUT = """Print text from the language model of a run. RUN is the run's folder.

A terminal gets control characters as \\x1b; a file or a pipe gets the text as it is.

examples:
  delock train --data text --out runs/manual
  delock sample runs/manual
  delock sample runs/manual --prompt "The import statement" --tokens 200
  delock sample runs/manual --checkpoint batch-00000500
  delock sample runs/manual --temperature 0.5 --top-k 10 --seed 1"""


@dataclass(frozen=True)
class SampleOptions:
    """Holds the options of the text; the same options give the same text."""

    prompt: Annotated[str | None, shown("a line break, not shown")] = None
    """Text to go on from."""
    tokens: int = 500
    """Characters to write, or bytes where the model was trained by bytes."""
    temperature: float = 0.8
    """1 draws as the model has learned; below, likely tokens come more often, above, less often."""
    top_k: Annotated[int | None, shown("all")] = None
    """Draw from this number of likeliest tokens only."""
    seed: int = 0
    """Seed of the draws."""
    checkpoint: Annotated[str | None, shown("the latest")] = None
    """Name of a checkpoint, or final for the weights at the run's end."""


@dataclass(frozen=True)
class SampleConfig:
    """Holds the options of `delock sample`."""

    sample: SampleOptions = field(default_factory=SampleOptions)


def run(words: Sequence[str]) -> int:
    """Parses, reads the run, writes text, and returns the exit code."""
    path = Path(words[0]) if words and not words[0].startswith("-") else None
    options = parse(SampleConfig, words[1:] if path else words, "sample RUN", ABOUT).sample
    if path is None:
        raise UsageError("say first which run: delock sample RUN, with the folder that delock train has made")
    _check(options)
    config, alphabet = read_config(path), read_alphabet(path)
    begin = alphabet.encode(options.prompt or beginning(alphabet))  # (T,)
    kept, text = kept_run.weights(path, options.checkpoint), decoder(alphabet)
    for note in kept.notes:
        print(note, file=sys.stderr)
    model = read_network(kept.path, config, len(alphabet))
    shown = printable if sys.stdout is not None and sys.stdout.isatty() else str
    print(shown(options.prompt or ""), end="", flush=True)
    for token in draws(model, begin, resolved(config.language.context), options):
        print(shown(text(token)), end="", flush=True)
    print(shown(text(None)))
    return 0


def printable(text: str) -> str:
    """Returns a text as a terminal may get it: control characters but line breaks and tabs, which could be commands to it, as \\x1b."""
    return "".join(f"\\x{ord(one):02x}" if category(one) == "Cc" and one not in "\n\t" else one for one in text)


def _check(options: SampleOptions) -> None:
    check_ranges({"tokens": (options.tokens, 1), "top-k": (options.top_k, 1), "seed": (options.seed, 0, MOST_SEED)})
    if not 0 < options.temperature < float("inf"):
        raise UsageError(f"temperature is {options.temperature:g}, but it must be above 0; --top-k 1 takes the likeliest token every time")


def read_config(run: Path) -> TrainConfig:
    """Returns the config of a run that has trained a language model. Raises UsageError for any other folder."""
    config = kept_run.read_config(run)
    if not is_text(config):
        trained = f"{config.network.model} on {config.dataset.data}"
        raise UsageError(f"{run} trained {trained}, and only a language model writes text: train one with --data text")
    return config


def read_alphabet(run: Path) -> Alphabet:
    """Returns the alphabet of the model's tokens."""
    from delock.data import Alphabet

    path = run / ALPHABET
    try:
        characters = json_object(path)["characters"]
        if characters is not None and not isinstance(characters, str):
            raise ValueError("its characters are no text")
        return Alphabet(characters)
    except KeyError:
        raise UsageError(f"cannot read the alphabet of the run, {path}: it has no characters; restore it, or train again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the alphabet of the run, {path}: {error}; restore it, or train again") from None


def read_network(place: Path, config: TrainConfig, vocabulary: int) -> nn.Module:
    """Returns the trained network."""
    return kept_run.filled(lambda: build_for(config, Facts(vocabulary=vocabulary, context=config.language.context)), config, place)


def beginning(alphabet: Alphabet) -> str:
    """Returns the token before a text without a prompt: a line break, or the first character of an alphabet without one."""
    return "\n" if alphabet.characters is None or "\n" in alphabet.characters else alphabet.characters[0]


def draws(model: nn.Module, begin: Tensor, context: int, options: SampleOptions) -> Iterator[int]:
    """Yields the tokens after those of the prompt (T,), each as soon as it is drawn."""
    import torch

    from delock.nets import generate

    generator = torch.Generator().manual_seed(options.seed)
    tokens = begin[None]  # (1, T)
    for _ in range(options.tokens):
        seen = tokens[:, -context:]
        tokens = generate(model, seen, 1, generator=generator, temperature=options.temperature, top_k=options.top_k, context=context)
        yield int(tokens[0, -1])


def decoder(alphabet: Alphabet) -> Callable[[int | None], str]:
    """Returns a function from token after token to text, where a byte may be only part of a character; None ends the text."""
    from codecs import getincrementaldecoder

    if alphabet.characters is not None:
        return lambda token: "" if token is None else alphabet.decode([token])
    utf8 = getincrementaldecoder("utf-8")("replace")
    return lambda token: utf8.decode(b"", final=True) if token is None else utf8.decode(bytes([token]))
