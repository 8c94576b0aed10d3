"""Builds models of transformers from a config file or a folder, with the folder's weights, and writes folders that transformers loads.

Nothing is fetched but for hf/ORG/NAME, which the hub has, and no code of a folder is run: weights are safetensors alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from delock.cli.models.facts import Facts
from delock.cli.models.names import HF
from delock.data.seeding import seeded
from delock.errors import UsageError, said
from delock.nets.logits import logits
from delock.partition.layers import listed

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of the longest sequence
CLASSES = MappingProxyType({"text": "AutoModelForCausalLM", "images": "AutoModelForImageClassification"})


def build_hf(model: str, of: Facts, seed: int, kind: str) -> nn.Module:
    """Returns the model of hf/CONFIG, fitted to the facts of the data, in training mode.

    kind: text and images choose the class; for data of the user's the config names it (`architectures`). Weights are those of the folder,
    else random ones that follow from the seed. Raises UsageError for what transformers cannot read or build, and for facts that the
    folder's weights do not fit.
    """
    transformers = _imported(model)
    place = _place(model)
    with _quiet(transformers), seeded(seed):
        try:
            config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            known = _class(transformers, model, config, kind)
            has_weights = place.is_dir() and any((place / name).is_file() for name in WEIGHTS)
            heads_differ = _fit(model, config, of, has_weights=has_weights)
            if kind == "text":
                config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # they would be characters of the text
            config.use_cache = False  # what only generation needs would travel from stage to stage
            made: nn.Module
            told: Mapping[str, Any] = {}
            if has_weights:
                safe = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
                made, told = known.from_pretrained(place, config=config, dtype=torch.float32, ignore_mismatched_sizes=heads_differ, **safe)
            elif kind == "own":
                made = known._from_config(config, dtype=torch.float32)
            else:
                made = known.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{model} cannot be made by transformers: {said(error)}") from error
    made.train()
    _warn(model, [*told.get("missing_keys", ()), *(name for name, *_ in told.get("mismatched_keys", ()))])
    if kind == "text":
        _refuse_foresight(model, made, of)
    return made


def save(model: Any, name: str, target: Path) -> list[Path]:
    """Writes a folder from which transformers loads the model, and returns its files.

    Raises UsageError for a model that is not one of transformers, and for a target that exists.
    """
    if not hasattr(model, "save_pretrained"):
        raise UsageError(f"{name} is no model of transformers, so it cannot be written for from_pretrained: leave --hf out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists: give another --hf, or remove it")
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    import transformers

    with _quiet(transformers):
        model.save_pretrained(target)
    return sorted(path for path in target.iterdir() if path.is_file())


def _place(model: str) -> Path:
    """Returns the file or folder of a model, fetched from the hub if there is none here and the name is one of the hub's."""
    name = model.removeprefix(HF)
    place = Path(name)
    if place.is_file():
        return place
    if not place.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or place.suffix == ".json":
            raise UsageError(f"{model} names no file or folder here, nor a model of the hub, hf/ORG/NAME: give the path of a config.json")
        place = _from_hub(model, name)
    if not (place / "config.json").is_file():
        raise UsageError(f"{model} is a folder without a config.json: give the folder of a model of transformers")
    if not any((place / one).is_file() for one in WEIGHTS) and any(place.glob("*.bin")):
        raise UsageError(
            f"{model} has its weights as pickled files alone, which can run code and are not loaded: give {place / 'config.json'} to begin "
            "with random weights, or save the model with safetensors"
        )
    return place


def _from_hub(model: str, name: str) -> Path:
    """Returns the folder into which the hub's client has put a model; it is fetched once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        place = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        why = said(error).partition(": ")[2].split(" (")[0]
        raise UsageError(f"{model} is no file or folder here, and cannot be fetched from the hub: {why}") from error
    if not any((place / one).is_file() for one in WEIGHTS):
        raise UsageError(f"{model} has no safetensors on the hub, and pickled weights are not loaded: give a config.json on this machine")
    return place


def _class(transformers: Any, model: str, config: Any, kind: str) -> Any:
    """Returns the class of transformers that is built."""
    if kind in CLASSES:
        return getattr(transformers, CLASSES[kind])
    names = config.architectures or ()
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise UsageError(
            f"the config of {model} does not name the class of transformers to be trained on data of your own: add "
            'as in "architectures": ["BertForSequenceClassification"]'
        )
    return found


def _fit(model: str, config: Any, of: Facts, *, has_weights: bool) -> bool:
    """Writes the facts of the data into the config; returns True if the folder's head has another number of classes.

    Raises UsageError where weights are for others, or the data has longer sequences than the model.
    """
    language = config.get_text_config()
    longest = next((length for name in LENGTHS if (length := getattr(language, name, None))), None)
    if of.context is not None and longest is not None and of.context > longest:
        raise UsageError(f"context is {of.context}, but {model} has {longest} positions: give --context {longest}, or less")
    sizes = {"vocab_size": of.vocabulary, "num_channels": of.channels, "image_size": of.image_size}
    for name, value in sizes.items():
        part = language if name == "vocab_size" else config
        if value is None or not hasattr(part, name):
            continue
        before = getattr(part, name)
        new = [value] * len(before) if isinstance(before, list | tuple) else value
        if has_weights and new != before:
            raise UsageError(
                f"the weights of {model} are for a {name} of {before}, and the data has {value}: give its config file alone to begin with "
                "random weights, or other data"
            )
        setattr(part, name, new)
    if of.classes is None or config.num_labels == of.classes:
        return False
    config.num_labels = of.classes
    return has_weights


def _warn(model: str, new: Sequence[str]) -> None:
    """Says which tensors the folder's weights lack, or have in another shape."""
    if new:
        print(f"warning: {model} has no weights that fit for {listed(sorted(new))}, which begin at random", file=sys.stderr, flush=True)


def _refuse_foresight(model: str, made: nn.Module, of: Facts) -> None:
    """Raises UsageError for a model whose outputs at a token depend on those after it, which it is to predict."""
    length = min(8, of.context or 8)
    if length < 2 or not of.vocabulary:
        return
    tokens = torch.arange(length)[None] % of.vocabulary  # (1, T)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % of.vocabulary
    made.eval()
    try:
        with torch.inference_mode():
            here, there = (logits(made(one))[0, :-1] for one in (tokens, other))
    except Exception as error:
        raise UsageError(f"{model} fails on {length} tokens: {said(error)}") from error
    finally:
        made.train()
    if not torch.allclose(here, there, rtol=1e-3, atol=1e-5):
        raise UsageError(f"{model} sees the tokens that it is to predict: give a decoder, or a config with is_decoder true")


def _imported(model: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{model} comes from a package that is not installed: pip install 'delock[hf]'") from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps the library's advice and progress from the screen within the block; what counts is said in an error."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
