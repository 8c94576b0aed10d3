"""Measures training over a link of 100 Mbit/s with and without a codec, beside the same runs on a link without a limit.

    sudo python benchmarks/slow_link/run.py --out benchmarks/slow_link

ResNet-20 is cut after its first width into two stages, with batches of 128: an activation is 16 x 32 x 32 x 128 float32 numbers, 8.4 MB.
The ranks live in two network namespaces joined by a veth pair that tc limits in both directions. The expected time follows from bytes and
compute time: the stages' times without codec and limit are simulated with the messages' times on the link; it is at least a message's time
per batch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from namespaces import End, NotPermitted, inside, joined, limit

from delock.methods import make
from delock.timeline import Costs, predict

RATE, BITS = "100mbit", 100e6  # per second
PORT, PATIENCE = 29533, 300  # seconds for one run
CASES = (("dgl", "none", "none"), ("dgl", "vq", "none"), ("fdg", "none", "none"), ("fdg", "bf16", "bf16"))
Case = tuple[str, str, str]
Found = dict[Case, dict[str, dict[str, Any]]]  # case -> link -> what rank 0 reported


def measure(ends: tuple[End, End], case: Case, batches: int) -> dict[str, Any]:
    """Makes one run, with a rank in each namespace."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reported.json"
        ranks = [start(ends, rank, case, batches, out) for rank in range(2)]
        try:
            codes = [rank.wait(timeout=PATIENCE) for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        if not out.is_file():  # rank 1 was seen to abort while its interpreter exits, all work done: see tests/programs.py
            raise RuntimeError(f"the ranks of {case} ended with {codes}, and no result")
        reported: dict[str, Any] = json.loads(out.read_text())
    return reported


def start(ends: tuple[End, End], rank: int, case: Case, batches: int, out: Path) -> subprocess.Popen[bytes]:
    """Starts a rank with the variables that torchrun would set, on that interface alone."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ends[0].address,
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": ends[rank].interface,
    }
    program = Path(__file__).with_name("rank.py")
    words = inside(ends[rank], sys.executable, str(program), *case, str(batches), str(out))
    return subprocess.Popen(words, env={**os.environ, **variables})


def expected(found: Found, case: Case) -> float:
    """Returns the seconds per batch on the limited link, from the speed without codec and limit and the bytes of this case.

    The stages' times in that run, its slow first batches among them, are scaled so that they give its steady speed.
    """
    method, work, own = make(case[0]), found[case[0], "none", "none"]["unlimited"], found[case]["limited"]
    scale = work["seconds"] / predict(method, 2, Costs(tuple(work["forward"]), tuple(work["backward"]))).period
    forward, backward = (tuple(scale * seconds for seconds in work[what]) for what in ("forward", "backward"))
    up, down = 8 * own["up"] / BITS, 8 * own["down"] / BITS
    return max(predict(method, 2, Costs(forward, backward, up=(up,), down=(down,))).period, up, down)


def table(found: Found) -> str:
    """Returns a row per case, then the ratios."""
    lines = [
        "| method | codec up, down | MB up | MB down | ms, no limit | ms, 100 Mbit/s | ms, expected |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, one in found.items():
        sent = " | ".join(f"{one['limited'][way] / 1e6:.2f}" for way in ("up", "down"))
        seconds = (one["unlimited"]["seconds"], one["limited"]["seconds"], expected(found, case))
        times = " | ".join(f"{1000 * one:.0f}" for one in seconds)
        lines.append(f"| {case[0]} | {case[1]}, {case[2]} | {sent} | {times} |")
    lines.append("")
    for plain, coded in ((CASES[0], CASES[1]), (CASES[2], CASES[3])):
        slow, fast, free = (found[case][link]["seconds"] for case, link in ((plain, "limited"), (coded, "limited"), (coded, "unlimited")))
        best = expected(found, coded)
        speedup, hoped = slow / fast, expected(found, plain) / best
        lines += [
            f"* {coded[0]}, {coded[1]} over none: {speedup:.2f} times as fast, expected {hoped:.2f}: a share of {speedup / hoped:.2f}.",
            f"  Of the speed of the same codec without a limit it has {free / fast:.2f}, expected {min(1.0, free / best):.2f}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every case on both links, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=48, help="batches in a run")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # as Ctrl-C does: everything is taken down
    found: Found = {case: {} for case in CASES}
    try:
        with joined() as ends:
            for link, rate in (("unlimited", None), ("limited", RATE)):
                limit(ends, rate)
                for case in CASES:
                    reported = measure(ends, case, options.batches)
                    found[case][link] = reported
                    print(f"{link}: {' '.join(case)}: {1000 * reported['seconds']:.0f} ms per batch", flush=True)
    except NotPermitted as error:
        sys.exit(f"skipped: {error}")
    reported = table(found)
    print(reported)
    if options.out:
        (options.out / "table.md").write_text(reported)
        (options.out / "runs.json").write_text(json.dumps([{"case": case, **one} for case, one in found.items()], indent=1) + "\n")


if __name__ == "__main__":
    main()
