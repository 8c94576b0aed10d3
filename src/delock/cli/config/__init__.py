"""Holds the options of commands as typed values with the same names on the command line and in a TOML file. It loads no torch."""

from delock.cli.config import toml
from delock.cli.config.defaults import either, resolved, shown
from delock.cli.config.flat import build, flat, override, table
from delock.cli.config.kinds import is_own, is_text, other_kind_options, tokens
from delock.cli.config.options import (
    AlgorithmOptions,
    BatchOptions,
    CompareConfig,
    DatasetOptions,
    LanguageOptions,
    NetworkOptions,
    TrainConfig,
)
from delock.cli.config.resolve import check_ranges, chosen, make_method, resolve
from delock.cli.config.update import UpdateOptions

__all__ = [
    "AlgorithmOptions",
    "BatchOptions",
    "CompareConfig",
    "DatasetOptions",
    "LanguageOptions",
    "NetworkOptions",
    "TrainConfig",
    "UpdateOptions",
    "build",
    "check_ranges",
    "chosen",
    "either",
    "flat",
    "is_own",
    "is_text",
    "make_method",
    "other_kind_options",
    "override",
    "resolve",
    "resolved",
    "shown",
    "table",
    "tokens",
    "toml",
]
