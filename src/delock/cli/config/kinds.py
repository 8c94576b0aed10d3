"""Gives images and text defaults of their own, and refuses options of the other kind."""

from __future__ import annotations

from delock.cli.config.defaults import IMAGES, TEXT
from delock.cli.config.flat import build, flat
from delock.cli.config.options import LanguageOptions, TrainConfig
from delock.cli.config.update import DECAY, DECAY_OF_TEXT, DECOUPLED
from delock.errors import UsageError

OF_IMAGES = ("data_dir", "download", "augment", "image_size", "limit")
OF_TEXT = tuple(LanguageOptions.__dataclass_fields__)


def is_text(config: TrainConfig) -> bool:
    """Returns True if a language model is trained."""
    return config.dataset.data == "text"


def tokens(config: TrainConfig) -> int | None:
    """Returns the number of tokens in a sample of text; None for images."""
    return config.language.context if is_text(config) else None


def other_kind_options(config: TrainConfig) -> tuple[str, ...]:
    """Returns the options, by flat name, that mean nothing for this kind of data."""
    return OF_IMAGES if is_text(config) else OF_TEXT


def settle(config: TrainConfig) -> TrainConfig:
    """Returns the config with the defaults of its kind of data.

    Raises UsageError for options of the other kind, and for a model that does not read such data.
    """
    _refuse_mixture(config)
    given = flat(config)
    defaults = dict(TEXT if is_text(config) else IMAGES)
    if "batches" in given:
        del defaults["epochs"]
    values = defaults | given
    values.setdefault("weight_decay", DECAY_OF_TEXT if is_text(config) and values["optimizer"] in DECOUPLED else DECAY)
    return build(TrainConfig, values, "options")


def _refuse_mixture(config: TrainConfig) -> None:
    data, model, given, usual = config.dataset.data, config.network.model, flat(config), flat(TrainConfig())
    unfit = [name.replace("_", "-") for name in other_kind_options(config) if given.get(name) != usual.get(name)]
    if is_text(config):
        if model not in (None, "gpt"):
            raise UsageError(f"model is {model}, but the data is text, which only the model gpt reads: leave it out, or use other data")
        if unfit:
            raise UsageError(f"{unfit[0]} is an option of images, and the data is text: leave it out")
        return
    if model == "gpt":
        raise UsageError(f"the model gpt reads text, but the data is {data}: use --data text, or another model")
    if unfit:
        raise UsageError(f"{unfit[0]} is an option of language models, and the data is {data}: use --data text, or leave it out")
