"""The same call gives the same numbers, also on a busy machine: nobody says where to cut, and every run cuts there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_random")]

WORDS = ["train", *SMALL, "--model", "resnet8", "--method", "fdg", "--stages", "3", "--batches", "4", "--threads", "1"]
BUSY = "while True: pass"


@pytest.mark.timeout(900)
def test_twenty_runs_have_one_cut_and_equal_bits(here: Path) -> None:
    """Ten of them run beside two busy processes."""
    found = set()
    for number in range(20):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 if number % 2 else 0)]
        try:
            words = [sys.executable, "-m", "delock", *WORDS, "--out", f"run-{number}"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        finally:
            for one in busy:
                one.kill()
                one.wait()
        cuts = json.loads(Path(f"run-{number}", "summary.json").read_text())["cuts"]
        assert f"cut at {' '.join(map(str, cuts))}, even by counted work (--cuts " in done.stdout
        found.add((tuple(cuts), hashlib.sha256(Path(f"run-{number}", "model.safetensors").read_bytes()).hexdigest()))
    assert len(found) == 1
