"""The parent's peak memory in `fit`, above its own model, beside the weights of the largest stage.

    python benchmarks/any_model/parent_memory.py --out benchmarks/any_model
    python benchmarks/any_model/parent_memory.py --before ../main/src --out benchmarks/any_model     with an earlier checkout beside it

Every model runs in a process of its own: a GPT-2 of transformers, which is traced, and a chain of linear layers, with about 100 and 200
million parameters, in two and four stages. The peak is the system's (VmHWM), reset when the model has been made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[1] / "src"
MIB = 2**20
TOKENS = 32
GPT2S = {"gpt2-tiny": (24, 4), "gpt2-100m": (768, 12), "gpt2-200m": (1152, 10)}
CHAINS = {"chain-tiny": (16, 4), "chain-100m": (2048, 24), "chain-200m": (2048, 48)}


def main() -> None:
    """Run all cases, write parent_memory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder src of an earlier checkout")
    parser.add_argument("--models", nargs="+", default=["gpt2-100m", "gpt2-200m", "chain-100m", "chain-200m"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(peak_of(asked.case[0], int(asked.case[1]))))
        return
    sources = {"before": asked.before.resolve(), "now": OWN} if asked.before else {"now": OWN}
    head = "| model | parameters | stages | weights | largest stage | "
    lines = [head + " | ".join(f"peak, {name} | in largest stages" for name in sources) + " |"]
    lines.append("|" + "---|" * (5 + 2 * len(sources)))
    print("\n".join(lines))
    for model in asked.models:
        for stages in asked.stages:
            found = {name: in_process(source, model, stages) for name, source in sources.items()}
            now = found["now"]
            row = f"| {model} | {now['parameters'] / 1e6:.0f} M | {stages} | {mib(now['weights'])} | {mib(now['largest'])} | "
            row += " | ".join(f"{mib(one['peak'])} | {one['peak'] / one['largest']:.2f}" for one in found.values()) + " |"
            print(row, flush=True)
            lines.append(row)
    if asked.out:
        (asked.out / "parent_memory.md").write_text("\n".join(lines) + "\n")


def mib(size: int) -> str:
    """Return bytes in MiB."""
    return f"{size / MIB:.0f} MiB"


def in_process(source: Path, model: str, stages: int) -> dict[str, int]:
    """Return the figures of one case, run with the package of this folder."""
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "PYTHONPATH": str(source), "DELOCK_CACHE": cache}
        command = [sys.executable, str(Path(__file__).resolve()), "--case", model, str(stages)]
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_of(name: str, stages: int) -> dict[str, int]:
    """Run fit for two batches; return parameters, bytes of the weights, of the largest stage, and of the peak above the model."""
    import torch

    from delock import fit
    from delock.launch import peak_memory

    device = torch.device("cpu")

    def run(name: str) -> Any:
        model, batches, loss = chain(*CHAINS[name]) if name in CHAINS else gpt2(*GPT2S[name])
        before = peak_memory.reset_peak(device)
        fitted = fit(model, batches, loss=loss, optimizer=partial(torch.optim.SGD, lr=1e-3), method="bp", stages=stages, batches=2)
        return model, fitted, peak_memory.peak(device) - before

    run(f"{name.split('-')[0]}-tiny")  # what is loaded once, programs and their tables, is no matter of the model
    model, result, peak = run(name)
    sizes = [stage.parameters * 4 for stage in result.stages]
    whole = sum(p.numel() for p in model.parameters())
    return {"parameters": whole, "weights": 4 * whole, "largest": max(sizes), "peak": peak}


def gpt2(wide: int, deep: int) -> tuple[Any, list[Any], Any]:
    """Return a GPT-2 with weights of its own making, and two batches of random text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=wide, n_layer=deep, n_head=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    text = torch.randint(0, config.vocab_size, (2, 2, TOKENS))
    return GPT2LMHeadModel(config), [{"input_ids": one, "labels": one} for one in text], None


def chain(wide: int, count: int) -> tuple[Any, list[Any], Any]:
    """Return a chain of linear layers, and two batches of noise."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts = [part for _ in range(count) for part in (nn.Linear(wide, wide), nn.ReLU())]
    data = [(torch.randn(4, wide), torch.randint(0, wide, (4,))) for _ in range(2)]
    return nn.Sequential(*parts), data, nn.functional.cross_entropy


if __name__ == "__main__":
    main()
