"""Times the stages of a traced network against those of the same network given as a chain, in turns, in processor time of one thread.

python benchmarks/any_model/speed.py --rounds 300
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


def networks() -> dict[str, tuple[nn.Module, Tensor, str]]:
    """Returns ResNet-20 and a GPT with a batch for each, and the module in front of which they are cut."""
    torch.manual_seed(0)
    image = torch.randn(32, 3, 32, 32)
    text = torch.randint(0, 65, (8, 64))
    return {
        "ResNet-20": (build("resnet20", classes=10, in_channels=3, image_size=32), image, "layer2.0"),
        "GPT, 4 blocks of width 128": (gpt(65, context=64), text, "block2"),
    }


def parts(model: nn.Module, x: Tensor, cut: str) -> list[nn.Module]:
    """Returns a model in two stages."""
    network = Network(model)
    if not network.chain:
        network.trace(Call(), Examples.by_rows((x,), len(x), model), 2, [cut])
    found = network.layers()
    names = [layer.name for layer in found]
    return list(stages(found, [names.index(cut)]))


def weights_of(modules: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Returns what each stage differentiates for: listed once, as a stage does."""
    return [[p for p in module.parameters() if p.requires_grad] for module in modules]


def step(modules: Sequence[nn.Module], x: Tensor, weights: Sequence[Sequence[Tensor]]) -> float:
    """Returns the seconds of one forward and backward through all stages, cut off from each other as stages are."""
    began = time.thread_time()
    held = []
    value = x
    for k, module in enumerate(modules):
        leaf = value.detach().requires_grad_(k > 0)
        out = module(leaf)
        held.append((leaf, out))
        value = out
    error = torch.ones_like(value)
    for k, (leaf, out) in reversed(list(enumerate(held))):
        found = torch.autograd.grad(out, [*([leaf] if k else []), *weights[k]], error)
        error = found[0]
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="of four steps each: chain, traced, traced, chain")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | chain, ms | traced / chain: median (quartiles) |\n|---|---:|---:|")
    for name, (net, x, cut) in networks().items():
        chain, traced = parts(copy.deepcopy(net), x, cut), parts(Hidden(copy.deepcopy(net)), x, f"net.{cut}")
        pairs = [(one, weights_of(one)) for one in (chain, traced, traced, chain)]
        rounds = [[step(one, x, weights) for one, weights in pairs] for _ in range(asked.rounds + 5)][5:]
        low, middle, high = statistics.quantiles([(b + c) / (a + d) for a, b, c, d in rounds])
        least = statistics.median(a + d for a, _, _, d in rounds) / 2
        print(f"| {name} | {1e3 * least:.1f} | {middle:.3f} ({low:.3f}, {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
