"""The unsplit model in a checkpoint: read, exported, and read by others."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from delock.checkpoints.directory import Writer, verified
from delock.checkpoints.weight_index import INDEX, sizes
from delock.checkpoints.whole_model import export, read_model
from delock.errors import UsageError

KNOWN: dict[str, Any] = {"trained": 5, "evaluations": 0, "measures": {}}
REST: dict[str, Any] = {"tick": 7, "batches": 5, "made_with": {}, "options": {}}
MODEL = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "0.bias": torch.tensor([1, 2, 3], dtype=torch.bfloat16),
    "1.num_batches_tracked": torch.tensor(7),
    "2.weight": torch.ones(5, 3, dtype=torch.float64),
    "2.mask": torch.tensor([True, False]),
}
HEADS = {"heads.0.weight": torch.ones(2)}


def written(folder: Path, *stages: Mapping[str, Tensor]) -> Path:
    """A checkpoint of these stages; their other files hold tensors of other sizes."""
    for k, stage in enumerate(stages):
        writer = Writer(folder, 5, k, len(stages))
        writer.begin()
        writer.add_tensors("weights", stage)
        writer.add("optimizer", [torch.zeros((2,) * (k + 1)), torch.zeros(3)])
        writer.add("in-flight", [torch.zeros(())], private=True)
        manifest = writer.done(9, REST, KNOWN if k == 0 else None)
    assert manifest is not None
    return writer.final


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    first, second = list(MODEL)[:3], list(MODEL)[3:]
    return written(tmp_path / "c", {name: MODEL[name] for name in first} | HEADS, {name: MODEL[name] for name in second})


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor] = MODEL) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and found[name].equal(wanted[name]) for name in found
    )


def others(folder: Path) -> dict[str, Tensor]:
    """The model as torch.distributed.checkpoint reads Hugging Face's folders."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
    dcp.load(empty, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return empty


def test_the_model_is_read_without_heads(checkpoint: Path) -> None:
    assert same(read_model(checkpoint))
    save_file(MODEL, checkpoint / "one")
    assert same(read_model(checkpoint / "one"))
    assert sizes(checkpoint / "weights-1.safetensors") == {"2.weight": 120, "2.mask": 2}


def test_the_index_is_that_of_hugging_face(checkpoint: Path) -> None:
    """As transformers does it: every tensor is looked up in the file that the index names."""
    found = json.loads((checkpoint / INDEX).read_text())
    assert found["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in MODEL.values())
    assert same({name: load_file(checkpoint / file)[name] for name, file in found["weight_map"].items()})
    assert INDEX in verified(checkpoint).files


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("limit", [None, 10**9, 60, 1])
def test_torch_reads_the_folder_and_exports(checkpoint: Path, tmp_path: Path, limit: int | None) -> None:
    if limit is None:
        assert same(others(checkpoint))
        return
    files = export(checkpoint, tmp_path / "new" / "x", limit)
    assert len(files) == {10**9: 1, 60: 5, 1: 6}[limit], "by 60: the number and 0.weight; 0.bias; 2.weight; 2.mask; the index"
    assert sorted(files) == sorted((tmp_path / "new" / "x").iterdir())
    assert same(others(tmp_path / "new" / "x"))
    if limit < 10**9:
        found = json.loads((tmp_path / "new" / "x" / INDEX).read_text())["weight_map"]
        assert same({name: load_file(tmp_path / "new" / "x" / file)[name] for name, file in found.items()})


def test_an_export_is_one_file_if_it_is_called_so(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    assert export(checkpoint, target, limit=1) == [target]
    assert same(load_file(target))
    assert same(read_model(export(target, tmp_path / "again")[0]))
    with pytest.raises(UsageError, match=r"m\.safetensors exists: give another --out"):
        export(checkpoint, target)
    with pytest.raises(UsageError, match="again exists"):
        export(checkpoint, tmp_path / "again")


def test_weights_are_for_all_who_may_read_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        path = written(tmp_path / "d", MODEL)
        (file,) = export(path, tmp_path / "x")
    finally:
        os.umask(umask)
    modes = {name: stat.S_IMODE((path / name).stat().st_mode) for name in ("weights-0.safetensors", "in-flight-0.safetensors")}
    assert modes == {"weights-0.safetensors": 0o640, "in-flight-0.safetensors": 0o600}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read"),
        ("no header", "cannot be read"),
        ("gone", "is no checkpoint"),
        ("twice", "two stages hold 0.bias"),
        ("no checkpoint", "is no checkpoint"),
    ],
)
def test_damage_is_named(checkpoint: Path, tmp_path: Path, how: str, message: str) -> None:
    file = checkpoint / "weights-0.safetensors"
    match how:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "no header":
            file.write_bytes(b"\xff" * 100)
        case "gone":
            file.unlink()
        case "twice":
            checkpoint = written(tmp_path / "twice", MODEL, MODEL)
        case "no checkpoint":
            checkpoint = tmp_path
    with pytest.raises(UsageError, match=message):
        read_model(checkpoint)
    with pytest.raises(UsageError, match=message):
        export(checkpoint, tmp_path / "x")
    assert list((tmp_path / "x").glob("*")) == []
