"""`delock export`: writes the weights of the unsplit model, of a run or of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from delock.cli.arguments import parse
from delock.cli.config import TrainConfig, resolved, shown
from delock.cli.kept_run import Kept, filled, found, named, read_config, weights
from delock.cli.tables import megabytes
from delock.cli.workload import build_model, load_data
from delock.errors import UsageError

ABOUT = """Write the weights of the unsplit model as safetensors, whatever the stages were. RUN is the folder of a run, or of a checkpoint.

Above 5 GB a folder gets Hugging Face's shards and index. A model of transformers, --hf writes with its config, for from_pretrained.

examples:
  delock export runs/RUN
  delock export runs/RUN --checkpoint batch-00000500 --out model.safetensors
  delock export runs/RUN --hf FOLDER"""


@dataclass(frozen=True)
class ExportOptions:
    """Holds the options of an export."""

    out: Annotated[Path | None, shown("the folder export in RUN")] = None
    """A file, if it ends in .safetensors, else a folder; it must be new."""
    hf: Annotated[Path | None, shown("weights alone")] = None
    """A new folder, from which transformers loads the model; in place of --out."""
    checkpoint: Annotated[str | None, shown("the latest")] = None
    """Name of a checkpoint, or final for the weights at the run's end."""


@dataclass(frozen=True)
class ExportConfig:
    """Holds the options of `delock export`."""

    exported: ExportOptions = field(default_factory=ExportOptions)


def run(words: Sequence[str]) -> int:
    """Parses, writes, says what, and returns the exit code."""
    path, rest = named(words, "export")
    options = parse(ExportConfig, rest, "export RUN", ABOUT).exported
    folder, name = found(path, options.checkpoint, "export")
    if options.out and options.hf:
        raise UsageError("--out takes the weights alone and --hf a model of transformers: give one of them")
    config = read_config(folder)
    kept = weights(folder, name)
    for note in kept.notes:
        print(note)
    files = _for_transformers(config, kept, options.hf) if options.hf else _weights(kept, options.out or folder / "export")
    after = f" after {kept.batches:,} batches" if kept.batches is not None else ""
    print(f"the weights of {kept.path}{after} are in")
    for file in files:
        print(f"  {file} ({megabytes(file.stat().st_size)})")
    return 0


def _weights(kept: Kept, target: Path) -> list[Path]:
    from delock.checkpoints.whole_model import export

    return export(kept.path, target)


def _for_transformers(config: TrainConfig, kept: Kept, target: Path) -> list[Path]:
    from delock.cli.models.hugging_face import save

    data = load_data(config)
    return save(filled(lambda: build_model(config, data), config, kept.path), resolved(config.network.model), target)
