"""`delock.fit` on one's own: stages, loaders, tuples between stages, parameter groups, a network frozen in part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.data.iterable import as_loader
from delock.methods import FDG

from points import fit, network, same, train_data, weighted, weights


def test_a_list_of_stages_is_a_stage_each() -> None:
    parts = [nn.Sequential(*part) for part in (list(network())[:2], list(network())[2:4], list(network())[4:])]
    before = [value.clone() for value in weights(parts)]
    _, result = fit(parts)
    assert len(result.stages) == 3
    whole, _ = fit(cuts=[2, 4])
    assert all(torch.equal(a, b) for a, b in zip(weights(parts), weights(whole), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(parts), before, strict=True))


class Tokens:
    """An own Loader of integer inputs with a seed of its own; sequences grow fourfold, messages so from 2 to 100 kilobytes."""

    def __len__(self) -> int:
        return 4

    def sizes(self) -> None:
        return None

    def epoch(self, e: int) -> Iterator[tuple[Any, Any]]:
        g = torch.Generator().manual_seed(e)
        for b in range(4):
            tokens = torch.randint(7, (3, 2 * 4**b), generator=g)
            yield (tokens, tokens > 3), [tokens.roll(1), None]


class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 64)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = inputs
        return self.table(tokens), mask


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 7)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        h, mask = inputs
        logits: Tensor = self.out(h * mask[..., None])
        return logits


def token_loss(out: Tensor, targets: list[Any]) -> Tensor:
    return cross_entropy(out.flatten(0, 1), targets[0].flatten(), ignore_index=0)


def tokens_model() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [Look(), Read()]


def test_own_loader_tuples_integers_and_lengths_that_change() -> None:
    here, a = fit(tokens_model(), Tokens(), Tokens(), loss=token_loss, method=FDG(beta=0.5), epochs=3)
    there, b = fit(tokens_model(), Tokens(), Tokens(), loss=token_loss, method=FDG(beta=0.5), epochs=3, workers="processes")
    assert same(here, there)
    assert a.losses == b.losses
    assert [e.test_loss for e in a.evaluations] == [e.test_loss for e in b.evaluations]


def no_decay(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Biases and batch norm apart, by their names in the whole network; layer 6 has a rate of its own."""
    groups = [{"params": [p for n, p in named if n.endswith("bias") or n.startswith("1.")], "weight_decay": 0.0}]
    groups += [{"params": [p for n, p in named if n == "6.weight"], "lr": 0.01}]
    groups += [{"params": [p for n, p in named if not n.endswith("bias") and not n.startswith("1.") and n != "6.weight"]}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, weight_decay=0.5)


@pytest.mark.parametrize("cuts", [[], [2], [1, 4, 5]], ids=str)
def test_parameter_groups_by_the_names_of_the_whole_network(cuts: list[int]) -> None:
    """BP over stages with groups equals plain PyTorch with the same groups."""
    plain = network(0.0)
    optimizer = no_decay(list(plain.named_parameters()))
    for e in range(2):
        for x, y in as_loader(train_data(), 0).epoch(e):
            optimizer.zero_grad()
            weighted(plain(x), y).backward()
            optimizer.step()
    model, _ = fit(network(0.0), optimizer=no_decay, method="bp", cuts=cuts)
    assert same(model, plain)


def test_a_network_may_be_frozen_in_part() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, cuts=[1])
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[4].weight, network()[4].weight)
