"""What a run is told, as typed values with the same names on the command line and in a TOML file. No torch."""

from delock.config import toml
from delock.config.flat import build, flat, override, table
from delock.config.kinds import foreign, is_text, known, tokens
from delock.config.options import (
    AlgorithmOptions,
    CompareConfig,
    DatasetOptions,
    LanguageOptions,
    NetworkOptions,
    TrainConfig,
    either,
    shown,
)
from delock.config.resolve import make_method, refuse_below, resolve

__all__ = [
    "AlgorithmOptions",
    "CompareConfig",
    "DatasetOptions",
    "LanguageOptions",
    "NetworkOptions",
    "TrainConfig",
    "build",
    "either",
    "flat",
    "foreign",
    "is_text",
    "known",
    "make_method",
    "override",
    "refuse_below",
    "resolve",
    "shown",
    "table",
    "tokens",
    "toml",
]
