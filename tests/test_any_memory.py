"""The parent of a run stays small: weights go to the stages and come back into the model without a copy; failure leaves it as it was."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import textwrap
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock import fit
from delock.errors import StageFailed
from delock.launch.parcel import CHUNK, Arriving, Parcel, Unpickler
from delock.launch.processes import run_processes
from delock.launch.rank import Rank

BATCHES = [(torch.arange(8.0).reshape(4, 2) / 8, torch.tensor([0, 1, 1, 0]))] * 3

# -- parcels ------------------------------------------------------------------------------------------------------------------------


def there_and_back(value: object) -> Any:
    """Returns what arrives of a value."""
    messages: list[bytes] = []
    Parcel(value).send(lambda message: messages.append(bytes(message)))
    arriving = Arriving(messages.pop(0))
    ends = [arriving.take(message) for message in messages]
    assert ends == [False] * (len(ends) - 1) + [True]
    return arriving.open()


@pytest.mark.usefixtures("own_random")
def test_a_parcel_holds_no_copy_of_its_tensors_and_arrives_as_it_was() -> None:
    whole = torch.arange(3 * CHUNK // 8 + 5, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(3, 2))
    value = {
        "large": whole,
        "view": torch.arange(24).reshape(4, 6)[1:, ::2],
        "none": torch.empty(0, 3),
        "bits": torch.tensor([True, False, True]),
        "half": torch.randn(5).bfloat16(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "lasting": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        "twice": [weight, weight],
        "scalar": torch.tensor(7),
    }
    parcel = Parcel(value)
    assert len(parcel.pickled) < 10_000
    assert any(one.data_ptr() == whole.data_ptr() for one in parcel.storages), "the memory is the tensor's own"
    got = there_and_back(value)
    for name in ("large", "view", "none", "bits", "half", "complex", "scalar"):
        assert torch.equal(got[name], value[name])
        assert (got[name].dtype, got[name].stride()) == (value[name].dtype, value[name].stride())
    assert got["twice"][0] is got["twice"][1]
    assert isinstance(got["twice"][0], nn.Parameter)
    assert got["lasting"].state_dict().keys() == value["lasting"].state_dict().keys()
    got["large"][0] = 5.0
    assert whole[0] == 0.0


def test_a_parcel_without_tensors_needs_no_file() -> None:
    assert there_and_back({"a": [1, None, "b"]}) == {"a": [1, None, "b"]}
    parcel = Parcel((torch.empty(0), 3))
    assert Unpickler(io.BytesIO(parcel.pickled), parcel.storages).load()[1] == 3


def test_a_tensor_comes_to_a_rank_where_torch_would_have_put_it() -> None:
    """Kernels may add in another order on memory that begins elsewhere."""
    [(total, address, size)] = run_processes(described, [torch.arange(CHUNK // 4 + 3)], pin=False)
    assert (total, address, size) == (int(torch.arange(CHUNK // 4 + 3).sum()), 0, CHUNK // 4 + 3)


def described(rank: Rank, given: Tensor) -> tuple[int, int, int]:
    return int(given.sum()), given.data_ptr() % 64, len(given)


# -- failure ------------------------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))


def train(model: nn.Module, **more: Any) -> Any:
    options = {"loss": nn.functional.cross_entropy, "method": "bp", "cuts": [2], "batches": 3, **more}
    return fit(model, BATCHES, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


@pytest.mark.usefixtures("own_random")
def test_trained_weights_come_into_the_models_own_tensors() -> None:
    own, inline = network(), network()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in own.state_dict().items()}
    train(own)
    train(inline, workers="inline")
    for name, tensor in own.state_dict().items():
        place, was = before[name]
        assert tensor.data_ptr() == place
        assert not torch.equal(tensor, was)
        assert torch.equal(tensor, inline.state_dict()[name])


def fails_at_the_last(outputs: Tensor, targets: Tensor) -> Tensor:
    """Raises an error at its third call in a stage's process."""
    known = vars(fails_at_the_last)
    known["calls"] = known.get("calls", 0) + 1
    if known["calls"] == 3 and parent_process() is not None:
        raise RuntimeError("no more")
    return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.usefixtures("own_random")
def test_a_run_that_fails_at_the_end_leaves_the_model_as_it_was() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StageFailed, match=r"stage 1 failed in B2 .*no more"):
        train(model, loss=fails_at_the_last)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_results_are_given_up_where_a_rank_dies_after_others_have_ended() -> None:
    """The first rank's result has come when the second one dies; nothing of it is handed out, and its file is closed."""
    with pytest.raises(StageFailed, match="stage 1"):
        run_processes(dies_behind, [torch.ones(CHUNK), torch.ones(3)], pin=False)


def dies_behind(rank: Rank, given: Tensor) -> Tensor:
    """Rank 0 returns; rank 1 dies when rank 0 has begun to send its result."""
    if rank.rank == 1:
        rank.peers[0].recv(1)
        os._exit(3)
    rank.peers[1].send(b"x")
    return given


# -- peaks --------------------------------------------------------------------------------------------------------------------------

PEAK = """
    import sys
    from functools import partial
    import torch
    from torch import nn
    from delock import fit
    from delock.launch import peak_memory

    class Residual(nn.Module):
        def __init__(self, wide, count):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(wide, wide) for _ in range(count))
        def forward(self, x):
            for part in self.parts:
                x = x + part(x).tanh()
            return x

    def made(kind, wide, count):
        return Residual(wide, count) if kind == "traced" else nn.Sequential(*(nn.Linear(wide, wide) for _ in range(count)))

    def run(kind, wide, count, K):
        model, data = made(kind, wide, count), [(torch.randn(2, wide), torch.zeros(2, dtype=torch.int64))] * 2
        cpu = torch.device("cpu")
        before = peak_memory.reset_peak(cpu)
        result = fit(model, data, loss=nn.functional.cross_entropy, optimizer=partial(torch.optim.SGD, lr=1e-3), method="bp", stages=K,
                     batches=2)
        return (peak_memory.peak(cpu) - before) / max(4 * stage.parameters for stage in result.stages)

    if __name__ == "__main__":
        run(sys.argv[1], 8, 4, 2)  # what is loaded once counts for nobody
        print("ratio", run(sys.argv[1], 2048, 12, 2))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of a program's memory")
@pytest.mark.parametrize("kind", ["traced", pytest.param("chain", marks=pytest.mark.slow)])
def test_the_parents_peak_is_its_model_and_less_than_the_largest_stage_and_a_third(kind: str, tmp_path: Path) -> None:
    program = tmp_path / "peak.py"
    program.write_text(textwrap.dedent(PEAK))
    done = subprocess.run([sys.executable, str(program), kind], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.3
