"""Programs as people write them: scripts without a guard, with lambdas, classes and globals of their own; no file at all."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

SCRIPT = """
import enum, sys
from dataclasses import dataclass
from functools import partial
import torch
from torch import nn
from torch.nn.functional import cross_entropy
import delock

print("the program runs")
SCALE = 2.0
workers, children, how = [*sys.argv[1:], *["processes", "0", "fork"][len(sys.argv) - 1 :]]

class Kind(enum.Enum):
    TANH = torch.tanh
    TWICE = 2

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * Kind.TWICE.value

    @staticmethod
    def backward(ctx, error):
        return error * Kind.TWICE.value

class Base(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.kind, self.calls = nn.Linear(width, width), Kind.TWICE, None

class Block(Base):
    def forward(self, x):
        assert isinstance(self, Base) and type(self) is Block and self.kind is Kind.TWICE
        return super().__call__ and Twice.apply(self.linear(x))

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        assert type(state) is type(self.calls), "what comes home is of the class that is here"
        self.calls = state

@dataclass
class Calls:
    number: int = 0

@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return Batch(torch.full((4,), i / 16), torch.tensor(i % 3))

def together(rows):
    assert all(isinstance(row, Batch) for row in rows)
    return Batch(torch.stack([row.x for row in rows]), torch.stack([row.y for row in rows]))

def optimizer(lr):
    def made(named):
        return torch.optim.SGD([weight for _, weight in named], lr=lr)
    return made

torch.manual_seed(0)
loader = torch.utils.data.DataLoader(
    Rows(), 4, collate_fn=together, num_workers=int(children), multiprocessing_context=how if int(children) else None
)
model = nn.Sequential(Block(4), nn.Tanh(), Block(4), nn.Linear(4, 3))
model[0].calls, model[2].calls = Calls(), Calls()  # no function that is sent names the class
result = delock.fit(
    model,
    delock.data.Batches(loader, inputs=lambda batch: batch.x, targets=lambda batch: batch.y),
    loss=lambda outputs, targets: SCALE * cross_entropy(outputs, targets),
    optimizer=optimizer(0.1),
    schedule=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    metrics={"right": lambda outputs, targets: (outputs.argmax(1) == targets).double().mean()},
    stages=2, epochs=2, workers=workers,
)
print(*result.losses)
"""


def run(*words: str, program: str | None = None, folder: Path | None = None) -> str:
    """The output of a program that ends well."""
    started = [sys.executable, "-W", "error::ResourceWarning", *words]
    done = subprocess.run(started, input=program, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def inline() -> str:
    """The output of the script if nothing is sent anywhere, run here."""
    said = StringIO()
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng(devices=[]), redirect_stdout(said):
        patched.setattr(sys, "argv", ["train.py", "inline"])
        exec(compile(SCRIPT, "train.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    return said.getvalue()


FROM_INPUT = "import sys; exec(compile(sys.stdin.read(), '<console>', 'exec'))"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["train.py"], marks=pytest.mark.slow),
        pytest.param(["-m", "train"], marks=pytest.mark.slow),
        pytest.param(["-"], marks=pytest.mark.slow),
        pytest.param(["-c", SCRIPT], marks=pytest.mark.slow),
        pytest.param(["-c", FROM_INPUT], marks=pytest.mark.slow),
        pytest.param(["train.py", "processes", "2"], marks=pytest.mark.slow),
        pytest.param(["-", "processes", "1", "forkserver"], marks=pytest.mark.slow),
        ["train.py", "processes", "1", "spawn"],
    ],
    ids=["file", "module", "standard input", "text", "no file", "children", "children of a server", "children afresh"],
)
def test_a_script_without_a_guard_runs_once_and_computes_the_same(words: list[str], inline: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    told = run(*words, program=SCRIPT, folder=tmp_path)
    assert told == inline
    assert told.count("the program runs") == 1


ILL = """
import multiprocessing, torch, delock
from torch.nn.functional import cross_entropy
def helper(x):
    if multiprocessing.parent_process():
        raise ArithmeticError("mine")  # a line of the user's
    return x
data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 2
made = lambda named: torch.optim.SGD(dict(named).values(), 0.1)
def trained(**more):
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    delock.fit(parts, data, loss=lambda o, t: helper(cross_entropy(o, t)), optimizer=made, epochs=1, **more)
trained(workers="inline")
child = multiprocessing.get_context("spawn").Process(target=print)
child.start()
child.join()
print(child.exitcode)
trained()
"""


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One program that does two things wrong, one after the other."""
    folder = tmp_path_factory.mktemp("ill")
    (folder / "train.py").write_text(ILL)
    return subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_an_error_in_the_users_code_shows_the_users_line(ill: subprocess.CompletedProcess[str]) -> None:
    told = ill.stderr[ill.stderr.index("stage 1 failed in B0") :]
    assert "ArithmeticError: mine" in told
    assert 'raise ArithmeticError("mine")  # a line of the user\'s\n' in told
    assert "line 6, in helper" in told
    assert ill.returncode == 1


def test_a_process_of_the_scripts_own_that_runs_it_again_does_not_train(ill: subprocess.CompletedProcess[str]) -> None:
    assert ill.stdout == "1\n"
    assert ill.stderr.count("UsageError: the script that trains is run again by a process that it has started") == 1


REFUSED = """
import torch, delock
from torch.nn.functional import cross_entropy
images, labels = torch.ones(50_000, 100), torch.zeros(50_000, dtype=torch.long)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 10_000)
class Table:
    images = images
    def __call__(self, outputs, targets):
        return cross_entropy(outputs, targets)
def around(rows):
    return lambda outputs, targets: cross_entropy(outputs, targets) + 0 * rows[0, 0]
def regular(outputs, targets):
    return cross_entropy(outputs, targets) + 0 * images[0, 0]
def given(outputs, targets, more=images):
    return cross_entropy(outputs, targets) + 0 * more[0, 0]
def trained(loss=cross_entropy, **more):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    made = {"optimizer": lambda named: torch.optim.SGD([p for _, p in named], 0.1), **more}
    try:
        print(len(delock.fit(model, loader, loss=loss, stages=2, batches=2, **made).losses))
    except delock.UsageError as error:
        print(str(error).partition(": give it as data")[0])
trained(regular)
trained(Table())
trained(around(images))
trained(given)
trained(schedule=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=len(loader)))
trained()
"""


def test_large_globals_are_refused_by_name_unless_the_stage_is_given_them_anyway() -> None:
    """The loader is a part of what stage 0 gets, and not of what stage 1 gets."""
    more = "It would be sent to the process of stage 1 with it, and all that a function or a class uses may have 16 MB"
    assert run("-", program=REFUSED).splitlines() == [
        f"the global `images` of the function `regular` has 20 MB. {more}",
        f"the attribute `images` of the class `Table` has 20 MB. {more}",
        f"the variable `rows` of the lambda in line 11 has 20 MB. {more}",
        f"the argument `more` of the function `given` has 20 MB. {more}",
        f"the global `loader` of the lambda in line 28 has 20 MB. {more}",
        "2",
    ]
