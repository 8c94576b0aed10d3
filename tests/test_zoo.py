"""Models as people bring them: a split of each trains, bit for bit, as plain PyTorch trains the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from math import isfinite
from typing import Any

import pytest
import torch
from torch import nn
from torch._C import _functorch

import delock
from delock.errors import UsageError
from delock.records import Result

import zoo
from specimens import Specimen, of_logits
from zoo import ODD, REFUSED, ZOO

SHOWN = {  # one of each family, which every change is tried on
    "torchvision classification": "tv mobilenet_v3",
    "torchvision segmentation": "tv lraspp",
    "timm convolutional": "timm test_efficientnet_evos",
    "timm transformer": "timm beit",
    "decoder with tied embedding": "hf GPT2LMHeadModel",
    "encoder": "hf BertForSequenceClassification",
    "encoder-decoder": "hf T5ForConditionalGeneration",
    "state-space or recurrent": "LSTM and GRU",
    "own": "U-Net",
}
IN_PROCESSES = ("tv lraspp", "hf GPT2LMHeadModel", "U-Net")
REFUSED_SHOWN = ("a branch", "a number")

GAPS = {
    "hf BloomForCausalLM": "an autograd.Function with a gradient of its own is lost in torch.export",
}
TWO_AT_MOST = {"two modes": "the body, whose norms are written, is called twice in evaluation: no cut can come between"}

plain = cache(zoo.train)


def specimens(often: Collection[str] = (), of: Iterable[Specimen] = ZOO.values(), gaps: Mapping[str, str] = GAPS) -> list[Any]:
    """Specimens as parameters of a test, all but a few of them slow; those with a gap are expected to fail."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        gap = [pytest.mark.xfail(strict=True, reason=gaps[name])] if name in gaps else []
        return gap if name in often else [*gap, pytest.mark.slow]

    return [pytest.param(one, id=one.name, marks=marks(one.name)) for one in of]


def fit(specimen: Specimen, **options: Any) -> tuple[nn.Module, Result]:
    """The model after a run of `fit`, inline and in two stages unless it says otherwise."""
    model = specimen.model()
    options = {"stages": 2, "workers": "inline", "epochs": 1, **specimen.fit_options(), **options}
    return model, delock.fit(model, specimen.train(), specimen.test(), **options)


def assert_plain(specimen: Specimen, model: nn.Module, result: Result) -> None:
    """Weights, buffers, losses and the evaluation are those of the whole model in plain PyTorch."""
    state, losses, test_loss = plain(specimen)
    found, tests = zoo.state(model), [one.test_loss for one in result.evaluations]
    assert found.keys() == state.keys()
    if specimen.exact:
        assert [name for name, value in state.items() if not torch.equal(value, found[name])] == []
        assert (result.losses, tests) == (losses, [test_loss])
    else:
        assert [name for name, value in state.items() if not torch.allclose(value, found[name], 1e-4, 1e-6)] == []
        assert [*result.losses, *tests] == pytest.approx([*losses, test_loss], 1e-5)


# -- the zoo itself ----------------------------------------------------------------------------------------------------------------


def test_the_zoo_is_large_enough() -> None:
    families = Counter(one.family for one in ZOO.values())
    assert set(families) == set(SHOWN)
    assert sum(families.values()) >= 45
    assert min(families.values()) >= 4
    assert {ZOO[name].family: name for name in SHOWN.values()} == SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("specimen", ZOO.values(), ids=ZOO)
def test_plain_pytorch_gives_the_same_twice(specimen: Specimen) -> None:
    """Nothing draws at random, so that a difference is a fault of the split."""
    again = zoo.train(specimen)
    state, losses, test_loss = plain(specimen)
    assert (losses, test_loss) == again[1:]
    assert [name for name, value in state.items() if not torch.equal(value, again[0][name])] == []


# -- as plain PyTorch --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specimen", specimens(set(SHOWN.values()) - set(IN_PROCESSES)))
def test_two_stages_are_the_whole_model(specimen: Specimen) -> None:
    assert_plain(specimen, *fit(specimen, method="bp"))


@pytest.mark.parametrize("specimen", specimens(gaps=GAPS | TWO_AT_MOST))
def test_three_stages_are_the_whole_model(specimen: Specimen) -> None:
    assert_plain(specimen, *fit(specimen, method="bp", stages=3))


@pytest.mark.parametrize("specimen", specimens(IN_PROCESSES))
def test_two_processes_are_the_whole_model(specimen: Specimen) -> None:
    assert_plain(specimen, *fit(specimen, method="bp", workers="processes"))


@pytest.mark.parametrize("specimen", specimens(gaps=GAPS | TWO_AT_MOST))
def test_three_processes_are_the_whole_model(specimen: Specimen) -> None:
    assert_plain(specimen, *fit(specimen, method="bp", stages=3, workers="processes"))


# -- nothing in silence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("specimen", specimens(of=ODD))
def test_an_odd_model_is_split_exactly_or_refused(specimen: Specimen, workers: str) -> None:
    """Afterwards torch is as it was: no level of vmap stays pushed, in which nothing could be drawn at random."""
    try:
        assert_plain(specimen, *fit(specimen, method="bp", stages=3, workers=workers))
    except UsageError:
        pass
    finally:
        levels = [_functorch._vmap_decrement_nesting() for _ in iter(_functorch.maybe_current_level, None)]
    assert levels == []


# -- learning ----------------------------------------------------------------------------------------------------------------------


def assert_learns(specimen: Specimen, **options: Any) -> None:
    """The loss of the same five batches is lower after six epochs."""
    _, result = fit(specimen, epochs=6, **options)
    assert all(map(isfinite, result.losses))
    assert sum(result.losses[-5:]) < sum(result.losses[:5])


@pytest.mark.parametrize("method", ["ddg", "fdg", "dsp"])
@pytest.mark.parametrize("specimen", specimens())
def test_methods_with_delays_learn(specimen: Specimen, method: str) -> None:
    assert_learns(specimen, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dgl", "interlocking"])
@pytest.mark.parametrize("name", SHOWN.values())
def test_methods_with_local_losses_learn(name: str, method: str) -> None:
    cuts = {"hf T5ForConditionalGeneration": ["decoder.block.1"]}.get(name)  # a head on the encoder would not know the target's length
    assert_learns(ZOO[name], method=method, loss=ZOO[name].loss or of_logits, cuts=cuts)


# -- refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specimen", specimens(REFUSED_SHOWN, REFUSED))
def test_a_model_that_decides_on_a_value_is_refused_with_the_line(specimen: Specimen) -> None:
    with pytest.raises(UsageError) as refusal:
        fit(specimen)
    assert specimen.line in str(refusal.value)
