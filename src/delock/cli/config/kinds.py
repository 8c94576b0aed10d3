"""Gives images and text defaults of their own, and refuses options of the other kind."""

from __future__ import annotations

from delock.cli.config.defaults import IMAGES, TEXT
from delock.cli.config.flat import build, flat
from delock.cli.config.options import TrainConfig
from delock.cli.config.update import DECAY, DECAY_OF_TEXT, DECOUPLED
from delock.cli.models.names import TORCHVISION, is_elsewhere, is_file, reads_text, split
from delock.errors import UsageError

OF_IMAGES = ("data_dir", "download", "augment", "image_size", "limit")
OF_TEXT = ("text", "level", "context")
OF_GPT = ("depth", "width", "attention_heads")


def is_text(config: TrainConfig) -> bool:
    """Returns True if a language model is trained."""
    return config.dataset.data == "text"


def tokens(config: TrainConfig) -> int | None:
    """Returns the number of tokens in a sample of text; None for images."""
    return config.language.context if is_text(config) else None


def is_own(config: TrainConfig) -> bool:
    """Returns True if a function of the user's returns the data."""
    return is_file(config.dataset.data)


def other_kind_options(config: TrainConfig) -> tuple[str, ...]:
    """Returns the options, by flat name, that mean nothing for this kind of data and this model."""
    gpt = () if is_text(config) and config.network.model in (None, "gpt") else OF_GPT
    return (*(OF_IMAGES if is_text(config) or is_own(config) else ()), *(() if is_text(config) else OF_TEXT), *gpt)


def settle(config: TrainConfig) -> TrainConfig:
    """Returns the config with the defaults of its kind of data.

    Raises UsageError for options of the other kind, and for a model that does not read such data.
    """
    _refuse_mixture(config)
    given = flat(config)
    defaults = dict(TEXT if is_text(config) else IMAGES)
    if "batches" in given:
        del defaults["epochs"]
    unfit = other_kind_options(config)
    values = {name: value for name, value in defaults.items() if name not in unfit} | given
    values.setdefault("weight_decay", DECAY_OF_TEXT if is_text(config) and values["optimizer"] in DECOUPLED else DECAY)
    return build(TrainConfig, values, "options")


def _refuse_mixture(config: TrainConfig) -> None:
    data, model, given, usual = config.dataset.data, config.network.model, flat(config), flat(TrainConfig())
    unfit = [name for name in other_kind_options(config) if given.get(name) != usual.get(name)]
    _refuse_files(config)
    if model is not None and (is_elsewhere(model) or model.startswith(TORCHVISION)) and config.network.dropout:
        raise UsageError(f"dropout is an option of Delock's own networks, and the model is {model}: leave it out")
    if is_text(config) and model is not None and not reads_text(model):
        only = "which only the models gpt, hf/CONFIG and FILE.py:FUNCTION read"
        raise UsageError(f"model is {model}, but the data is text, {only}: leave it out, or use other data")
    if model == "gpt" and not is_text(config):
        raise UsageError(f"the model gpt reads text, but the data is {data}: use --data text, or another model")
    if unfit:
        raise _unfit(unfit[0], config)


def _unfit(option: str, config: TrainConfig) -> UsageError:
    """Returns the error for an option of another kind of data or model."""
    flag, data = option.replace("_", "-"), config.dataset.data
    if option in OF_IMAGES:
        return UsageError(f"{flag} is an option of images, and the data is {data}: leave it out")
    if option in OF_GPT and is_text(config):
        return UsageError(f"{flag} is an option of the model gpt, and the model is {config.network.model}: leave it out")
    return UsageError(f"{flag} is an option of language models, and the data is {data}: use --data text, or leave it out")


def _refuse_files(config: TrainConfig) -> None:
    """Raises UsageError for a file without a function, and for two files that one module would stand for."""
    files = [split(name)[0] for name in (config.network.model, config.dataset.data) if name is not None and is_file(name)]
    if len(files) == 2 and files[0].stem == files[1].stem and files[0].resolve() != files[1].resolve():
        raise UsageError(f"{files[0]} and {files[1]} are two files of one name: rename one of them")
