"""Numbers out of any sensible range: every option has one, and says it within a second, in one line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from delock.cli import main
from delock.errors import UsageError
from delock.methods import ADL, BP, DSP, AsyncDGL, GPipe
from delock.options import Checkpoint, Execution, Placement, Simulation

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")

NINES = "9" * 5000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seed 18446744073709551616", "seed is 18446744073709551616, but it must be at most 9,223,372,036,854,775,807"),
        ("--threads 4294967296", "threads is 4294967296, but it must be at most 1,024"),
        ("--chunks 100000000000000000000", "chunks is 100000000000000000000, but it must be at most 9,223"),
        ("--stages 9223372036854775808", "stages is 9223372036854775808, but it must be at most 1,000"),
        ("--batch-size 10000000000", "batch-size is 10000000000, but it must be at most"),
        ("--limit 10000000000", "limit is 10000000000, but it must be at most"),
        ("--image-size 1000000 --data synthetic", "image-size is 1000000, but it must be at most 10,000"),
        ("--epochs 10000000000", "epochs is 10000000000, but it must be at most"),
        ("--eval-every 10000000000", "eval-every is 10000000000, but it must be at most"),
        ("--log-every 10000000000", "log-every is 10000000000, but it must be at most"),
        ("--warmup 10000000000", "warmup is 10000000000, but it must be at most"),
        ("--lr inf", "lr is inf, but it must be finite, and at least 0"),
        ("--lr 1e300", "lr is 1e+300, but it must be at most 1e+38"),
        ("--milestones 1e300 --schedule steps", "milestones are 1e+300, but every one"),
        ("--patience 1e300", "patience is 1e+300, but it must be at most"),
        ("--method gpipe --micro-batches 100000", "micro_batches is 100000, but it must be at most 4,096"),
        ("--method dsp --p 100000", "dsp's lag p is 100000, but it must be at most 4,096"),
        ("--method bp --behind 100000", "behind is 100000, but it must be at most 1,000"),
        ("--method dgl-async --noise 0.99999999999999", "S = 1 / (1 - noise) is 1.00"),
        ("--slow 0:99999999999", "the factor of slow is 1e+11, but it must be at most 1,000,000"),
        ("--emulate 1:99999999999999999999", "a wait of emulate, in seconds, is 1e+17, but it must be at most"),
        # the options of checkpoints, by the names that the user typed
        ("--grace nan", "error: grace is nan, but it must be finite, and at least 0"),
        ("--checkpoint-every 0", "error: checkpoint-every is 0, but it must be at least 1"),
        ("--checkpoint-every soon", "error: checkpoint-every is 'soon', but it must be a number of batches"),
        ("--checkpoint-every 99999999999h", "error: checkpoint-every, in seconds, is 3.6e+14, but it must be at most"),
        ("--checkpoint-keep 0", "error: checkpoint-keep is 0, but it must be at least 1"),
        ("--checkpoint-best loss", "error: checkpoint-best is 'loss', but it must say which way"),
        ("--max-restarts -1", "error: max-restarts is -1, but it must be at least 0"),
        # numbers that Python itself refuses to read
        (f"--seed {NINES}", "but it must be a whole number"),
        (f"--cuts {NINES}", "no layer is called '999"),
        (f"--slow {NINES}:1", "but it must be STAGE:S"),
        (f"--checkpoint-every {NINES}", "but it must be a number of batches"),
        (f"--device cuda:{NINES}", "but it must be cpu, cuda or cuda:N"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    began = time.monotonic()
    assert expected in refused(["train", *SMALL, *words.split()], here, capsys)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--micro-batches 100000 --method gpipe", "micro_batches is 100000, but it must be at most"),
        ("--micro-batches 4000 --method gpipe", "gpipe(micro_batches=4000) in 2 stages makes a plan of more than 50,000 ops"),
        ("--method dsp --p 4000 --q 4000 --stages 3", "or shorter lags"),
        ("--method interlocking --n-wise 100 --combine sum --stages 100", "use fewer stages"),
        ("--stages 500", "use fewer stages"),
        ("--stages 9223372036854775808", "stages is 9223372036854775808, but it must be at most 500"),
        ("--slots 100000000", "use fewer stages, micro-batches, batches per update or slots"),
        ("--forward 0 --backward 0", "so a batch takes no time"),
        ("--forward 1e308", "forward is 1e+308, but it must be at most"),
        ("--link-delay inf", "link-delay is inf, but it must be finite, and at least 0"),
    ],
)
def test_a_plan_that_would_take_long_is_refused_at_once(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    began = time.monotonic()
    assert expected in refused(["plan", *words.split()], here, capsys)
    assert time.monotonic() - began < 5


def test_a_large_plan_is_worked_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--method", "gpipe", "--micro-batches", "1000"]) == 0
    assert "gpipe(micro_batches=1000), K = 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        lambda: Execution(chunks=10**5000),
        lambda: Placement(threads=10**5000),
        lambda: Simulation(emulate="1e9:1"),
        lambda: Checkpoint("c", every=10**5000),
        lambda: ADL(accumulate=10**5000),
        lambda: BP(behind=10**5000),
        lambda: DSP(q=(1, 10**5000)),
        lambda: GPipe(10**5000),
        lambda: AsyncDGL(buffer=10**5000),
    ],
)
def test_no_number_is_too_long_for_its_error(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=re.escape("but it must be")):
        make()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data nonsense", "--data counts only with --profile, which measures a model: leave it out, or give --profile"),
        ("--threads 3", "--threads counts only with --profile"),
        ("--batch-size 3", "--batch-size counts only with --profile"),
        ("--depth 3", "--depth counts only with --profile"),
        ("--profile mlp --backward 3", "--backward is measured with --profile: leave it out"),
    ],
)
def test_a_plan_refuses_what_has_no_effect(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["plan", *words.split()], here, capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--methods bp gpipe:micro_batches=33", "error: gpipe:micro_batches=33: gpipe splits every batch into 33 parts"),
        ("--methods bp dsp:p=0", "error: dsp:p=0: dsp's lag p is 0, but"),
        ("--methods bp ddg:lr=-1", "error: ddg:lr=-1: lr is -1, but it must be at least 0"),
        ("--methods bp gpipe:micro_batches=32 --model cnn", "error: gpipe:micro_batches=32: "),
        ("--methods bp dgl-async:order=sampled --workers processes", "error: dgl-async:order=sampled: "),
        ("--methods bp fdg --batches 0", "error: batches is 0"),
        ("--methods bp fdg --stages 6", "error: cannot cut a network of 5 layers into 6 stages"),
    ],
)
def test_an_error_of_a_comparison_names_the_row(here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert expected in refused(["compare", *SMALL, *words.split()], here, capsys)
