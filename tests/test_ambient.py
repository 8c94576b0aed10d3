"""Settings and modes of torch around `delock.fit`: stages in processes have those of the program, or they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mkldnn

import delock
from delock.launch.ambient import FLAGS, Ambient
from delock.methods import DDG

from chain import seeded, vectors
from harness import same_state
from programs import torchrun
from workloads import sgd

pytestmark = pytest.mark.usefixtures("own_random")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Makes the settings afterwards what they were."""
    before = Ambient.here()
    yield
    before.enter(CPU)
    assert Ambient.here() == before


class Probe(nn.Linear):
    """Draws a constant, and keeps what it sees of torch's settings."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("seen", torch.zeros(9, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        own = torch.full((4,), 1 / 3)
        seen: list[float] = [
            own.dtype == torch.float64,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            ("highest", "high", "medium").index(torch.get_float32_matmul_precision()),
            (torch.full((), 1e-310, dtype=torch.float64) / 2).item() == 0,
            cuda.flash_sdp_enabled(),
            cudnn.benchmark,
            mkldnn.enabled,
            torch.is_grad_enabled(),
        ]
        self.seen.copy_(torch.tensor(seen))
        return super().forward(x + own.to(x.dtype))


def run(workers: str) -> tuple[dict[str, Tensor], list[float]]:
    """The state and the losses of a short run in two stages."""
    model = nn.Sequential(*seeded(lambda: [Probe(), Probe()]))
    data = [(x, y) for x, y in vectors(4, 4, 6, torch.get_default_dtype())]
    result = delock.fit(model, data, loss=nn.functional.mse_loss, optimizer=sgd, method=DDG(), epochs=1, workers=workers)  # type: ignore[arg-type]
    return model.state_dict(), result.losses


def set_everything() -> None:
    """Gives every setting another value than its own."""
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    cuda.enable_flash_sdp(False)
    cudnn.benchmark = True
    mkldnn.enabled = False


def test_stages_in_processes_have_the_settings_of_the_program() -> None:
    plain, _ = run("inline")
    assert plain["0.seen"].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1]
    set_everything()
    with torch.no_grad():  # a program may train from within
        here, losses = run("inline")
        there, others = run("processes")
    assert here["0.seen"].tolist() == here["1.seen"].tolist() == [1, 1, 1, 2, 1, 0, 1, 0, 1]
    assert same_state(here, there)
    assert losses == others


def test_training_within_no_grad_is_training() -> None:
    plain, losses = run("inline")
    with torch.no_grad():
        state, others = run("inline")
        assert not torch.is_grad_enabled()
    assert same_state(plain, state)
    assert losses == others


SETTINGS: list[Callable[[], object]] = [
    lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.use_deterministic_algorithms(True),
    lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_flush_denormal(True),
    lambda: cuda.enable_math_sdp(False),
    lambda: setattr(cudnn, "deterministic", True),
    lambda: setattr(mkldnn.matmul, "fp32_precision", "bf16"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    set_everything,
]


@pytest.mark.parametrize("make", SETTINGS)
def test_every_setting_is_read_and_made(make: Callable[[], object]) -> None:
    plain = Ambient.here()
    make()
    made = Ambient.here()
    assert made != plain
    plain.enter(CPU)
    assert Ambient.here() == plain
    made.enter(CPU)
    assert Ambient.here() == made
    assert len(made.flags) == len(FLAGS)


REFUSED: list[tuple[Callable[[], AbstractContextManager[object]], str]] = [
    (lambda: torch.autocast("cpu", torch.bfloat16), r"within torch\.autocast.*Execution\(amp=\"bf16\"\)"),
    (torch.inference_mode, "within torch.inference_mode.*call it outside"),
    (lambda: torch.device("meta"), 'default device of torch is "meta", but that of the run is "cpu"'),
]


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize(("mode", "message"), REFUSED)
def test_modes_that_cannot_reach_all_stages_are_refused(
    mode: Callable[[], AbstractContextManager[object]], message: str, workers: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    data = vectors(4, 4, 6)
    with mode(), pytest.raises(delock.UsageError, match=message):
        delock.fit(model, data, loss=nn.functional.mse_loss, optimizer=sgd, epochs=1, workers=workers)  # type: ignore[arg-type]


SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import test_ambient

if sys.argv[1] == "alike" or os.environ["RANK"] == "1":
    torch.set_default_dtype(torch.float64)
torch.save(test_ambient.run("processes"), sys.argv[2] + os.environ["RANK"])
"""


@pytest.mark.slow
def test_ranks_of_torchrun_must_be_alike(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(tmp_path / "script.py", "differ", str(tmp_path / "out"))
    assert done.returncode != 0
    assert "other settings on rank 1 than on rank 0: dtype torch.float64, there torch.float32" in done.stderr


@pytest.mark.slow
def test_ranks_of_torchrun_that_are_alike_train(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(tmp_path / "script.py", "alike", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    torch.set_default_dtype(torch.float64)
    state, losses = run("inline")
    for rank in range(2):
        there, others = torch.load(tmp_path / f"out{rank}")
        assert same_state(state, there)
        assert losses == others
