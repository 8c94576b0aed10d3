"""Heads that fit: of stages of any model, for labels per sample, word or pixel, and of models that return dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock import UsageError, fit
from delock.keys import key
from delock.nets.heads import Logits, build_fitting, fitting
from delock.partition.graph.structure import take_apart
from delock.partition.head_loss import head_loss

from specimens import ADAMW, CLASSES, SGD, Specimen, labels, padded, per_word, scenes, words
from zoo import ZOO
from zoo_own import UNet, both_tasks

pytestmark = pytest.mark.usefixtures("own_random")

# -- one model of each family ------------------------------------------------------------------------------------------------------


def next_word(out: Any, targets: Tensor) -> Tensor:
    return per_word(out.logits[:, :-1], targets[:, 1:])


def of_logits(out: Any, targets: Tensor) -> Tensor:
    return per_word(out.logits, targets)


def of_samples(out: Any, targets: Tensor) -> Tensor:
    return cross_entropy(out.logits, targets)


def translated(n: int, g: torch.Generator) -> dict[str, Tensor]:
    ids = words(n, g, 7)
    return {**padded(n, g), "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def with_loss(name: str, loss: Callable[[Any, Any], Tensor], batch: Any = None) -> Specimen:
    return replace(ZOO[name], loss=loss, batch=batch or ZOO[name].batch)


FAMILIES: dict[str, tuple[Specimen, list[str]]] = {
    "torchvision classification": (ZOO["tv mobilenet_v3"], ["features.2"]),
    "torchvision segmentation": (ZOO["tv lraspp"], ["classifier"]),
    "timm convolutional": (ZOO["timm test_convnext"], []),
    "timm transformer": (ZOO["timm beit"], ["blocks.1"]),
    "decoder": (with_loss("hf GPT2LMHeadModel", next_word), ["transformer.h.1"]),
    "encoder": (with_loss("hf BertForSequenceClassification", of_samples), ["bert.encoder.layer.1"]),
    "encoder-decoder": (with_loss("hf T5ForConditionalGeneration", of_logits, translated), ["decoder.block.1"]),
    "recurrent": (ZOO["LSTM and GRU"], []),
    "own": (ZOO["U-Net"], []),
}


SLOW = ("encoder", "encoder-decoder")  # with which the decoder shares its heads
EACH = [
    pytest.param(family, method, marks=[] if i % 2 == j and family not in SLOW else [pytest.mark.slow])
    for i, family in enumerate(FAMILIES)
    for j, method in enumerate(("dgl", "interlocking"))
]


@pytest.mark.parametrize(("family", "method"), EACH)
def test_local_losses_train_a_model_of_each_family(family: str, method: str) -> None:
    specimen, cuts = FAMILIES[family]
    model = specimen.model()
    before = copy.deepcopy(model.state_dict())
    one = specimen.train()[0]
    options = {**specimen.fit_options(), "cuts": cuts or None, "stages": 2}
    result = fit(model, [one] * 6, method=method, batches=6, workers="inline", **options)
    assert min(result.losses[-2:]) < result.losses[0]
    learned = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert len(learned) > len(list(model.parameters())) / 2


# -- against a loop by hand --------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A network of tokens with a class per sample, as a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def low(self, x: Tensor) -> Tensor:
        h = self.inp(x.unflatten(1, (3, 4)))
        for block in self.blocks[:2]:
            h = h + block(h)
        return h

    def high(self, h: Tensor) -> Tensor:
        for block in self.blocks[2:]:
            h = h + block(h)
        return self.out(h.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x))


class Halves(UNet):
    """A U-Net whose skips cross the cut in front of its middle."""

    def low(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.down:
            x = block(x)
            found.append(x)
        return found

    def high(self, found: list[Tensor]) -> Tensor:
        *skips, last = found
        x = self.middle(last)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.out(x)


def greedy(model: Any, head: nn.Module, data: list[tuple[Tensor, Tensor]], parts: tuple[list[Any], list[Any]]) -> None:
    """Trains both halves on losses of their own."""
    lower = SGD([w for part in (*parts[0], head) for w in part.parameters()])
    upper = SGD([w for part in parts[1] for w in part.parameters()])
    for x, y in data:
        found = model.low(x)
        main = found if isinstance(found, Tensor) else found[-1]
        for optimizer in (lower, upper):
            optimizer.zero_grad()
        cross_entropy(head(main), y).backward()
        cross_entropy(model.high(found.detach() if isinstance(found, Tensor) else [one.detach() for one in found]), y).backward()
        lower.step()
        upper.step()


def vectors(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 12, generator=g), labels(n, g)


@pytest.mark.parametrize("case", ["tokens", "pixels", "own"])
def test_dgl_of_a_traced_model_is_the_loop(case: str) -> None:
    """The head sees the main activation alone, whatever else crosses the cut."""
    g = torch.Generator().manual_seed(0)
    if case == "tokens":
        model: Any = Patches()
        data, cut = [vectors(4, g) for _ in range(3)], "blocks.2"
        name, shape, logits = "tokens", (4, 3, 8), (4, CLASSES)
        mine: Any = copy.deepcopy(model)
        parts = [mine.inp, *mine.blocks[:2]], [*mine.blocks[2:], mine.out]
    else:
        model, cut = Halves(), "middle"
        data = [scenes(4, g, 16) for _ in range(3)]
        name, shape, logits = "pixels", (4, 16, 4, 4), (4, CLASSES, 16, 16)
        mine = copy.deepcopy(model)
        parts = [*mine.down], [mine.middle, *mine.up, *mine.join, mine.out]
    labelled = Logits.of(logits, data[0][1].shape)
    assert fitting(shape, labelled) == name
    head = build_fitting(name, shape, labelled, key(0, "head", 0))
    heads = [copy.deepcopy(head)] if case == "own" else None
    greedy(mine, head, data, parts)
    fit(model, data, loss=cross_entropy, method="dgl", cuts=[cut], optimizer=SGD, batches=3, workers="inline", heads=heads)
    state = mine.state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == []
    if heads:
        assert all(torch.equal(value, head.state_dict()[name]) for name, value in heads[0].state_dict().items())


def test_processes_and_inline_train_the_same() -> None:
    specimen = ZOO["tv lraspp"]
    runs = []
    for workers in ("inline", "processes"):
        model = specimen.model()
        fit(model, specimen.train(), method="dgl", cuts=["classifier"], epochs=1, workers=workers, **specimen.fit_options())
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


# -- which head --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "logits", "targets", "name"),
    [
        ((4, 8), (4, 5), (4,), "linear"),
        ((4, 7, 8), (4, 5), (4,), "tokens"),
        ((4, 6, 6, 8), (4, 5), (4,), "tokens"),
        ((4, 8, 6, 6), (4, 5), (4,), "mlp-sr"),
        ((4, 8, 3, 6, 6), (4, 5), (4,), "volume"),
        ((4, 8), (4,), (4,), "linear"),
        ((4, 8, 6, 6), (4,), (), "mlp-sr"),
        ((4, 7, 8), (4, 7, 5), (4, 7), "transformer"),
        ((4, 7, 8), (4, 7, 5), (), "transformer"),
        ((4, 7, 8), (28, 5), (28,), "transformer"),
        ((4, 7, 8), (4, 5, 7), (4, 7), "transformer"),
        ((4, 8, 7), (4, 5, 7), (4, 7), "pixels"),
        ((4, 8, 3), (4, 5, 7), (4, 7), "pixels"),
        ((4, 8, 3, 5), (4, 5, 9, 15), (4, 9, 15), "pixels"),
        ((4, 8, 3, 3, 3), (4, 1, 6, 6, 6), (), "pixels"),
        ((4, 9, 8), (4, 7, 5), (4, 7), ""),
        ((7, 4, 8), (4, 5), (4,), ""),
        ((4, 49, 8), (4, 5, 7, 7), (4, 7, 7), ""),
        ((4,), (4, 5), (4,), ""),
    ],
)
def test_the_head_is_chosen_by_what_the_loss_takes(shape: Any, logits: Any, targets: Any, name: str) -> None:
    wanted = Logits.of(logits, targets)
    assert fitting(shape, wanted) == name
    if name:
        assert build_fitting(name, shape, wanted, 0)(torch.randn(shape)).shape == logits


def test_an_image_of_another_size_is_resized_by_the_same_ratio() -> None:
    head = build_fitting("pixels", (2, 8, 5, 4), Logits((2, 3, 20, 16), 1), 0)
    assert head(torch.randn(3, 8, 7, 6)).shape == (3, 3, 28, 24)


# -- what the loss is given --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Any
    extra: Any


def stands(function: Callable[[Any, Any], Any], returned: Any, targets: Any) -> Any:
    """Returns where a head's tensor stands, or why nowhere."""
    leaves, structure = take_apart(returned)
    found, why = head_loss(function, structure, [(tuple(one.shape), one.dtype) for one in leaves], targets)
    return found, why


LOGITS, HIDDEN, Y = torch.zeros(4, CLASSES), torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)


def test_a_head_stands_for_the_output_that_the_loss_takes() -> None:
    from transformers.modeling_outputs import SequenceClassifierOutput

    made = SequenceClassifierOutput(logits=LOGITS, hidden_states=(HIDDEN, HIDDEN))
    cases: list[tuple[Callable[[Any, Any], Any], Any, int]] = [
        (cross_entropy, LOGITS, 0),
        (lambda out, y: cross_entropy(out.logits, y), made, 0),
        (lambda out, y: cross_entropy(out["logits"], y) + (out["aux"].sum() if "aux" in out else 0), {"aux": HIDDEN, "logits": LOGITS}, 1),
        (lambda out, y: cross_entropy(out.logits, y) if out.extra is None else None, Pair(LOGITS, HIDDEN), 0),
        (lambda out, y: cross_entropy(out[1][0], y) + out[0], (torch.zeros(()), [LOGITS]), 1),
    ]
    for function, returned, place in cases:
        found, _ = stands(function, returned, Y)
        assert found.place == place
        x = torch.randn(4, CLASSES)
        assert torch.equal(found(x, Y), cross_entropy(x, Y))


def test_a_loss_of_several_outputs_needs_heads_that_return_them() -> None:
    returned = {"kind": LOGITS, "more": (torch.zeros(4), HIDDEN)}
    targets = {"kind": Y, "value": torch.zeros(4)}
    found, why = stands(both_tasks, returned, targets)
    assert found.place is None
    assert "NoneType" in why
    x, value = torch.randn(4, CLASSES), torch.ones(4)
    assert torch.equal(found((x, value, HIDDEN), targets), cross_entropy(x, Y) + 1)
    assert torch.equal(replace(found, function=cross_entropy)(x, Y), cross_entropy(x, Y))


# -- refusals ----------------------------------------------------------------------------------------------------------------------

run = partial(fit, optimizer=ADAMW, method="dgl", stages=2, batches=1, workers="inline")


def test_a_model_with_a_loss_of_its_own_is_asked_for_one() -> None:
    one = ZOO["hf GPT2LMHeadModel"]
    with pytest.raises(UsageError, match=r"dgl has a loss in every stage, but this model computes its loss itself, .*: give fit a loss"):
        run(one.model(), one.train())


class Turned(nn.Module):
    """Has its samples on the second axis in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (3, 4)).transpose(0, 1).contiguous()
        for layer in self.layers:
            h = torch.tanh(layer(h)) + h
        return self.out(h.mean(0))


def test_a_stage_without_a_head_shows_its_shape() -> None:
    data = [vectors(4, torch.Generator().manual_seed(0))]
    says = r"no head is known for stage 0, whose output is \(3, 4, 4\) float32, and the loss takes \(4, 5\): cut elsewhere, or give heads="
    with pytest.raises(UsageError, match=says):
        run(Turned(), data, loss=cross_entropy, cuts=["layers.1"])
    with pytest.raises(UsageError, match=r"head of stage 0, whose input is \(3, 4, 4\) float32, does not fit: .*\(3, 4, 5\)"):
        run(Turned(), data, loss=cross_entropy, cuts=["layers.1"], heads=[nn.Linear(4, CLASSES)])
    two = ZOO["dicts"]
    with pytest.raises(UsageError, match=r"no head is known for stage 0, .* and the loss needs more than one tensor"):
        run(two.model(), two.train(), loss=both_tasks)


class Towers(nn.Module):
    """Computes two towers one after the other, and joins them late."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(12, 12) for _ in range(2)) for _ in range(2))
        self.top = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for layer in self.left:
            a = torch.tanh(layer(a))
        for layer in self.right:
            b = torch.tanh(layer(b))
        h = a * b
        for layer in self.top:
            h = torch.tanh(layer(h))
        return self.out(h)


def test_what_a_head_cannot_see_is_not_left_untrained() -> None:
    data = [vectors(4, torch.Generator().manual_seed(0))]
    says = r"the head of stage 0 is given the main activation alone, which does not depend on left.0.weight and 3 more, .*: cut elsewhere"
    with pytest.raises(UsageError, match=says):
        run(Towers(), data, loss=cross_entropy, cuts=["right.1"])
    run(Towers(), data, loss=cross_entropy, cuts=["top.0"])
    run(Towers(), data, loss=cross_entropy, cuts=["right.1"], method="bp")
    run(Towers(), data, loss=cross_entropy, cuts=["right.1"], method="interlocking")


def test_cuts_are_chosen_where_a_head_is_known() -> None:
    """The places with samples on the second axis are left out."""

    class Late(Turned):
        def forward(self, x: Tensor) -> Tensor:
            h = x.unflatten(1, (3, 4)).transpose(0, 1).contiguous()
            for layer in self.layers[:2]:
                h = torch.tanh(layer(h)) + h
            return self.out(self.layers[2](h.mean(0)))

    data = [vectors(4, torch.Generator().manual_seed(0))]
    result = run(Late(), data, loss=cross_entropy)
    assert result.stages[1].parameters <= 20 + 25
