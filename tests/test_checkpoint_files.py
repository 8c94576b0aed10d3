"""Checkpoints on disk: what is kept, what is refused, what is damaged, and that a checkpoint is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.checkpoints.directory import MANIFEST, Writer, discard_unfinished, name_of, newest_first, prune, read, read_tensors, verified
from delock.checkpoints.encoding import copied, decode, encode
from delock.checkpoints.manifest import Manifest
from delock.checkpoints.weight_index import INDEX
from delock.errors import UsageError

KNOWN: dict[str, Any] = {"trained": 3, "evaluations": 1, "measures": {"loss": 0.5}}
REST: dict[str, Any] = {"tick": 7, "batches": 5, "made_with": {"torch": "2", "threads": 1}, "options": {"method": "fdg", "cuts": [2]}}


def tree() -> dict[Any, Any]:
    """One of every kind, with two references to one tensor."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    shared = draw(3, 4)
    odd = {"nan": math.nan, "inf": -math.inf, "small": 5e-324, "third": 1 / 3}
    tensors = {
        **{str(dtype): torch.ones(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)},
        "channels last": draw(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": draw(3, 5).T,
        "expanded": draw(1, 3).expand(4, 3),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
    }
    return {"a": [1, True, None, "text", 2.0, (3, (4,))], 1: odd, (0, "x"): {True: shared, False: shared}, "tensors": tensors, "big": 2**70}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and list(map(type, a)) == list(map(type, b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def written(folder: Path, batches: int = 5, K: int = 2) -> Path:
    """A checkpoint of K stages."""
    done = None
    for k in range(K):
        writer = Writer(folder, batches, k, K)
        writer.begin()
        writer.add("optimizer", {"k": k, **tree()})
        writer.add("in-flight", [torch.arange(k + 3)], private=True)
        writer.add_tensors("weights", {"layer.weight": torch.full((2, 2), float(k))})
        known = {**KNOWN, "measures": {"loss": 1 / batches}} if k else None
        done = writer.done(10 + k, {**REST, "batches": batches}, known)
    assert done is not None
    return folder / name_of(batches)


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path)
    for k in (0, 1):
        found = read(path, "optimizer", k)
        assert same(found, {"k": k, **tree()})
        assert found[0, "x"][True] is found[0, "x"][False]
    outline = read(path, "optimizer", 0, outline=True)["tensors"]
    assert all(
        outline[name].is_meta and outline[name].stride() == one.stride() for name, one in tree()["tensors"].items() if 0 not in one.stride()
    )
    assert read_tensors(path / "weights-1.safetensors")[0]["layer.weight"].eq(1).all()
    assert json.loads(json.dumps(encode(tree())[0], allow_nan=False)) == encode(tree())[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr_lambdas": [abs]}, r"state\['lr_lambdas'\]\[0\] is a builtin_function_or_method, which a checkpoint cannot keep"),
        ({1.5: 0}, "a float as a key"),
        ([{1, 2}], r"state\[0\] is a set"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (b"bytes", "state is a bytes"),
    ],
)
def test_what_cannot_be_kept_is_named(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encode(value)


@pytest.mark.parametrize(
    "structure",
    [
        {"dict": [[1.5, 2]]},
        {"dict": [[1, 2, 3]]},
        {"dict": {}},
        {"tuple": 3},
        {"tensor": "1", "strides": [1]},
        {"tensor": "0", "strides": [1, 2]},
        {"tensor": "0", "strides": [2**50]},
        {"tensor": "0", "strides": [-1]},
        {"tensor": "0", "strides": [10**6]},
        {"tensor": "0", "strides": [1], "offset": 64},
        {"tensor": "0", "strides": [1], "offset": -4},
        {"tensor": "0", "strides": [1], "offset": 3},
        {"tensor": "0", "strides": [1], "offset": True},
        {"float": "1.0"},
        {"tensor": "0", "strides": [1], "code": "x"},
        {},
    ],
    ids=str,
)
def test_other_structures_are_refused(structure: Any) -> None:
    with pytest.raises(UsageError):
        decode(structure, {"0": torch.zeros(3)})


def test_tensors_begin_where_those_of_torch_do(tmp_path: Path) -> None:
    """Else a sum that is taken in blocks of 64 bytes can differ in its last bits after a resume."""
    writer = Writer(tmp_path, 0, 0, 1)
    writer.begin()
    writer.add("in-flight", [torch.zeros(n) for n in range(1, 9)])
    found = read(next(tmp_path.glob("*")), "in-flight", 0)
    assert [one.data_ptr() % 64 for one in found] == [0] * 8


@pytest.mark.parametrize("place", [lambda x: x[3:], lambda x: x[3:].t(), lambda x: x[3:, :1].expand(3, 5), lambda x: x[3:, ::2]])
def test_a_part_begins_where_it_did(tmp_path: Path, place: Callable[[Tensor], Tensor]) -> None:
    """Rows 3 to 5 of a batch begin 60 bytes behind its first, and sums can depend on that: also in a copy, and in a copy that is read."""
    part = place(torch.arange(30.0).view(6, 5))
    taken = copied({"x": part})["x"]
    writer = Writer(tmp_path, 0, 0, 1)
    writer.begin()
    writer.add("in-flight", taken)
    for one in (taken, read(next(tmp_path.glob("*")), "in-flight", 0)):
        assert torch.equal(one, part)
        assert one.data_ptr() % 64 == part.data_ptr() % 64 == 60
        assert one.stride() == part.stride()


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    first = Writer(tmp_path, 5, 0, 2)
    first.begin()
    first.add("weights", {"x": torch.ones(1)})
    assert first.done(10, REST) is None
    assert newest_first(tmp_path) == []
    second = Writer(tmp_path, 5, 1, 2)
    second.begin()
    second.add("weights", {"x": torch.ones(1)})
    assert second.done(11, REST, KNOWN) is not None
    manifest = verified(tmp_path / "batch-00000005")
    assert (manifest.updates, manifest.K, set(manifest.files)) == ((10, 11), 2, {"weights-0.safetensors", "weights-1.safetensors", INDEX})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch-00000005"]


def test_one_of_many_completes_it(tmp_path: Path) -> None:
    """Eight stages that end at the same moment, many times."""
    for n in range(30):
        writers = [Writer(tmp_path / str(n), 5, k, 8) for k in range(8)]
        for writer in writers:
            writer.begin()
            writer.add("weights", {"x": torch.ones(1)})
        found: list[Manifest | None] = []
        at_once = Barrier(8)

        def finish(writer: Writer) -> None:
            at_once.wait(20)  # noqa: B023
            found.append(writer.done(1, REST, KNOWN if writer.k == 7 else None))  # noqa: B023

        threads = [Thread(target=finish, args=(writer,)) for writer in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sum(one is not None for one in found) == 1
        assert verified(tmp_path / str(n) / "batch-00000005").K == 8


def test_training_data_is_private(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert stat.S_IMODE(os.stat(path / "in-flight-0.safetensors").st_mode) == 0o600


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for batches in (5, 10, 100, 20):
        written(tmp_path, batches)
    for batches in (15, 50, 150):  # all but the first perhaps being written: a stage may be slower than the others
        (tmp_path / f".batch-{batches:08d}").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".batch-00000050", ".batch-00000150", "batch-00000020", "batch-00000100"]
    discard_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch-00000020", "batch-00000100"]
    assert [path.name for path in newest_first(tmp_path)] == ["batch-00000100", "batch-00000020"]


def test_what_a_killed_run_has_left_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    killed = Writer(tmp_path, 5, 1, 2)
    killed.begin()
    killed.add("weights", {"x": torch.zeros(1)})
    killed.done(10, REST)
    discard_unfinished(tmp_path)
    first = Writer(tmp_path, 5, 0, 2)
    first.begin()
    first.add("weights", {"x": torch.ones(1)})
    assert first.done(10, REST) is None
    assert newest_first(tmp_path) == []


def damaged(path: Path, how: str) -> None:
    file = path / "optimizer-0.safetensors"
    match how:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "flipped":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        case "manifest":
            (path / MANIFEST).write_text("{")
        case "deep":
            (path / MANIFEST).write_text("[" * 200_000)
        case "pipe":
            (path / MANIFEST).unlink()
            os.mkfifo(path / MANIFEST)
        case "changed":
            text = json.loads((path / MANIFEST).read_text())
            (path / MANIFEST).write_text(json.dumps({**text, "tick": text["tick"] + 1}))
        case "outside":
            text = json.loads((path / MANIFEST).read_text())
            text["files"]["../x"] = [1, 2]
            (path / MANIFEST).write_text(json.dumps(text))
        case "later":
            text = json.loads((path / MANIFEST).read_text())
            (path / MANIFEST).write_text(json.dumps({**text, "format": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "optimizer-0.safetensors is missing"),
        ("cut", "optimizer-0.safetensors is not as it was written"),
        ("flipped", "optimizer-0.safetensors is not as it was written"),
        ("manifest", "the manifest is no JSON"),
        ("outside", "is not as it was written"),
        ("deep", "the manifest is no JSON"),
        ("pipe", "is no checkpoint: manifest.json is missing, or not a file"),
        ("changed", "the manifest is not as it was written"),
        ("later", "format 99, and this Delock reads format 1"),
    ],
)
def test_damage_is_found(tmp_path: Path, how: str, message: str) -> None:
    path = written(tmp_path)
    verified(path)
    damaged(path, how)
    with pytest.raises(UsageError, match=message):
        verified(path)
