"""Makes what a config names: data, network, loss and metrics, for images and for text. Its functions load torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from delock.cli.config import TrainConfig, UpdateOptions, is_text, resolved
from delock.cli.summary import measure
from delock.methods import Method

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from delock.data import Data, TextData
    from delock.optim.rates import Schedule


def load_data(config: TrainConfig, on_progress: Callable[[int, int], None] | None = None) -> Data | TextData:
    """Returns the data set of a resolved config."""
    from delock.data import load, load_text

    options, seed = config.dataset, config.training.seed
    if is_text(config):
        return load_text(
            config.language.text,
            level=resolved(config.language.level),
            context=resolved(config.language.context),
            batch_size=resolved(options.batch_size),
            seed=seed,
            test_batch_size=options.test_batch_size,
        )
    return load(
        options.data,
        data_dir=options.data_dir,
        batch_size=resolved(options.batch_size),
        seed=seed,
        download=options.download,
        augment=options.augment,
        image_size=options.image_size,
        limit=options.limit,
        test_batch_size=options.test_batch_size,
        on_progress=on_progress,
    )


def build_model(config: TrainConfig, data: Data | TextData) -> nn.Module:
    """Returns the network of a resolved config, for this data."""
    from delock.data import TextData
    from delock.nets import build

    if isinstance(data, TextData):
        return build_gpt(config, data.vocabulary)
    network = config.network
    return build(
        resolved(network.model),
        classes=data.classes,
        in_channels=data.channels,
        image_size=data.image_size,
        dropout=network.dropout,
        seed=config.training.seed,
    )


def build_gpt(config: TrainConfig, vocabulary: int) -> nn.Sequential:
    """Returns the language model of a resolved config."""
    from delock.nets import gpt

    size = config.language
    return gpt(
        vocabulary,
        depth=resolved(size.depth),
        width=resolved(size.width),
        heads=resolved(size.attention_heads),
        context=resolved(size.context),
        dropout=config.network.dropout,
        seed=config.training.seed,
    )


def goals(config: TrainConfig) -> tuple[Callable[[Any, Any], Any], dict[str, Callable[[Any, Any], Any]]]:
    """Returns the loss, and the metrics by name."""
    from torch.nn.functional import cross_entropy

    from delock.nets import bits, nats
    from delock.recipes import accuracy

    return (nats, {measure(config): bits}) if is_text(config) else (cross_entropy, {measure(config): accuracy})


def optimizer_factory(options: UpdateOptions) -> Callable[..., Optimizer]:
    """Returns the factory of a resolved config's optimizer, with its corrections; a stage's facts are asked for where they count."""
    from delock.recipes import SGD, Adam, AdamW, NAdamW, error_feedback, muon, scadamw, scsgd, soap

    lr, decay, spike = resolved(options.lr), resolved(options.weight_decay), "spike" in options.correct
    betas = options.beta1 or 0.0, options.beta2 or 0.0  # sgd has none
    momentum = options.momentum or 0.0
    made: Callable[..., Optimizer]
    match resolved(options.optimizer):
        case "sgd":
            made = scsgd(lr, momentum, decay) if spike else SGD(lr, momentum, decay, options.nesterov)
        case "adam":
            made = Adam(lr, decay, betas)
        case "adamw":
            made = scadamw(lr, betas, decay) if spike else AdamW(lr, decay, betas)
        case "nadamw":
            made = NAdamW(lr, decay, betas)
        case "muon":
            made = muon(lr, decay, betas=betas)
        case "soap":
            made = soap(lr, betas, decay)
    return error_feedback(made) if "feedback" in options.correct else made


def recipe(config: TrainConfig, method: Method, epoch: int, batches: int) -> tuple[Callable[..., Optimizer], Schedule]:
    """Returns optimizer and schedule of a resolved config, for a run of `batches` with `epoch` batches per epoch."""
    from delock.optim.rates import Schedule

    options = config.training

    def updates(count: float) -> int:
        return math.ceil(count / method.batches_per_update)

    milestones = tuple(sorted(updates(at * epoch) for at in options.milestones))
    schedule = Schedule(options.schedule, updates(batches), updates(resolved(options.warmup)), milestones, options.gamma)
    return optimizer_factory(config.update), schedule
