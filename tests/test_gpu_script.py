"""On a machine without a GPU every part of tests/gpu/run.sh says why it is skipped; a part that fails or hangs is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from delock.methods import BP

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "gpu"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Loads what run.sh starts, as a module."""
    return loaded(HERE / "parts.py")


def loaded(path: Path) -> ModuleType:
    """Loads a script as a module."""
    spec = util.spec_from_file_location("a_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["a_script"] = util.module_from_spec(spec)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    del sys.modules["a_script"]
    return module


def test_without_a_gpu_every_part_is_skipped_with_its_reason(script: ModuleType, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    done = subprocess.run(["bash", HERE / "run.sh", tmp_path], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    parts = script.parts(tmp_path)
    lines = done.stdout.splitlines()[-len(parts) :]
    for part, line in zip(parts, lines, strict=True):
        count = "a GPU" if part.gpus == 1 else "2 GPUs"
        assert line.startswith(part.name)
        assert line.endswith(f"needs {count}, and torch sees none")
        assert line.removeprefix(part.name).split()[0] == "skipped"
    assert script.WHOLE <= 450, "with what comes before and after, eight minutes"


def test_what_fails_hangs_or_comes_too_late_fails(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        "good": "print('3 passed, 1 skipped in 0.1s')",
        "bad": "print('==== 1 failed, 2 passed in 3.00s ===='); raise SystemExit(1)",
        "dead": "import os; os.abort()",
        "slow": f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(60)",
    }
    todo = [script.Part(name, ["-c", code], seconds=1.0 if name == "slow" else 20.0) for name, code in words.items()]
    began = time.monotonic()
    outcomes = script.every(todo, 1, dict(os.environ), tmp_path)
    assert time.monotonic() - began < 20
    assert [(one.word, one.detail) for one in outcomes] == [
        ("passed", "3 passed, 1 skipped"),
        ("failed", "1 failed, 2 passed"),
        ("failed", "exit code -6"),
        ("failed", "not done after 1 s"),
    ]
    assert (tmp_path / "begun").exists()
    assert "1 failed, 2 passed" in capsys.readouterr().out, "the end of a failed part's log is shown"
    late = script.every(todo[:1], 1, dict(os.environ), tmp_path, whole=0.0)
    assert (late[0].word, late[0].detail) == ("failed", "no time was left of 0 s")


def test_wheels_bring_what_python_lacks_and_nothing_else(script: ModuleType, tmp_path: Path) -> None:
    for name in ("pytest", "no_such_package"):
        with zipfile.ZipFile(tmp_path / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    script.unpacked(tmp_path, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["no_such_package"]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("precision", ["single", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_benchmarks_contenders_run(precision: str) -> None:
    """Each can be built, and runs a turn of three batches, on a CPU, where nothing is captured."""
    run, device = loaded(ROOT / "benchmarks" / "gpu" / "run.py"), torch.device("cpu")
    names = [name for name in run.METHODS if precision == "single" or name != "fdg mixed"]  # which autocast does not go with
    work = run.Work("resnet8", 4, precision)
    base = run.Contender(work, BP(), 1, device)
    found = {name: run.rounds(base, rival(), 1, 3) for name, rival in run.rivals(work, names, [2], device)}
    assert all(one["ratio"] > 0 for one in found.values())
    text = run.table({str(work): {"where": "here", "rivals": found}})
    assert [line.split(" | ")[0] for line in text.splitlines() if " .. " in line] == [f"| {name}" for name in found]


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "matplotlib", "sklearn", "tensorboard"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
sys.path.insert(0, "benchmarks/gpu")
import pytest, run
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-n", "0", "tests/gpu"]))
"""


def test_the_tests_on_a_gpu_need_neither_torchvision_nor_matplotlib_nor_scikit_learn_nor_tensorboard() -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    for path in HERE.glob("test_*.py"):
        assert f"tests/gpu/{path.name}::" in done.stdout
