"""Times the stages of a traced network against those of the same network given as a chain, in turns, in processor time of one thread.

python benchmarks/any_model/speed.py --rounds 15
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.nets.gpt import gpt
from delock.nets.models import build
from delock.partition.graph.examples import Examples
from delock.partition.network import Network
from delock.partition.stages import stages


class Hidden(nn.Module):
    """Calls a network that would be a chain if it stood alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.net(x)
        return made


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Returns ResNet-20 and a GPT with a batch for each."""
    torch.manual_seed(0)
    image = torch.randn(32, 3, 32, 32)
    text = torch.randint(0, 65, (8, 64))
    return {
        "ResNet-20": (build("resnet20", classes=10, in_channels=3, image_size=32), image),
        "GPT, 4 blocks of width 128": (gpt(65, context=64), text),
    }


def parts(model: nn.Module, x: Tensor, cut: float) -> list[nn.Module]:
    """Returns a model in two stages, cut at about the same place."""
    network = Network(model)
    if not network.chain:
        network.trace(Call(), Examples.by_rows((x,), len(x), model), 2)
    found = network.layers()
    names = [layer.name.removeprefix("net.") for layer in found]
    at = names.index(WHERE[cut]) if WHERE.get(cut) in names else int(len(found) * cut)
    return list(stages(found, [at]))


WHERE: dict[float, str] = {}


def step(modules: Sequence[nn.Module], x: Tensor) -> float:
    """Returns the seconds of one forward and backward through all stages, cut off from each other as stages are."""
    began = time.thread_time()
    held = []
    value = x
    for k, module in enumerate(modules):
        leaf = value.detach().requires_grad_(k > 0)
        out = module(leaf)
        held.append((leaf, out, [p for p in module.parameters() if p.requires_grad]))
        value = out
    error = torch.ones_like(value)
    for k, (leaf, out, weights) in reversed(list(enumerate(held))):
        found = torch.autograd.grad(out, [*([leaf] if k else []), *weights], error)
        error = found[0]
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | chain, ms | traced / chain: median (least, most) |\n|---|---:|---:|")
    for name, (net, x) in networks().items():
        WHERE[0.5] = {"ResNet-20": "layer2.0"}.get(name, "block2")
        chain, traced = parts(copy.deepcopy(net), x, 0.5), parts(Hidden(copy.deepcopy(net)), x, 0.5)
        ratios, times = [], []
        for _ in range(asked.rounds + 1):
            a = sum(step(chain, x) for _ in range(asked.steps))
            b = sum(step(traced, x) for _ in range(asked.steps))
            c = sum(step(chain, x) for _ in range(asked.steps))
            ratios.append(2 * b / (a + c))
            times.append((a + c) / 2 / asked.steps)
        ratios, times = ratios[1:], times[1:]
        print(f"| {name} | {1e3 * statistics.median(times):.1f} | {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f}) |")


if __name__ == "__main__":
    main()
