"""Traces on disk: a run with a kept one is the run that traced it, and nothing else is ever taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.partition.graph.cutter import Piece
from delock.partition.graph.examples import Examples
from delock.partition.graph.segment import computation
from delock.partition.graph.split import Split
from delock.partition.traces import kept_split as keeping
from delock.partition.traces import trace_files
from delock.partition.traces.kept_split import kept_split
from delock.partition.traces.trace_files import folder, read_trace, write_trace
from test_zoo import SHOWN, fit

import zoo
from specimens import Specimen
from zoo import ZOO

KEPT = "; they were kept by an earlier run"
OFTEN = (("hf GPT2LMHeadModel", 3), ("U-Net", 2))


class Net(nn.Module):
    """Blocks, a rotation that is a constant of the graph, and a table that two blocks use."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.by = by
        self.register_buffer("table", torch.rand(4), persistent=False)
        self.loose = torch.rand(4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x) * self.table) * self.by + self.loose + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x


def net(by: float = 1.0) -> Net:
    """A net with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(by)


def examples(count: int = 4) -> Examples:
    return Examples.by_rows([torch.arange(4.0 * count).reshape(count, 4).sin()], count, nn.Identity())


def cut(model: nn.Module, stages: int = 2) -> Split:
    return kept_split(model, Call(), examples(), stages)


def said(piece: Piece) -> Any:
    """All that a piece is, but for the values of its tensors."""
    does = [computation(piece.module, mode) for mode in (True, False)]
    programs = [(one.program.source, list(one.program.names), one.handed, one.weights, one.own) for one in does]
    return piece.begins, piece.also, piece.ties, list(piece.parts), programs, list(piece.module.state_dict())


def held(piece: Piece) -> list[tuple[str, Tensor]]:
    return [*piece.module.named_parameters(remove_duplicate=False), *piece.module.named_buffers(remove_duplicate=False)]


def assert_equal_pieces(a: Split, b: Split) -> None:
    """The same programs on parts of the same names and values."""
    assert [said(one) for one in a.pieces] == [said(one) for one in b.pieces]
    assert (a.how, a.checksum, a.told, a.refused, a.structures) == (b.how, b.checksum, b.told, b.refused, b.structures)
    for one, other in zip(a.pieces, b.pieces, strict=True):
        assert [name for name, _ in held(one)] == [name for name, _ in held(other)]
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(held(one), held(other), strict=True))


def specimens() -> Iterable[Any]:
    """One of each family and a number of stages, all but a few of them slow."""
    rare = pytest.mark.slow
    return [pytest.param(ZOO[n], K, id=f"{n} {K}", marks=[] if (n, K) in OFTEN else [rare]) for n in SHOWN.values() for K in (2, 3)]


# -- the same run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("specimen", "stages"), specimens())
def test_a_kept_trace_trains_as_a_new_one(specimen: Specimen, stages: int, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = list[Split](), keeping.kept_split
    monkeypatch.setattr("delock.partition.network.kept_split", lambda *given: found.append(plain(*given)) or found[-1])
    (model, result), (other, again) = (fit(specimen, method="bp", stages=stages) for _ in range(2))
    assert [result.started.traced.endswith(KEPT), again.started.traced.endswith(KEPT)] == [False, True]
    assert again.started.traced.removesuffix(KEPT) == result.started.traced
    assert (result.losses, result.evaluations[-1].test_loss) == (again.losses, again.evaluations[-1].test_loss)
    assert [name for name, value in zoo.state(model).items() if not torch.equal(value, zoo.state(other)[name])] == []
    assert [said(one) for one in found[0].pieces] == [said(one) for one in found[1].pieces]


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_kept_pieces(stages: int, kept: Path) -> None:
    specimen = ZOO["U-Net"]
    (model, result), (other, again) = (fit(specimen, method="bp", stages=stages, workers="processes") for _ in range(2))
    assert again.started.traced == result.started.traced + KEPT
    assert result.losses == again.losses
    assert [name for name, value in zoo.state(model).items() if not torch.equal(value, zoo.state(other)[name])] == []


def test_pieces_hold_what_the_model_holds(kept: Path) -> None:
    """The model's own parameters and buffers, of which later ones get copies; constants have the values of the first trace."""
    first, model = cut(net()), net()
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            one.add_(1)  # the key knows no values of weights
    again = cut(model)
    assert (first.kept, again.kept) == (False, True)
    assert [said(one) for one in first.pieces] == [said(one) for one in again.pieces]
    own = {id(one) for one in (*model.parameters(), *model.buffers(), model.loose)}
    parts = [(name, one) for piece in again.pieces for name, one in held(piece)]
    assert all((id(one) in own) != name.startswith("copies.") for name, one in parts)
    assert any(name == "copies.table" and torch.equal(one, model.table) for name, one in parts)


def test_a_kept_split_is_the_split(kept: Path) -> None:
    model = net()
    assert_equal_pieces(cut(model), cut(model))


def test_either_way_the_generator_stays_as_it_is(kept: Path) -> None:
    before = torch.get_rng_state()
    assert [cut(net()).kept, cut(net()).kept] == [False, True]
    assert torch.equal(before, torch.get_rng_state())


def test_other_batches_and_stages_are_traced_anew(kept: Path) -> None:
    assert not cut(net()).kept
    assert not cut(net(), 3).kept
    assert not kept_split(net(), Call(), examples(5), 2).kept
    assert not kept_split(net(), Call(), examples(), 2, ["blocks.1"]).kept
    assert cut(net()).kept


def test_pieces_that_are_not_the_model_are_traced_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the key ever to miss a change, a forward would show it."""
    monkeypatch.setattr(keeping, "trace_key", lambda *given: "k" * 64)
    assert not cut(net(1.0)).kept
    model = net(2.0)
    found = cut(model)
    assert not found.kept
    x = value = examples().first[0]
    for piece in found.pieces:
        value = piece.module(value)  # type: ignore[assignment]
    assert torch.equal(value, model(x))
    assert cut(model).kept  # the new one is kept in place of the old one


class Stops(Net):
    """Lets no gradient through where there is a file, which no key can know."""

    file = Path()

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h + (x * self.table * (h.detach() if self.file.exists() else h))


def test_a_gradient_that_is_another_shows(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are the same, and the parameters that the gradient reaches."""
    monkeypatch.setattr(Stops, "file", tmp_path / "file")
    monkeypatch.setattr(keeping, "trace_key", lambda *given: "k" * 64)
    with torch.random.fork_rng(devices=[]):
        model = Stops()
    assert [cut(model).kept, cut(model).kept] == [False, True]
    Stops.file.touch()
    assert [cut(model).kept, cut(model).kept] == [False, True]


# -- files -------------------------------------------------------------------------------------------------------------------------


def only(kept: Path) -> Path:
    """The one file of the folder."""
    (found,) = kept.iterdir()
    return found


def test_files_are_for_their_owner_alone(kept: Path) -> None:
    cut(net())
    assert (kept.stat().st_mode & 0o777, only(kept).stat().st_mode & 0o777) == (0o700, 0o600)


def test_nothing_is_kept_where_it_is_not_wanted(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELOCK_TRACE_CACHE", "0")
    assert [cut(net()).kept, cut(net()).kept] == [False, False]
    assert not kept.exists()


def flipped(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of its checksum": lambda path: flipped(path, 0),
    "a bit of its text": lambda path: flipped(path, 0.3),
    "a bit of its constants": lambda path: flipped(path, 1),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty file": lambda path: path.write_bytes(b""),
    "readable by others": lambda path: path.chmod(0o644),
    "a link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere"))),
    "of another key": lambda path: path.write_bytes(path.read_bytes().replace(path.stem[:1].encode(), b"#", 1)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_cannot_be_trusted_is_made_anew(how: str, kept: Path) -> None:
    assert not cut(net()).kept
    DAMAGE[how](next(kept.glob("*.trace")))
    assert not cut(net()).kept
    assert cut(net()).kept


def test_a_whole_file_of_another_key_is_not_read(kept: Path) -> None:
    """A file that was renamed holds another model."""
    cut(net())
    only(kept).rename(kept / f"{'0' * 64}.trace")
    assert read_trace(kept, "0" * 64) is None


def test_what_another_user_owns_is_not_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(net())
    monkeypatch.setattr(trace_files.os, "getuid", lambda: os.stat(kept).st_uid + 1)
    assert folder() is None
    assert read_trace(kept, only(kept).stem) is None
    assert not cut(net()).kept


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_folder_that_others_can_enter_is_not_used(mode: int, kept: Path) -> None:
    cut(net())
    kept.chmod(mode)
    assert [cut(net()).kept, cut(net()).kept] == [False, False]
    kept.chmod(0o700)
    assert cut(net()).kept


def test_without_a_folder_a_model_is_traced_every_time(kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("a file in its place")
    assert [cut(net()).kept, cut(net()).kept] == [False, False]


def test_a_full_disk_is_no_error(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_files.os, "replace", full)
    assert not cut(net()).kept
    assert list(kept.iterdir()) == []


def test_the_oldest_of_too_many_go(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_files, "MOST", 2)
    kept.mkdir(parents=True, mode=0o700)
    for age, key in enumerate("abc", 1):
        write_trace(kept, key, {}, {})
        os.utime(kept / f"{key}.trace", (age, age))
    assert sorted(path.stem for path in kept.iterdir()) == ["b", "c"]
    assert read_trace(kept, "b") == ({}, {})  # what is read is used, and stays
    write_trace(kept, "d", {}, {})
    assert sorted(path.stem for path in kept.iterdir()) == ["b", "d"]


def test_what_is_too_large_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_files, "LARGEST", 10)
    cut(net())
    assert list(kept.iterdir()) == []


WRITERS = """
import os, sys, torch
from pathlib import Path
from delock.partition.traces.trace_files import write_trace
torch.set_num_threads(1)
other = os.fork()
by = "1" if other else "2"
for _ in range(60):
    write_trace(Path(sys.argv[1]), "k", {"by": by}, {"values": torch.full((4096,), float(by))})
sys.exit(os.waitpid(other, 0)[1] if other else 0)
"""


def test_two_processes_may_write_one_trace_at_once(kept: Path) -> None:
    """Whoever reads meanwhile finds one of the two, whole."""
    kept.mkdir(parents=True, mode=0o700)
    program = subprocess.Popen([sys.executable, "-c", WRITERS, str(kept)])
    seen, over = list[Any](), False
    while not over:
        over = program.poll() is not None
        if found := read_trace(kept, "k"):
            seen.append((found[0]["by"], set(found[1]["values"].tolist())))
    assert program.returncode == 0
    assert seen
    assert all(values == {float(by)} for by, values in seen)
    assert [path.name for path in kept.iterdir()] == ["k.trace"]
