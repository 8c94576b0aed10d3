"""Several optimizers behind one, and Muon, which needs it: one state, one schedule, fused matrices in pieces, names of inner matrices."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from delock.errors import UsageError
from delock.nets import gpt
from delock.optim.muon import SplitMuon, is_inner_matrix
from delock.optim.several import Several
from delock.recipes import Schedule, muon

from walks import Named, advance, assert_equals, interrupted, start, walk


def pair(named: Named) -> Several:
    """SGD for the first two weights, AdamW in two groups for the rest."""
    groups = [{"params": named[2:3]}, {"params": named[3:], "lr": 0.01}]
    return Several([torch.optim.SGD(named[:2], lr=0.1, momentum=0.9), torch.optim.AdamW(groups, lr=0.02)])


def apart(named: Named, updates: int) -> None:
    """The same optimizers, each by itself, with their rates halved at every update."""
    several = pair(named).optimizers
    for n in range(updates):
        for optimizer in several:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("first", group["lr"]) * 0.5**n
        for one in several:
            advance(one, [pair for pair in named if any(pair[1] is w for group in one.param_groups for w in group["params"])], [n])


def test_one_schedule_acts_on_all_parts() -> None:
    named = start()
    apart(named, 6)
    together = walk(pair, 6, schedule=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert_equals(together, [w.detach() for _, w in named])


def test_its_groups_are_those_of_its_parts_also_when_loaded() -> None:
    named = start()
    optimizer = pair(named)
    advance(optimizer, named, range(3))
    state = optimizer.state_dict()
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.02, 0.01]
    assert sorted(state["state"]) == [0, 1, 2, 3]
    state["param_groups"][0]["lr"] = 0.3
    optimizer.load_state_dict(state)
    groups = [group for one in optimizer.optimizers for group in one.param_groups]
    assert all(mine is theirs for mine, theirs in zip(optimizer.param_groups, groups, strict=True))
    assert optimizer.optimizers[0].param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("factory", [pair, muon(), muon(adjust_lr_fn="match_rms_adamw")], ids=["pair", "muon", "muon, rms"])
def test_a_loaded_state_goes_on_as_the_whole(factory: Any) -> None:
    made = pickle.loads(pickle.dumps(factory))
    assert_equals(interrupted(made), walk(made, dtype=torch.float32))


def test_optimizers_that_have_a_state_keep_it() -> None:
    named, twins = start(), start()
    whole = pair(named)
    advance(whole, named, range(6))
    early = pair(twins).optimizers
    for n in range(3):
        for one, own in zip(early, (twins[:2], twins[2:]), strict=True):
            advance(one, own, [n])
    advance(Several(early), twins, range(3, 6))
    assert_equals([w.detach() for _, w in twins], [w.detach() for _, w in named])


def test_a_copy_goes_on_by_itself() -> None:
    named = start()
    optimizer = pair(named)
    advance(optimizer, named, range(3))
    twins, copied = copy.deepcopy((named, optimizer))
    advance(optimizer, named, range(3, 6))
    advance(copied, twins, range(3, 6))
    assert_equals([w.detach() for _, w in twins], [w.detach() for _, w in named])


def test_a_closure_is_evaluated_once() -> None:
    calls: list[int] = []
    assert pair(start()).step(lambda: calls.append(1) or 2.5) == 2.5
    assert calls == [1]


def test_refused() -> None:
    named = start()
    with pytest.raises(UsageError, match="add it to that one, then make Several"):
        pair(named).add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        Several([torch.optim.SGD(named), torch.optim.SGD(named)])


# -- muon --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["original", "match_rms_adamw"])
def test_muon_is_torchs_with_a_fused_matrix_as_three(rate: str) -> None:
    """The three maps as weights of their own, under torch's Muon, and AdamW with a tenth of its rate for the rest."""
    named = start(torch.float32)
    (_, qkv), (_, out), *rest = named
    pieces = [nn.Parameter(piece.clone()) for piece in qkv.detach().chunk(3)]
    by_torch = torch.optim.Muon([*pieces, out], lr=0.02, weight_decay=0.1, adjust_lr_fn=rate)
    adamw = torch.optim.AdamW(rest, lr=0.002, betas=(0.9, 0.95), weight_decay=0, fused=True)
    for n in range(12):
        qkv.data = torch.cat([piece.detach() for piece in pieces])
        advance(adamw, named, [n])  # every weight has its gradient
        for piece, grad in zip(pieces, qkv.grad.chunk(3), strict=True):  # type: ignore[union-attr]
            piece.grad = grad
        by_torch.step()
    qkv.data = torch.cat([piece.detach() for piece in pieces])
    found = walk(muon(weight_decay=0.1, adjust_lr_fn=rate), 12, torch.float32)
    assert_equals(found, [w.detach() for _, w in named])


def test_a_matrix_in_pieces_differs_from_the_whole() -> None:
    matrices = start(torch.float32)[:1]
    whole, split = torch.optim.Muon(matrices, lr=0.1), SplitMuon([{"params": matrices, "split": 3}], lr=0.1)
    assert whole.param_groups[0].keys() | {"split"} == split.param_groups[0].keys()
    change = []
    for optimizer in (whole, split):
        before = matrices[0][1].detach().clone()
        advance(optimizer, matrices, [0])
        change.append(matrices[0][1].detach() - before)
    assert not torch.allclose(*change, atol=1e-3)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = gpt(7, depth=1, width=8, heads=2, context=4)
    named = [*model.named_parameters(), ("heads.0.1.weight", nn.Parameter(torch.ones(3, 8)))]
    optimizer = muon()(named)
    names = {id(w): name for name, w in named}
    groups = [[names[id(w)] for w in group["params"]] for group in optimizer.param_groups]
    assert groups[:2] == [["block0.out.weight", "block0.up.weight", "block0.down.weight"], ["block0.qkv.weight"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.002]
    assert {"embed.token.weight", "head.weight", "heads.0.1.weight", "norm.weight", "block0.qkv.bias"} <= set(groups[2])
    assert optimizer.param_groups[2]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "shape", "inner"),
    [
        ("transformer.h.0.attn.c_attn.weight", (12, 4), True),
        ("blocks.0.sa.heads.0.key.weight", (4, 4), True),
        ("0.weight", (4, 4), True),
        ("layer.fc.weight", (4, 4), True),
        ("0.bias", (4,), False),
        ("conv1.weight", (4, 4, 3, 3), False),
        ("transformer.wte.weight", (9, 4), False),
        ("model.embed_tokens.weight", (9, 4), False),
        ("pos_embedding", (9, 4), False),
        ("lm_head.weight", (9, 4), False),
        ("fc.weight", (9, 4), False),
        ("heads.1.norm_out.weight", (9, 4), False),
        ("_orig_mod.fc.weight", (9, 4), False),
        ("module.fc.weight", (9, 4), False),
        ("module._orig_mod.blocks.0.fc._checkpoint_wrapped_module.weight", (9, 4), True),
    ],
)
def test_inner_matrices_are_known_by_name(name: str, shape: tuple[int, ...], inner: bool) -> None:
    assert is_inner_matrix(name, torch.empty(shape)) is inner


def every(name: str, parameter: Tensor) -> bool:
    """Takes all matrices."""
    return parameter.dim() == 2


def test_a_stage_with_weights_of_one_kind_has_one_optimizer() -> None:
    named = start()
    assert type(muon()(named[2:])) is torch.optim.AdamW
    assert type(muon()(named[:2])) is SplitMuon
    assert type(muon(matrices=every)([named[0], named[3]])) is SplitMuon


def test_a_schedule_of_ours_drives_it() -> None:
    optimizer = muon()(start())
    schedule = Schedule("cosine", 4, warmup=2)(optimizer)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([0.02 * f, 0.02 * f, 0.002 * f]) for f in (0.5, 1, 1, 0.5)]
    assert partial(muon, lr=0.1)() == muon(0.1)
