"""Models as people bring them: a split of each trains, bit for bit, as plain PyTorch trains the whole."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

import zoo
from specimens import Specimen
from zoo import ZOO

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
plain = cache(zoo.train)


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
