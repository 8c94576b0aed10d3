"""Makes what a config names: data, network, loss and metrics, for images, for text and for the user's own. Its functions load torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from delock.cli.config import DatasetOptions, TrainConfig, UpdateOptions, is_own, is_text, resolved
from delock.cli.config.defaults import IMAGES
from delock.cli.models.facts import SIZES, Facts, OwnData, facts, wanted
from delock.cli.models.names import HF, TIMM, TORCHVISION, is_elsewhere, is_file
from delock.cli.summary import measure
from delock.errors import UsageError
from delock.methods import Method

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from delock.cli.models.facts import Loaded
    from delock.optim.rates import Schedule


def load_data(config: TrainConfig, on_progress: Callable[[int, int], None] | None = None) -> Loaded:
    """Returns the data set of a resolved config."""
    from delock.data import load, load_text

    options, seed = config.dataset, config.training.seed
    if is_own(config):
        from delock.cli.models.own_data import load_own

        usual = {"batch_size": IMAGES["batch_size"], "test_batch_size": DatasetOptions().test_batch_size}
        return load_own(
            options.data, seed, {name: (getattr(options, name), value) for name, value in usual.items()}, config.training.batches
        )
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


def build_model(config: TrainConfig, data: Loaded) -> nn.Module:
    """Returns the network of a resolved config, for this data."""
    return build_for(config, facts(data))


def build_for(config: TrainConfig, of: Facts) -> nn.Module:
    """Returns the network of a resolved config, for data of which these facts are known."""
    from delock.nets import MODELS, build

    model, seed = resolved(config.network.model), config.training.seed
    if is_file(model):
        return _built_by_the_user(model, of, seed)
    if model.startswith(HF):
        from delock.cli.models.hugging_face import build_hf

        return build_hf(model, of, seed, "own" if is_own(config) else "text" if is_text(config) else "images")
    if model.startswith((TIMM, TORCHVISION)) and model not in MODELS:
        from delock.cli.models.vision import build_vision

        return build_vision(model, of, seed)
    if is_text(config):
        return build_gpt(config, wanted(model, of, "vocabulary")["vocabulary"])
    known = wanted(model, of, *SIZES) if model in MODELS else dict.fromkeys(SIZES, 1)  # `build` refuses an unknown name
    size = {"in_channels": known["channels"], "image_size": known["image_size"]}
    return build(model, classes=known["classes"], **size, dropout=config.network.dropout, seed=seed)


def _built_by_the_user(model: str, of: Facts, seed: int) -> nn.Module:
    from torch import nn

    from delock.cli.models.own_code import call
    from delock.data.seeding import seeded
    from delock.partition.wrappers import unwrapped

    with seeded(seed):
        made = call(model, of.known())
    if not isinstance(made, nn.Module):
        raise UsageError(f"{model} returned a {type(made).__name__}, but it must return a torch.nn.Module")
    return unwrapped(made)


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


def goals(config: TrainConfig, data: Loaded) -> tuple[Any, dict[str, Callable[[Any, Any], Any]]]:
    """Returns the loss, None where the model computes its own, and the metrics by name."""
    if isinstance(data, OwnData):
        return data.loss, {}
    from torch.nn.functional import cross_entropy

    from delock.nets import OfLogits, bits, nats
    from delock.recipes import accuracy

    loss, metric = (nats, bits) if is_text(config) else (cross_entropy, accuracy)
    if is_elsewhere(config.network.model):
        return OfLogits(loss), {measure(config): OfLogits(metric)}
    return loss, {measure(config): metric}


def optimizer_factory(options: UpdateOptions) -> Callable[..., Optimizer]:
    """Returns the factory of a resolved config's optimizer, with its corrections; a stage's facts are asked for where they count."""
    from delock.recipes import SGD, Adam, AdamW, NAdamW, error_feedback, muon, scadamw, scsgd, soap

    lr, decay, spike = resolved(options.lr), resolved(options.weight_decay), "spike" in options.correct
    betas = options.beta1 or 0.0, options.beta2 or 0.0  # sgd has none
    momentum, r = options.momentum or 0.0, options.horizon or 0.0  # without spike there is no horizon
    made: Callable[..., Optimizer]
    match resolved(options.optimizer):
        case "sgd":
            made = scsgd(lr, momentum, decay, r) if spike else SGD(lr, momentum, decay, options.nesterov)
        case "adam":
            made = Adam(lr, decay, betas)
        case "adamw":
            made = scadamw(lr, betas, decay, r) if spike else AdamW(lr, decay, betas)
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

    def updates(count: Fraction | int) -> int:
        return math.ceil(Fraction(count, method.batches_per_update))

    milestones = tuple(sorted(updates(Fraction(str(at)) * epoch) for at in options.milestones))  # 1.1 x 50 is 55, and not a little more
    schedule = Schedule(options.schedule, updates(batches), updates(resolved(options.warmup)), milestones, options.gamma, options.floor)
    return optimizer_factory(config.update), schedule
