"""Reads the names that stand for models and data of elsewhere: timm/NAME, hf/CONFIG, FILE.py:FUNCTION. It loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

from delock.errors import UsageError

TORCHVISION, TIMM, HF = "torchvision/", "timm/", "hf/"
LONGEST = 60  # characters of a model's name in the name of a folder


def is_file(name: str | None) -> bool:
    """Returns True for FILE.py:FUNCTION, also where the function is missing."""
    return name is not None and re.search(r"\.py(:|$)", name) is not None


def is_elsewhere(model: str | None) -> bool:
    """Returns True for a model whose sizes no option of the command line says."""
    return model is not None and (model.startswith((TIMM, HF)) or is_file(model))


def reads_text(model: str) -> bool:
    """Returns True for a model that may read tokens."""
    return model == "gpt" or model.startswith(HF) or is_file(model)


def split(name: str) -> tuple[Path, str]:
    """Returns file and function of FILE.py:FUNCTION. Raises UsageError if the function is missing."""
    file, _, function = name.rpartition(".py")
    if not re.fullmatch(r":[^\W\d]\w*", function):
        raise UsageError(f"{name} names no function: write {file}.py:FUNCTION, with the name of a function in that file")
    return Path(f"{file}.py"), function[1:]


def config_file(model: str) -> Path:
    """Returns the file that hf/CONFIG-FILE-OR-FOLDER means; on the hub, which has no such file here, it does not exist."""
    path = Path(model.removeprefix(HF))
    return path / "config.json" if path.is_dir() else path


def source_files(*names: str | None) -> list[Path]:
    """Returns the files of the user from which a model and data of these names are made."""
    own = [split(name)[0] for name in names if name is not None and is_file(name)]
    configs = [config_file(name) for name in names if name is not None and name.startswith(HF) and not is_file(name)]
    return [path for path in dict.fromkeys([*own, *configs]) if path.is_file()]


def in_a_folder(model: str) -> str:
    """Returns a model's name as a part of a folder's name: own-make for code/own.py:make."""
    if is_file(model):
        file, function = split(model)
        model = f"{file.stem}-{function}"
    elif model.startswith(HF):
        path = config_file(model)
        model = f"hf-{path.parent.resolve().name if path.name == 'config.json' else path.with_suffix('').name}"
    return re.sub(r"[^\w.+=-]+", "-", model)[:LONGEST]
