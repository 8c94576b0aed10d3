"""Defines the rows of a comparison: `adl:accumulate=2:lr=0.2` is a method, its options, and training options for this row only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from delock.cli.config import CompareConfig, TrainConfig, build, flat, override, resolve, table
from delock.cli.config.flat import hint
from delock.cli.config.options import ComparisonOptions
from delock.cli.config.resolve import can_be_ahead
from delock.codecs import CODECS, settings
from delock.errors import UsageError
from delock.methods import METHODS

PLAIN = "plain"
CODEC = tuple(name for codec in CODECS.values() for name in settings(codec))
OWN = ("algorithm", "training", "update", "compression")  # groups of which a row may say something of its own
SHARED = ("method", "epochs", "batches", "eval_every", "seed")  # what makes rows comparable is not a row's own


@dataclass(frozen=True)
class Row:
    """Holds one run of a comparison: its name and its config."""

    name: str
    config: TrainConfig

    @property
    def folder(self) -> str:
        """Returns the name as the name of a folder."""
        return re.sub(r"[^\w.+=-]+", "-", self.name)


def rows(config: CompareConfig) -> list[Row]:
    """Returns the chosen runs, plain PyTorch first.

    Raises UsageError for a method or an option that does not exist, does not fit, or comes twice.
    """
    common = {name: value for name, value in flat(config).items() if name not in ComparisonOptions.__dataclass_fields__}
    common["checkpoint"] = False  # a row that is cut off is trained anew
    words = [word for item in config.comparison.methods for word in re.split(r"[,\s]+", item) if word]
    if not words:
        raise UsageError("there is nothing to compare: give --methods bp,fdg or more")
    for word in words:
        if words.count(word) > 1 or word == PLAIN:
            raise UsageError(f"the row {word} comes twice" if word != PLAIN else "the row plain comes by itself; --no-plain leaves it out")
    shared = {**common, "horizon": None} if "spike" not in common["correct"] and any(map(_own_spike, words)) else common
    found = [Row(word, _config(word, common if _own_spike(word) else shared)) for word in words]
    if config.comparison.plain:
        K = found[0].config.network.stages
        workers = config.machine.workers
        threads = config.placement.threads * (K or 1 if workers == "processes" else 1)
        # More threads than cores hold each other up, and a plain row slowed down so would flatter all the others.
        most = max(config.placement.threads, usable_cores())
        uncut = {"method": "bp", "head": None, "codec": "none", "error_codec": "none", "stages": 1, "correct": _not_ahead(common)}
        plain = override(shared, {**uncut, "threads": min(threads, most)})
        found.insert(0, Row(PLAIN, resolve(build(TrainConfig, plain, PLAIN))))
    return found


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cut_alike(row: Row, cuts: tuple[int | str, ...]) -> Row:
    """Returns the row with these cuts, if it has stages to cut."""
    return replace(row, config=replace(row.config, network=replace(row.config.network, cuts=cuts))) if row.name != PLAIN else row


def _config(word: str, common: Mapping[str, Any]) -> TrainConfig:
    name, *settings = word.split(":")
    if not name:
        raise UsageError(f"the row {word!r} names no method: write one in front, as in fdg:beta=0.5")
    given: dict[str, Any] = {"method": name}
    if name in METHODS and not METHODS[name].local_losses:
        given["head"] = None  # said of the rows with local losses
    behind = _said(word).get("behind", common.get("behind")) or 0
    if name in METHODS and not can_be_ahead(name, behind=str(behind) != "0"):
        given["correct"] = _not_ahead(common)  # said of the rows that have it
    if _own_spike(word) and "horizon" in common:
        given["horizon"] = common["horizon"]  # said of the rows that have spike
    seen = set[str]()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if "codec" in given and key in CODEC:  # what follows codec=vq may be settings of its own
            given["codec"] += f":{setting}"
            continue
        if not equals:
            raise UsageError(f"{word}: {setting!r} is not a setting; write key=value, as in adl:accumulate=2")
        option = key.replace("-", "_")
        if option in seen:
            raise UsageError(f"{word}: {key} is given twice")
        seen.add(option)
        given[option] = _value(word, option, value)
    try:
        return resolve(build(TrainConfig, override(common, given), word))
    except UsageError as error:
        text = str(error)
        named = text.startswith(f"{word}:") or text == _wrong_for_all(common)
        raise UsageError(text if named else f"{word}: {text}") from None


def _said(word: str) -> dict[str, str]:
    """Returns what a row says itself, by the names of options."""
    return dict(setting.split("=", 1) for setting in word.split(":") if "=" in setting)


def _own_spike(word: str) -> bool:
    """Returns True for a row that says itself that it has spike compensation."""
    return "spike" in _said(word).get("correct", "").split("+")


def _wrong_for_all(common: Mapping[str, Any]) -> str | None:
    """Returns the error that bp has too, with the options that all rows share."""
    try:
        resolve(build(TrainConfig, override(common, {"method": "bp", "head": None, "correct": _not_ahead(common)}), "bp"))
    except UsageError as error:
        return str(error)
    return None


def _not_ahead(common: Mapping[str, Any]) -> list[str]:
    return [one for one in common["correct"] if one != "ahead"]


def _value(word: str, key: str, text: str) -> Any:
    """Returns a setting's text as a value for its option, a list joined by +. Text that does not fit stays text, for `build` to refuse."""
    own = {name: option for name, option in table(TrainConfig).items() if option.group in OWN}
    free = {name: option for name, option in own.items() if name not in SHARED}
    if key not in free:
        why = "is the same for all rows" if key in table(TrainConfig) else "does not exist"
        raise UsageError(f"{word}: the option {key!r} {why}{hint(key, free, repr)}")
    kind = free[key].kind
    kinds = [one for one in (kind, *get_args(kind)) if one is not type(None)]
    if any(get_origin(one) is tuple for one in kinds):
        return [_number(part) for part in text.split("+") if part]
    if bool in kinds:
        return {"true": True, "false": False}.get(text, text)
    return _number(text)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
