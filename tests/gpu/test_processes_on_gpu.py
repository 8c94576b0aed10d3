"""Stages in processes of their own on GPUs, the command line, and torchrun."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from delock import fit
from delock.cli import main
from delock.errors import UsageError
from delock.launch.processes import run_processes
from delock.methods import DSP, FDG, AsyncDGL, Method
from delock.nets import build
from delock.options import Placement
from delock.run.ranks import run_rank

from harness import inline, jobs
from programs import torchrun
from training import assert_close, jobs64, on_gpu
from workloads import Samples

GPUS = torch.cuda.device_count()
two = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and torch sees {GPUS}")
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def one_stage(**options: Any) -> Any:
    model = build("resnet8", classes=10, in_channels=3, image_size=8)
    data = Samples("image", 24, 8, torch.float32)
    return fit(model, data, loss=cross_entropy, optimizer=SGD, stages=1, epochs=2, device="cuda", **options)


def test_a_stage_in_a_process_of_its_own() -> None:
    ours, other = one_stage(workers="processes", placement=Placement(patience=60.0)), one_stage(workers="inline")
    assert ours.losses == pytest.approx(other.losses, rel=1e-3)  # its cuDNN adds in an order of its own
    assert ours.stages[0].peak_memory > 0
    assert ours.stages[0].memory_growth > 0


@pytest.mark.parametrize("method", [FDG(), DSP()], ids=str)
def test_messages_go_through_the_cpu_over_gloo(method: Method) -> None:
    """Two stages on one GPU, over gloo."""
    got = run_processes(run_rank, jobs64("conv", 2, method), device="cuda:0", backend="gloo", patience=60)
    assert_close(got, on_gpu(jobs64("conv", 2, method)))
    assert {value.device.type for stage in got for value in stage.state.values()} == {"cpu"}


def test_free_running_stages() -> None:
    """Two processes on one GPU, which never wait for each other: every batch comes once, the rest is chance."""
    made = jobs("conv", 2, AsyncDGL(order="free"), evaluate=False)
    got = run_processes(run_rank, made, device="cuda:0", backend="gloo", patience=60)
    assert len(got[-1].losses) >= 1
    assert got[0].report.updates == made[0].length.batches
    assert all(value.isfinite().all() for stage in got for value in stage.state.values())


@two
def test_nccl_between_two_gpus() -> None:
    got = run_processes(run_rank, jobs64("conv", 2, FDG()), device="cuda", patience=60)
    assert_close(got, inline(jobs64("conv", 2, FDG())))


def test_more_stages_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match=rf"offers {GPUS} GPU\(s\) to {GPUS + 1} processes, and each needs its own"):
        run_processes(run_rank, [None] * (GPUS + 1), device="cuda")  # type: ignore[list-item]
    with pytest.raises(UsageError, match=f"the GPUs here are numbered 0 to {GPUS - 1}"):
        run_processes(run_rank, [None], device=f"cuda:{GPUS}")  # type: ignore[list-item]


TEXT = "the quick brown fox jumps over the lazy dog. " * 100
SMALL = ["--width", "32", "--depth", "2", "--attention-heads", "2", "--context", "16"]
COMMAND = ["--data", "text", "--text", "book.txt", "--stages", "2", *SMALL]


@pytest.mark.parametrize("captured", [[], ["--captured"]], ids=["engine", "captured"])
def test_the_command_line_trains_a_transformer(captured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    words = [*COMMAND, "--batches", "6", "--optimizer", "sgd", "--lr", "0.1", "--device", "cuda", "--workers", "inline", *captured]
    assert main(["train", *words, "--out", "run"]) == 0
    assert Path("run/summary.json").exists()


SCRIPT = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_processes_on_gpu import one_stage

if __name__ == "__main__":
    print("losses", one_stage().losses)
"""


def test_a_rank_of_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun(script, ranks=1)
    assert done.returncode == 0, done.stderr
    losses = [float(word) for word in done.stdout.split("losses", 1)[1].strip(" []\n").split(",")]
    assert losses == pytest.approx(one_stage(workers="inline").losses, rel=1e-3)
